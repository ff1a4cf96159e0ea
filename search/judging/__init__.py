"""People as judges: pairs on a local page, choices on disk, and trials that wait for them."""
