"""Nothing is imported from where data lie: modules beside a run or a study are never executed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.search.studies import analytic, run_in, write_study
from tests.waiting import PATIENT

#: Names of packages and modules that some verb imports, early or late.
TRAPS = (
    *("__future__", "typing", "json", "typer", "click", "pydantic", "yaml", "rich", "numpy"),
    *("torch", "optuna", "ray", "transformers", "safetensors", "datasets", "multiprocessing"),
    *("cma", "scipy", "pandas", "matplotlib", "plotly", "filelock", "psutil", "numba", "triton"),
    *("colorama", "sitecustomize", "resource", "signal", "pickle", "cloudpickle", "setproctitle"),
)
#: The console script, and the package as a module.
WAYS = {
    "script": [str(Path(sys.executable).with_name("mergesearch"))],
    "module": [sys.executable, "-m", "mergesearch"],
}


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A folder with a study, and modules that leave a mark when they are executed."""
    folder = tmp_path / "trapped"
    folder.mkdir()
    marks = tmp_path / "marks"
    marks.mkdir()
    for name in TRAPS:
        code = f"open({str(marks / name)!r}, 'w').close()\nraise SystemExit('trap {name}')\n"
        (folder / f"{name}.py").write_text(code)
    write_study(analytic(trials=6, dim=2), folder)
    return folder


def call(folder: Path, way: str, *arguments: str) -> str:
    """Standard output of a verb with the folder as the current one, in which no trap went off."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [*WAYS[way], *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENT,
    )
    assert not [mark.name for mark in (folder.parent / "marks").iterdir()], done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_verb_imports_nothing_from_the_current_folder(trapped: Path) -> None:
    run_in(analytic(trials=6, dim=2), trapped / "runs" / "sphere")
    assert "winner" in call(trapped, "module", "show", "runs/sphere")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_runs_and_their_workers_import_nothing_from_the_current_folder(
    trapped: Path, way: str
) -> None:
    assert "2 dimensions" in call(trapped, way, "check", "study.yaml")
    call(trapped, way, "run", "study.yaml", "--run", "inline")
    ray = ["--set", "workers.backend=ray", "--set", "workers.count=1"]
    call(trapped, way, "run", "study.yaml", "--run", "spread", *ray)
    for verb in (["show", "spread"], ["ls", "strategies"], ["ls", "runs"], ["report", "inline"]):
        call(trapped, way, *verb)


@pytest.mark.slow
def test_exports_and_loaders_import_nothing_from_the_current_folder(
    trapped: Path, pico_models: Path, pico_items: Path
) -> None:
    """Models are loaded, items read by children of the loader, and the winner is exported."""
    from tests.search.conftest import model_study

    study = trapped / "models.yaml"
    study.write_text(yaml.safe_dump(model_study(pico_models, pico_items, budget={"trials": 9})))
    call(trapped, "script", "run", "models.yaml", "--run", "models")
    call(trapped, "script", "export", "models", "--out", "best")


@pytest.mark.slow
def test_a_module_that_a_study_names_may_lie_there_behind_what_is_installed(
    trapped: Path,
) -> None:
    """Only with ``allow_code: true``; ``scoring`` is found, and no trap takes a package's place."""
    scorer = "def score(model, split):\n    return 1.0\n"
    (trapped / "scoring.py").write_text(f"open('../marks/scoring', 'w').close()\n{scorer}")
    evaluator = {
        "kind": "python",
        "function": "scoring:score",
        "objectives": [{"name": "x", "direction": "maximize"}],
        "model": "none",
    }
    data = analytic(trials=3, dim=2, evaluators=[evaluator])
    path = write_study(data, trapped)
    refused = subprocess.run(
        [*WAYS["script"], "check", str(path)], cwd=trapped, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "allow_code" in refused.stderr
    assert not [*(trapped.parent / "marks").iterdir()]
    write_study(data | {"allow_code": True}, trapped)
    subprocess.run([*WAYS["script"], "check", str(path)], cwd=trapped, capture_output=True)
    assert [mark.name for mark in (trapped.parent / "marks").iterdir()] == ["scoring"]


def test_programs_of_the_user_keep_their_own_import_path(tmp_path: Path) -> None:
    """A program of ``kind: command`` may import what lies beside it."""
    from mergesearch.evaluators.program import run_program
    from mergesearch.merging.extensions.import_path import protected_children

    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    (tmp_path / "scorer.py").write_text("import beside\nprint(beside.VALUE)\n")
    with protected_children():
        done = run_program([sys.executable, "scorer.py"], "", 60.0, tmp_path)
    assert (done.code, done.output.strip()) == (0, "3")


def test_children_of_the_command_line_do_not_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``multiprocessing`` begins them: ``python -c``."""
    from mergesearch.merging.extensions.import_path import protected_children

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "trap.py").write_text("print('executed')\n")
    begin = [sys.executable, "-c", "import trap"]
    assert subprocess.run(begin, cwd=tmp_path, capture_output=True).returncode == 0
    with protected_children():
        assert subprocess.run(begin, cwd=tmp_path, capture_output=True).returncode == 1
    assert "PYTHONSAFEPATH" not in os.environ
