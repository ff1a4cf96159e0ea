"""What an attacker or an accident must not get: code from data, secrets from what is kept."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg
import pytest
import yaml

from mergesearch.merging import StudyFailedError
from mergesearch.search.runs.driver import run_study
from tests.postgres import Server
from tests.search.cli.test_cli import mergesearch
from tests.search.conftest import model_study
from tests.search.studies import analytic, run_in, spec_of
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]
PACKAGES = ("mergesearch", "merging", "spaces", "evaluators", "search")
SECRET = "correct-horse-battery-staple"
#: Reports every class that unpickling looks up, which is where code comes from.
AUDITED = """
import sys
seen = []
def note(event, arguments):
    if event == "pickle.find_class":
        seen.append(arguments)
sys.addaudithook(note)
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.plan.loading import load_study
from pathlib import Path
folder = Path(sys.argv[1])
run = open_run(folder) if len(sys.argv) == 2 else run_study(load_study(Path(sys.argv[2])), folder)
assert run.verdict is not None
print(seen)
"""
#: A pickle that would run a command.
POISON = b"cposix\nsystem\n(S'touch PWNED'\ntR.".hex()
COMMAND = {
    "kind": "command",
    "command": "touch PWNED",
    "objectives": [{"name": "x", "direction": "maximize"}],
}


def test_no_code_reads_pickles_or_runs_text() -> None:
    """No torch.load, pickle, joblib, shelve or marshal, and no YAML that makes objects."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            imported = {
                alias.name.split(".")[0]
                for n in nodes
                if isinstance(n, ast.Import)
                for alias in n.names
            }
            imported |= {
                n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module
            }
            assert not imported & {
                "pickle",
                "cloudpickle",
                "dill",
                "joblib",
                "shelve",
                "marshal",
            }, path
            calls = [node for node in nodes if isinstance(node, ast.Call)]
            # `exec("")` runs nothing; the command line forgets an interrupt by it.
            called = {ast.unparse(c.func) for c in calls if ast.unparse(c) != "exec('')"}
            assert not called & {"torch.load", "yaml.unsafe_load", "eval", "exec"}, path
            # Loaders of our own, for tags of the harness and for keys that stand twice, come from
            # the safe one.
            own = re.search(r"class \w*Loader\(yaml\.SafeLoader\)", path.read_text())
            assert "yaml.load" not in called or own, path
            given = {(k.arg, ast.unparse(k.value)) for call in calls for k in call.keywords}
            assert not given & {
                ("allow_pickle", "True"),
                ("trust_remote_code", "True"),
                ("shell", "True"),
            }, path


def test_nothing_is_unpickled_from_a_record(tmp_path: Path) -> None:
    """Neither when a study resumes, whatever Optuna's own attributes hold, nor when it is shown."""
    data = analytic("audit", trials=30, storage=f"sqlite:///{tmp_path}/log.db")
    data["strategy"] = {"name": "optuna", "sampler": "cma_es"}
    run = run_in(data, tmp_path / "run")
    run.log._storage.set_study_system_attr(run.log._study_id, "cma:optimizer", POISON)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (
        [str(tmp_path / "run")],
        [str(tmp_path / "run"), str(tmp_path / "study.yaml")],
    ):
        command = [sys.executable, "-c", AUDITED, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENT
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1] == "[]"
        assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump(analytic("code", evaluators=[COMMAND])),
        yaml.safe_dump(analytic("code"))
        + "reference_scores: !!python/object/apply:os.system ['touch PWNED']\n",
    ],
    ids=["command", "yaml"],
)
def test_a_study_file_runs_no_code_unless_it_says_so(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for verb, code in (("check", 2), ("run", 2), ("doctor", 1)):
        done = mergesearch(verb, "study.yaml")
        assert done[0] == code, done
        assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.slow
@pytest.mark.xdist_group("postgres")
def test_a_password_is_nowhere_but_in_the_environment(
    tmp_path: Path,
    pico_models: Path,
    pico_items: Path,
    monkeypatch: pytest.MonkeyPatch,
    postgres: Server,
) -> None:
    """Not in the run folder, database, printed lines, exported card or any command line."""
    with psycopg.connect(postgres.address("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE secretive LOGIN PASSWORD '{SECRET}' SUPERUSER")
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("MERGE_DB_PASSWORD", SECRET)
    database = postgres.database()
    address = f"127.0.0.1:{postgres.port}/{database}"
    url = f"postgresql://secretive:${{MERGE_DB_PASSWORD}}@{address}"
    data = model_study(pico_models, pico_items, name="secret", budget={"trials": 30}, storage=url)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    run = [sys.executable, "-m", "mergesearch", "run", str(path), "--progress", "json"]
    lines, said = _watched([*run, "--run", str(tmp_path / "run"), "--set", "workers.count=1"])
    assert any("raylet" in line for line in lines)
    assert not [line for line in lines if SECRET in line]
    assert SECRET not in said
    elsewhere = [
        "--run",
        str(tmp_path / "other"),
        "--set",
        f"storage={url.replace(f'/{database}', '/no')}",
    ]
    wrong = subprocess.run(
        [*run, *elsewhere], cwd=ROOT, capture_output=True, text=True, timeout=PATIENT
    )
    assert wrong.returncode == 2
    assert SECRET not in wrong.stdout + wrong.stderr
    assert "***" in wrong.stderr
    export = [
        sys.executable,
        "-m",
        "mergesearch",
        "export",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "best"),
    ]
    done = subprocess.run(export, cwd=ROOT, capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"report.html", "study.yaml", "README.md", "events.jsonl"} <= {
        file.name for file in kept
    }
    assert not [file for file in kept if SECRET.encode() in file.read_bytes()]
    with psycopg.connect(postgres.address(database)) as connection:
        for table in (
            "study_system_attributes",
            "trial_system_attributes",
            "trial_user_attributes",
        ):
            values = [str(row[0]) for row in connection.execute(f"SELECT value_json FROM {table}")]
            assert values
            assert not [value for value in values if SECRET in value]


def _watched(command: list[str]) -> tuple[set[str], str]:
    """Run to the end; command lines of it and its descendants, and what it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: set[str] = set()
    while process.poll() is None:
        try:
            family = [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]
        except psutil.Error:
            break
        for member in family:
            try:
                lines.add(" ".join(member.cmdline()))
            except psutil.Error:
                continue
        time.sleep(0.1)
    said = process.stdout.read()
    assert process.wait() == 0, said
    return lines, said


def test_an_evaluators_error_is_recorded_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergesearch.evaluators.synthetic import Synthetic

    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRET)

    def fail(*arguments: object) -> None:
        raise RuntimeError(f"403 for token {SECRET} at https://me:{SECRET}@host/x")

    monkeypatch.setattr(Synthetic, "evaluate", fail)
    with pytest.raises(StudyFailedError, match="failed in a row") as error:
        run_study(spec_of(analytic("leak", anchors="none"), tmp_path), tmp_path / "run")
    assert SECRET not in str(error.value)
    assert "403 for token ***" in str(error.value)
    assert not [
        f
        for f in (tmp_path / "run").rglob("*")
        if f.is_file() and SECRET.encode() in f.read_bytes()
    ]
