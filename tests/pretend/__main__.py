"""Runs tests with the pretend card: ``python -m tests.pretend [what pytest takes]``.

It starts pytest in a process that registers the card as it imports torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.pretend.device import environment


def main() -> None:
    """Become pytest; without arguments it runs the tests of this folder."""
    arguments = sys.argv[1:] or [str(Path(__file__).parent)]
    command = [sys.executable, "-m", "pytest", *arguments]
    os.execve(sys.executable, command, {**os.environ, **environment()})


if __name__ == "__main__":
    main()
