"""The house: imports go down only, the command line stays light, the public surface is sorted."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: package -> packages that it may import.
BELOW = {
    "merging": set(),
    "spaces": {"merging"},
    "evaluators": {"merging"},
    "search": {"merging", "spaces", "evaluators"},
}
HEAVY = (
    "torch",
    "transformers",
    "ray",
    "optuna",
    "lm_eval",
    "datasets",
    "numba",
    "matplotlib",
    "plotly",
    "mlflow",
    "wandb",
    "tensorboard",
    "prometheus_client",
)


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_down_only(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        ours = imports(path) & ({*BELOW, "tests", "experiments"} - {package})
        assert ours <= BELOW[package], f"{path.relative_to(ROOT)} imports {sorted(ours - BELOW[package])}"


def test_engines_stay_behind_their_own_files() -> None:
    importers = {
        name: sorted(
            str(p.relative_to(ROOT)) for package in BELOW for p in (ROOT / package).rglob("*.py") if name in imports(p)
        )
        for name in ("ray", "optuna", "cma", "moocore", "nevergrad", "pymoo", "sklearn")
    }
    strategies = "search/strategies"
    assert importers == {
        "ray": ["search/backends/cluster.py"],
        "optuna": ["search/journal.py", "search/storage.py", f"{strategies}/optuna.py", "search/trial_log.py"],
        "cma": [f"{strategies}/cma_engine.py"],
        "moocore": ["search/front.py"],
        "nevergrad": [f"{strategies}/nevergrad.py"],
        "pymoo": [f"{strategies}/{name}.py" for name in ("evolution", "nsga2", "nsga3", "sms_emoa")],
        "sklearn": [f"{strategies}/medsamix.py"],
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import merging, spaces, evaluators, search",
        "import search.cli",
        "from search.study_file import load_study; from search.plan import plan_study",
    ],
)
def test_the_command_line_and_check_load_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize("package", BELOW)
def test_public_names_exist_and_are_sorted(package: str) -> None:
    module = importlib.import_module(package)
    # Constants, classes, functions: the order in which ruff sorts `__all__`.
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_packages_are_listed_explicitly() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = sorted(
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in BELOW
        for path in (ROOT / package).rglob("__init__.py")
    )
    assert sorted(listed) == on_disk
