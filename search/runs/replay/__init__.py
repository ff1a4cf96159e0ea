"""Merges rebuilt from their recipes, and compared with what was recorded of them."""
