"""Every command, program and study file of the journeys' pages runs, in its order."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mergesearch.search.spec.study_file import validate
from tests.search.cli.page_models import PREPARED
from tests.search.cli.test_cli import mergesearch

DOCS = Path(__file__).parents[3] / "docs"
#: A block that is a file says its name in its first line.
FILE = re.compile(r"# ([a-z]+\.(?:ya?ml|py))\b")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page, in their order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def smaller(command: str) -> str:
    """A command whose study takes a second."""
    return f"{command} --minutes 0.02" if " init " in command else command


@pytest.mark.parametrize("page", PREPARED)
def test_study_files_on_the_page_are_valid(page: str) -> None:
    for language, text in blocks(page):
        if language == "yaml" and "evaluators:" in text:
            assert validate(yaml.safe_load(text), page).experts


@pytest.mark.slow
@pytest.mark.parametrize("page", PREPARED)
def test_everything_on_the_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PREPARED[page](tmp_path)
    exports = 0
    for language, text in blocks(page):
        name = FILE.match(text)
        if language == "sh":
            for command in text.splitlines():
                if "--push-to" in command:  # needs the hub
                    continue
                code, out, err = mergesearch(*shlex.split(smaller(command))[1:])
                assert code == 0, f"{command}\n{err}"
                if " export " in command:
                    exports += 1
                    # One head's model, another dtype or a whole front is not what was recorded.
                    other = re.search(r"--(head|dtype|front)", command)
                    expected = other or "(identical to the record)" in out
                    assert expected, f"{command}\n{out}"
        elif language in ("yaml", "python"):
            assert name is not None, f"a block of {language} without a file's name"
            (tmp_path / name[1]).write_text(re.sub(r"trials: \d+", "trials: 24", text))
            if language == "python":
                module = ModuleType(Path(name[1]).stem)
                monkeypatch.setitem(sys.modules, module.__name__, module)
                exec(compile(text, str(tmp_path / name[1]), "exec"), vars(module))
    assert exports
