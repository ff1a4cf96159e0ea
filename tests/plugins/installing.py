"""Installs the tiny plug-in, or others like it, into a folder of their own, without a network."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

TINY = Path(__file__).parent / "tiny"


def install(target: Path, version: str | None = None) -> Path:
    """What pip makes of the tiny plug-in in ``target``: the package, and its metadata."""
    project = tomllib.loads((TINY / "pyproject.toml").read_text())["project"]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TINY / "tiny_plugin", target / "tiny_plugin", ignore=ignore)
    describe(target, project["name"], version or project["version"], project["entry-points"])
    return target


def describe(
    target: Path, package: str, version: str, groups: Mapping[str, Mapping[str, str]]
) -> Path:
    """Write the metadata of a package with entry points."""
    folder = target / f"{package.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    )
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return target


def forget() -> None:
    """Have the next import of the tiny plug-in read its files again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_plugin"]:
        del sys.modules[name]
