"""The house: imports go down only, no circle, one import name, a light command line."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Package -> packages that it may import.
BELOW: dict[str, set[str]] = {
    "merging": set(),
    "spaces": {"merging"},
    "evaluators": {"merging"},
    "search": {"merging", "spaces", "evaluators"},
}
#: Rooms, bottom to top: none imports one that stands above it. A module belongs to the longest
#: entry that its name begins with, so that a folder's `base` may stand below its other files.
ROOMS = [
    "merging.foreign.shown",
    "merging.errors",
    "merging.foreign",
    "merging.extensions",
    "merging.tensors",
    "merging.kernels",
    "merging.checkpoints",
    "merging.models",
    "merging.models.hidden_states",
    "merging.attention",
    "merging.alignment",
    "merging.policies",
    "merging.operators.schema",
    "merging.operators.base",
    "merging.operators.parts",
    "merging.operators",
    "merging.recipe",
    "merging.family",
    "merging.lineage",
    "merging.coefficients",
    "merging.recipe_file",
    "merging.mergekit_format",
    "merging.resident.encodings",
    "merging.resident.sharing",
    "merging.resident",
    "merging.in_memory",
    "merging.export",
    "merging.distillation",
    "merging.mixture",
    "merging.routing",
    "merging",
    "spaces.base",
    "spaces.groups",
    "spaces.parts",
    "spaces",
    "evaluators.base",
    "evaluators.items",
    "evaluators.data",
    "evaluators",
    "evaluators.metrics",
    "evaluators.text",
    "evaluators.preference",
    "evaluators.images",
    "evaluators.audio",
    "evaluators.harness",
    "evaluators.routing",
    "evaluators.spec",
    "search.quiet",
    "search.front",
    "search.front_estimate",
    "search.redact",
    "search.retry",
    "search.grammar",
    "search.fidelity",
    "search.workers",
    "search.strategies.base",
    "search.strategies.parts",
    "search.strategies",
    "search.spec",
    "search.record",
    "search.workers.backends",
    "search.plan",
    "search.dashboard",
    "search.study",
    "search.judging",
    "search.observers.trackers",
    "search.observers",
    "search.report",
    "search.report.page",
    "search.report.writing",
    "search.runs",
    "search.runs.replay",
    "search.runs.repair",
    "search.init",
    "search.api",
    "search.testing",
    "search.cli",
    "search",
]
#: Folders of families, where one file is one member.
FAMILIES = {"merging/operators", "search/strategies"}
LARGEST_FOLDER = 25
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
#: All that verbs which run nothing do without.
SLOW = (*HEAVY, "scipy", "sklearn", "pandas", "accelerate", "sqlalchemy", "optuna_dashboard")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for package in BELOW for p in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of what a file imports, also inside functions and for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: expected absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("mergesearch.") for name in names}
    return frozenset(found)


def imported_modules(module: str) -> set[str]:
    """Modules of ours that a module imports."""
    names = set(imports(MODULES[module]))
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return (found & set(MODULES)) - {module}


def room(module: str) -> str:
    """The longest entry of ROOMS that the module's name begins with."""
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len)


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_down_only(package: str) -> None:
    for module in MODULES:
        if module.split(".")[0] == package:
            first = {name.split(".")[0] for name in imports(MODULES[module])}
            ours = first & ({*BELOW, "mergesearch", "tests", "experiments"} - {package})
            assert ours <= BELOW[package], f"{module} imports {sorted(ours - BELOW[package])}"


def test_rooms_import_down_only() -> None:
    upward = [
        f"{module} (in {room(module)}) imports {other} (in {room(other)})"
        for module in MODULES
        for other in sorted(imported_modules(module))
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upward == []


def test_every_room_is_there() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_no_circle_of_imports() -> None:
    """Of any kind: at import time, inside functions, and for types only."""
    try:
        TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(reversed(error.args[1]))}")


def test_a_folder_is_a_room_with_one_purpose() -> None:
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES.values())
    large = {
        folder: n for folder, n in sizes.items() if n > LARGEST_FOLDER and folder not in FAMILIES
    }
    assert large == {}


def test_nothing_imports_the_bare_names() -> None:
    """`search`, `spaces`, ... belong to others: what is installed and imported is `mergesearch`."""
    code = re.compile(rf"^\s*(?:>>> )?(?:from|import) ({'|'.join(BELOW)})\b", re.M)
    program = re.compile(rf"-m\"?,? \"?({'|'.join(BELOW)})\b")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    files = [ROOT / name for name in listed.stdout.split()] or sorted(ROOT.rglob("*.py"))
    read = [p for p in files if p.suffix in (".py", ".md", ".yaml", ".sh") and p.is_file()]
    assert len(read) > 300
    for path in read:
        text = path.read_text()
        for pattern in (code, program):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)}: {found and found[0].strip()}"


def test_the_package_is_links_to_the_folders() -> None:
    """The folders stay at the top; `mergesearch/` gives them their one import name."""
    for package in BELOW:
        link = ROOT / "mergesearch" / package
        assert link.is_symlink()
        assert link.readlink() == Path("..") / package


def test_engines_stay_behind_their_own_files() -> None:
    def importers(name: str) -> list[str]:
        tops = {
            module: {n.split(".")[0] for n in imports(path)} for module, path in MODULES.items()
        }
        return sorted(module for module, names in tops.items() if name in names)

    strategies = "search.strategies"
    expected = {
        "ray": ["search.workers.backends.cluster"],
        "optuna": [
            "search.dashboard.shown_storage",
            "search.dashboard.trial_json",
            "search.record.journal",
            "search.record.journal_lines",
            "search.record.optuna_trials",
            "search.record.shown",
            "search.record.storage",
            "search.record.tables",
            "search.record.trial_log",
            f"{strategies}.optuna",
            f"{strategies}.parts.optuna_samplers",
            "search.quiet",
        ],
        "cma": [f"{strategies}.parts.cma_engine"],
        "moocore": ["search.front"],
        "nevergrad": [f"{strategies}.nevergrad"],
        "pymoo": [f"{strategies}.{n}" for n in ("nsga2", "nsga3", "parts.evolution", "sms_emoa")],
        "sklearn": [f"{strategies}.parts.random_forest"],
    }
    assert {name: importers(name) for name in expected} == {
        name: sorted(modules) for name, modules in expected.items()
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import mergesearch",
        "from mergesearch import merging, spaces, evaluators, search",
        "import mergesearch.search.cli.main",
        (
            "from mergesearch.search.plan.loading import load_study; "
            "from mergesearch.search.plan.planning import plan_study"
        ),
    ],
)
def test_the_command_line_and_check_load_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert loaded.stdout.split() == []


@pytest.mark.parametrize(
    "words", [("--help",), ("ls", "strategies"), ("ls", "operators"), ("ls", "evaluators")]
)
def test_verbs_that_only_tell_load_nothing_heavy(words: tuple[str, ...]) -> None:
    assert loaded_by(words, SLOW) == []


def loaded_by(words: Sequence[str], packages: Sequence[str]) -> list[str]:
    """Those of some packages that are loaded when a command ends well."""
    code = (
        "import sys\n"
        f"sys.argv = {['mergesearch', *words]!r}\n"
        "from mergesearch.search.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print(*[name for name in {tuple(packages)!r} if name in sys.modules], file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ran.stderr.splitlines()[-1].split()


@pytest.mark.parametrize("package", ["mergesearch", *(f"mergesearch.{name}" for name in BELOW)])
def test_public_names_exist_and_are_sorted(package: str) -> None:
    module = importlib.import_module(package)
    # Constants, classes, functions: the order in which ruff sorts `__all__`.
    kinds = sorted(
        module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert module.__all__ == kinds
    for name in module.__all__:
        assert getattr(module, name) is not None
