"""Documents that cannot rot: links resolve, study files validate, listed commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mergesearch.merging.mixture.operators import MIXTURE_OPERATORS
from mergesearch.merging.operators import OPERATORS
from mergesearch.search.plan.loading import load_study
from mergesearch.search.spec.study_file import validate

ROOT = Path(__file__).parents[1]
NOT_OURS = {".venv", ".venv-league", ".venv-peers", "runs", "zoo"}
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] not in NOT_OURS
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_readme_study_is_valid() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert validate(yaml.safe_load(block[1]), "README.md").budget.trials == 200


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("experiments/*/study.yaml")), ids=lambda path: path.parent.name
)
def test_study_files_of_experiments_are_valid(path: Path) -> None:
    assert load_study(path).experts


def test_the_readme_lists_every_verb() -> None:
    from mergesearch.search.cli.main import app

    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"`mergesearch {command.name or command.callback.__name__} " in text


def test_the_readme_lists_every_operator() -> None:
    table = (ROOT / "README.md").read_text().partition("| family | operators |")[2]
    listed = re.findall(r"`(\w+)`", table.partition("\n\n")[0])
    assert sorted(listed) == sorted([*OPERATORS, *MIXTURE_OPERATORS])


def test_the_targets_of_the_makefile_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)`", path.read_text()))
        assert named <= targets, f"{path}: {named - targets}"


def test_the_pages_of_the_operators_are_those_that_make_docs_writes() -> None:
    from mergesearch.merging.operators.pages import pages

    written = {path.name: path.read_text() for path in (ROOT / "docs" / "operators").glob("*.md")}
    assert written == pages(), "run `make docs`"


def test_the_page_of_the_strategies_is_the_one_that_make_docs_writes() -> None:
    from mergesearch.search.strategies.pages import page, strategy_table

    text = (ROOT / "docs" / "strategies.md").read_text()
    assert text == page(), "run `make docs`"
    assert text.count(strategy_table()) == 1
    assert not re.search(r":\w+:`|``", text), "markup of docstrings in a Markdown page"


def test_every_option_of_a_strategy_has_a_meaning() -> None:
    import inspect

    from mergesearch.search.strategies.pages import described
    from mergesearch.search.strategies.table import STRATEGIES

    silent = [
        f"{entry.name}.{option}"
        for entry in STRATEGIES.values()
        for option in entry.options()
        if not described(inspect.getdoc(entry.load()) or "").get(option)
    ]
    assert silent == []


def test_every_hyperparameter_has_a_meaning() -> None:
    from mergesearch.merging.operators import OPERATORS
    from mergesearch.merging.operators.schema import meaning

    silent = [
        f"{o.name}.{n}"
        for o in OPERATORS.values()
        for n, p in o.hyperparameters.items()
        if not meaning(p)
    ]
    assert silent == []
