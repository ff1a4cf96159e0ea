"""What is built and installed is `mergesearch` alone, and it lives beside packages of any name."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest

import mergesearch
from tests.search.studies import analytic, write_study

ROOT = Path(__file__).parents[1]
#: What a build reads.
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("mergesearch", "merging", "spaces", "evaluators", "search", "tests")
BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"


def run(command: Sequence[object], folder: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=folder, env=clean
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build with the installed setuptools, without a network; the path of the archive."""
    printed = run([sys.executable, "-c", BUILD.format(kind, str(target))], source)
    return target / printed.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of this tree, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy2(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    sdist = build("sdist", source, target)
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    return sdist, build("wheel", target / sdist.name.removesuffix(".tar.gz"), target)


def modules() -> set[str]:
    """Modules of the tree, below `mergesearch/`."""
    files = {path.relative_to(ROOT) for path in (ROOT / "mergesearch").glob("*.py")}
    for folder in ("merging", "spaces", "evaluators", "search"):
        inside = (ROOT / folder).rglob("*.py")
        files |= {Path("mergesearch") / path.relative_to(ROOT) for path in inside}
    return {path.as_posix() for path in files}


def test_both_archives_hold_mergesearch_and_nothing_else(archives: tuple[Path, Path]) -> None:
    sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tops = {PurePosixPath(name).parts[0] for name in names}
    metadata = {"PKG-INFO", "setup.cfg", "mergesearch.egg-info"}
    assert tops == {"mergesearch", *SOURCES, *metadata}
    assert {name for name in names if name.endswith(".py")} == modules() | {"setup.py"}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    tops = {PurePosixPath(name).parts[0] for name in installed}
    assert tops == {"mergesearch", f"mergesearch-{mergesearch.__version__}.dist-info"}
    assert {name for name in installed if name.endswith(".py")} == modules()
    assert "mergesearch/py.typed" in installed


def test_no_link_of_the_description_needs_the_repository(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        name = f"mergesearch-{mergesearch.__version__}.dist-info/METADATA"
        metadata = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in metadata
    description = metadata.partition("\n\n")[2]
    assert "mergesearch finds them by search" in description
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_links_of_the_description_lead_to_the_repository_where_it_has_an_address() -> None:
    text = (ROOT / "README.md").read_text()
    described = runpy.run_path(str(ROOT / "setup.py"))["described"]
    lines = described(text, "https://host/org/repo/")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        kind = "raw" if target.endswith(".png") else "blob"
        assert f"](https://host/org/repo/{kind}/HEAD/{target}" in lines
    assert "]()" not in described(text, None)


def test_the_wheel_works_beside_packages_that_own_the_names_of_its_folders(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    site = Path(
        run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
        ).strip()
    )
    # What mergesearch depends on comes from this environment, its editable install does not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-index", "--no-deps"]
    other = tmp_path / "other"
    for name in ("spaces", "evaluators"):
        (other / name).mkdir(parents=True)
        (other / name / "__init__.py").write_text("OWNER = 'somebody else'\n")
    (other / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'spaces'\nversion = '1.0'\n"
        "[tool.setuptools]\npackages = ['spaces', 'evaluators']\n"
    )
    run([*install, build("wheel", other, other)], tmp_path)
    run([*install, archives[1]], tmp_path)
    study = write_study(analytic(trials=6, dim=2), tmp_path)
    program = (
        "import mergesearch, mergesearch.spaces, spaces, evaluators\n"
        "assert spaces.OWNER == evaluators.OWNER == 'somebody else'\n"
        "assert mergesearch.spaces.build_space\n"
        "print(mergesearch.__file__)"
    )
    assert Path(run([python, "-c", program], tmp_path).strip()).is_relative_to(site)
    found = run([python, "-m", "mergesearch", "run", study, "--run", tmp_path / "run"], tmp_path)
    assert "Winner" in found
    assert "mergesearch" in run([fresh / "bin" / "mergesearch", "--help"], tmp_path)
    run([*pip, "uninstall", "--quiet", "--yes", "spaces"], tmp_path)
    assert "Winner" in run([python, "-m", "mergesearch", "show", tmp_path / "run"], tmp_path)
