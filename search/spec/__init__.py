"""The study file: its sections, how it is read, and how two studies are compared."""
