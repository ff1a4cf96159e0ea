"""What may stand in the place of a file: nothing, a folder, a link, a pipe, a device."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

#: One seed in so many has something else in the place of a file.
ODD = 40


def put_odd_file(file: Path, draw: Random) -> None:
    """Put something that is no regular file in the place of one."""
    clear(file)
    kind = draw.choice(("nothing", "folder", "itself", "nowhere", "pipe", "zero", "null"))
    if kind == "folder":
        (file / "inner").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "nothing":
        targets = {"itself": file.name, "nowhere": "/nowhere/at/all"}
        file.symlink_to(targets.get(kind, f"/dev/{kind}"))


def clear(file: Path) -> None:
    """Remove whatever stands at a path."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
