"""Files that hold weights: safetensors folders, adapters, and models of the hub."""
