"""``python -m search`` is ``mergesearch``."""

from search.cli import main

main()
