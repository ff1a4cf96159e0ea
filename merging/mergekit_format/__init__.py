"""mergekit's configuration files: read as our recipes, and written beside our exports."""
