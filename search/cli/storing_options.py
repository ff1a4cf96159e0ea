"""Options of ``export`` and ``merge``: how weights are stored, and where they are published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Store merged tensors in this dtype; default: the base's own."
    ),
]
ShardSizeOption = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Split weights over files of at most this size, as 2GB."),
]
FrontOption = Annotated[
    bool,
    typer.Option("--front", help="Write every member of the recommended front, numbered."),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME", help="Upload the folder to this repository of the hub, private."
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="Let everybody see the repository of --push-to.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="With --push-to: list the files, and upload nothing.")
]
#: As long as nothing else is said.
SHARD_SIZE = "5GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB`` or ``2GB``, in powers of ten.

    Raises:
        InputError: If it is none.
    """
    from mergesearch.merging import InputError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise InputError(f"--shard-size: expected a size such as 2GB or 500MB, received {text!r}")
    return size


class Publishing:
    """A folder's way to the hub, if it takes one: checked before it is made, taken after."""

    def __init__(self, repository: str | None, public: bool, dry_run: bool) -> None:
        from mergesearch.merging import InputError
        from mergesearch.merging.export.pushing import PushTarget

        self._target = None
        if repository is None:
            if public or dry_run:
                given = "--public" if public else "--dry-run"
                raise InputError(f"{given}: expected --push-to ORG/NAME beside it, received none")
            return
        self._target = PushTarget(repository, public, dry_run)
        self._target.check()

    def publish(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Upload a folder or list its files; the result for programs and for people."""
        from mergesearch.merging.export.pushing import listed_files, local_names

        target = self._target
        if target is None:
            return {}, []
        local = local_names(folder)
        warning = f"warning: {', '.join(local)} name folders of this machine"
        lines = [warning] if local else []
        if target.dry_run:
            files = listed_files(folder)
            lines += [f"{size:>14,}  {name}" for name, size in files]
            lines.append(f"{len(files)} files for {target.repository}, nothing was uploaded")
            return {"files": [{"name": name, "bytes": size} for name, size in files]}, lines
        url = target.push(folder)
        seen = "public" if target.public else "private"
        return {"pushed": url}, [*lines, f"uploaded to {target.repository}, {seen}: {url}"]

    @property
    def wanted(self) -> bool:
        """Whether there is somewhere to publish to."""
        return self._target is not None
