"""Merges by mergekit's own command, several in one process. Runs in the peers' environment only.

``python merge_with_mergekit.py CONFIGURATION OUT [CONFIGURATION OUT ...]``
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main(arguments: list[str]) -> None:
    """Make every merge."""
    for source, out in list(pairwise(arguments))[::2]:
        data = yaml.safe_load(Path(source).read_text())
        run_merge(MergeConfiguration.model_validate(data), out, MergeOptions(copy_tokenizer=False))


if __name__ == "__main__":
    main(sys.argv[1:])
