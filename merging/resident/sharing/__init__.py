"""One copy of base and rows for all processes that work on a card."""
