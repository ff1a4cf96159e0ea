"""``python -m mergesearch`` is ``mergesearch``."""

from mergesearch.search.cli.main import main

main()
