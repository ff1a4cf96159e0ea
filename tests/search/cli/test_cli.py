"""The command line: every verb, and every refusal in one line before weights are read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergesearch.search.cli.main import main
from tests.search.conftest import model_study, write_checkpoint
from tests.search.studies import analytic, write_study


def mergesearch(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call."""
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    sys.argv = ["mergesearch", *(str(argument) for argument in arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """The one line of a call that must be refused."""
    code, out, err = mergesearch(*arguments)
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("mergesearch: error: ")
    return err.removeprefix("mergesearch: error: ").strip()


# --- the whole journey
# ----------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_check_run_show_export(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    study = write_study(model_study(pico_models, pico_items), tmp_path)
    code, out, _ = mergesearch("check", study)
    assert code == 0
    assert "block: 10 dimensions" in out
    assert "block 1" in out
    code, out, _ = mergesearch("check", study, "--json")
    checked = json.loads(out)
    assert checked["space"]["dimensions"] == 10
    assert sum(len(group["tensors"]) for group in checked["space"]["groups"]) == 40

    run = tmp_path / "run"
    code, out, err = mergesearch("run", study, "--run", run)
    assert code == 0, err
    assert "winner" in out
    assert {path.name for path in run.iterdir()} >= {
        *("study.yaml", "environment.json", "journal.log", "report.html", "report.json"),
        *("best_so_far.png", "front.png", "coefficients.png"),
    }
    code, out, _ = mergesearch("show", run, "--json")
    shown = json.loads(out)
    assert len(shown["trials"]) == 24
    code, out, _ = mergesearch("show", run, "--front", "--json")
    front = json.loads(out)
    assert {trial["number"] for trial in front} == set(shown["front"])
    assert mergesearch("show", run, "--failed")[1].strip() == "none"

    code, out, err = mergesearch("export", run, "--out", tmp_path / "best", "--json")
    assert code == 0, err
    exported = json.loads(out)
    assert exported["identical"] is True
    assert exported["trial"] == shown["winner"]
    other = (
        next(trial["number"] for trial in front if trial["number"] != shown["winner"])
        if len(front) > 1
        else 0
    )
    code, out, err = mergesearch(
        "export", run, "--trial", other, "--out", tmp_path / "other", "--json"
    )
    assert json.loads(out)["identical"] is True

    code, out, err = mergesearch("recipe", run)
    assert code == 0, err
    assert "block 1: {" in out
    (tmp_path / "by-hand.yaml").write_text(out)
    assert mergesearch("merge", tmp_path / "by-hand.yaml", "--out", tmp_path / "by-hand")[0] == 0
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("best", "by-hand")]
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())


def test_exported_tensors_are_the_evaluated_ones_bit_for_bit(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.resident.arena import open_arenas
    from mergesearch.merging.resident.merged_model import MergedModel
    from mergesearch.search.runs.opened import open_run

    study = write_study(model_study(pico_models, pico_items), tmp_path)
    assert mergesearch("run", study, "--run", tmp_path / "run", "--progress", "quiet")[0] == 0
    opened = open_run(tmp_path / "run")
    record = opened.trial(None)
    assert mergesearch("export", tmp_path / "run", "--out", tmp_path / "best")[0] == 0
    model = load_model(record.recipe.base.path, "AutoModelForImageClassification")
    merged = MergedModel(model, open_arenas(opened.plan.template, opened.folder.arenas))
    merged.write(record.recipe.field)
    reloaded = load_model(str(tmp_path / "best"), "AutoModelForImageClassification")
    evaluated = merged.model.state_dict()
    exported = reloaded.state_dict()
    assert evaluated.keys() == exported.keys()
    for name in evaluated:
        assert torch.equal(evaluated[name], exported[name]), name
    files = {path.name for path in (tmp_path / "best").iterdir()}
    assert files >= {"config.json", "model.safetensors", "recipe.yaml", "recipe.json", "README.md"}
    again = mergesearch("merge", tmp_path / "best" / "recipe.yaml", "--out", tmp_path / "again")
    assert again[0] == 0, again
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merge_by_hand(tmp_path: Path, pico_models: Path) -> None:
    recipe = {
        "base": str(pico_models / "base"),
        "experts": [str(pico_models / "left"), str(pico_models / "right")],
        "operator": "average",
        "coefficients": [1.0, 0.0],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = mergesearch(
        "merge", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--json"
    )
    assert code == 0, err
    merged, left = (
        load_file(p / "model.safetensors") for p in (tmp_path / "out", pico_models / "left")
    )
    assert all(torch.equal(merged[name], left[name]) for name in left)
    assert "expected no folder or an empty one" in refused(
        "merge", tmp_path / "recipe.yaml", "--out", tmp_path / "out"
    )


def test_nan_weights_are_an_infeasible_trial_with_the_tensor_named(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pico_models / "right", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    data = model_study(pico_models, pico_items)
    data["experts"]["right"] = str(broken)
    code, _, err = mergesearch("run", write_study(data, tmp_path), "--run", tmp_path / "run")
    assert code == 0, err  # base and the other expert are fine, so there is a winner
    out = mergesearch("show", tmp_path / "run", "--failed")[1]
    assert "infeasible: tensor 'classifier.weight' holds NaN or infinite values" in out


def test_resuming_says_nothing_new_and_ls_lists_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = write_study(analytic("tiny", trials=12), tmp_path)
    first = mergesearch("run", study)
    second = mergesearch("run", study)
    assert first[0] == second[0] == 0
    assert first[1] == second[1]
    _, out, _ = mergesearch("ls", "runs", "--json")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["runs/tiny"]
    assert rows[0]["summary"].startswith("finished, 12 trials, winner: trial")


@pytest.mark.parametrize("what", ["strategies", "operators", "evaluators"])
def test_ls_lists_every_member_with_a_summary(what: str) -> None:
    code, out, _ = mergesearch("ls", what, "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) >= 2
    assert all(row["name"] and len(row["summary"]) > 20 for row in rows)
    assert mergesearch("ls", what)[1].splitlines()[0].startswith(rows[0]["name"])


def test_progress_as_json_lines(tmp_path: Path) -> None:
    study = write_study(analytic(trials=10, strategy={"name": "sobol"}), tmp_path)
    _, _, err = mergesearch("run", study, "--run", tmp_path / "run", "--progress", "json")
    events = [json.loads(line) for line in err.splitlines()]
    assert {event["event"] for event in events} == {"loading", "phase", "trial", "score"}
    assert [e["trial"] for e in events if e["event"] == "trial"] == list(range(10))
    scores = [e for e in events if e["event"] == "score"]
    told = json.loads(mergesearch("show", tmp_path / "run", "--json")[1])["result"]
    measured = {row["trial"]: row["scores"] for row in told}
    assert {event["phase"] for event in scores} == {"validation", "test"}
    for event in (e for e in scores if e["trial"] in measured):
        assert event["values"] == measured[event["trial"]][event["phase"]]["values"]


@pytest.mark.parametrize("verb", ["check", "run", "show", "export", "merge", "dashboard", "ls"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    code, out, _ = mergesearch(verb, "--help")
    assert code == 0
    assert f"Example: mergesearch {verb}" in " ".join(out.split())


# --- refusals
# ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"spaces": {}}, "spaces: unknown key; did you mean 'space'?"),
        (
            {"budget": {"trials": 0}},
            "budget.trials: input should be greater than or equal to 1, received 0",
        ),
        ({"budget": {"trials": 3}}, "budget.trials: expected at least 8"),
        ({"space": {"granularity": "blok"}}, "space.granularity: input should be 'global', 'task'"),
        (
            {"space": {"bounds": [1.0, 0.0]}},
            "space.bounds: expected [low, high] with low < high, received [1, 0]",
        ),
        ({"space": {"start": 7.0}}, "space.start: expected left/"),
        ({"experts": {"left": "./nowhere"}}, "nowhere"),
        (
            {"selection": {"weights": {"odd": 1}}},
            "selection.weights: expected a weight for each of ['odd', 'even']",
        ),
    ],
)
def test_wrong_studies(
    tmp_path: Path, pico_models: Path, pico_items: Path, sections: dict, expected: str
) -> None:
    study = write_study(model_study(pico_models, pico_items, **sections), tmp_path)
    assert expected in refused("check", study)
    assert expected in refused("run", study, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def llama(vocabulary: int = 12, width: int = 4) -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.zeros(vocabulary, width),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(width, width),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(2 * width, width),
        "lm_head.weight": torch.zeros(vocabulary, width),
    }


def make_expert(folder: Path, kind: str) -> Path:
    """An expert that does not fit ``llama()``, in one particular way."""
    tensors = llama()
    if kind == "other shapes":
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(9, 4)
    if kind == "missing tensor":
        del tensors["model.layers.0.mlp.up_proj.weight"]
    if kind == "extra tensor":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 4)
    if kind == "vocabulary":
        tensors = llama(vocabulary=16)
    write_checkpoint(folder, tensors)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    if kind == "not safetensors":
        weights.write_bytes(b"\xff" * 200)
    if kind == "pickle only":
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    if kind == "empty":
        weights.unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other shapes", ["model.layers.0.mlp.up_proj.weight", "9", "8"]),
        ("missing tensor", ["model.layers.0.mlp.up_proj.weight", "missing"]),
        ("extra tensor", ["model.layers.1.mlp.up_proj.weight"]),
        ("vocabulary", ["vocabular", "16", "12"]),
        ("truncated", ["model.safetensors", "truncated"]),
        ("not safetensors", ["model.safetensors"]),
        ("pickle only", ["pickle"]),
        ("empty", ["safetensors"]),
    ],
)
def test_wrong_experts(tmp_path: Path, kind: str, expected: list[str]) -> None:
    base = write_checkpoint(tmp_path / "base", llama())
    expert = make_expert(tmp_path / "expert", kind)
    data = analytic(base=str(base), experts={"expert": str(expert)}, space={"granularity": "task"})
    line = refused("check", write_study(data, tmp_path))
    assert all(word in line for word in expected), line
    assert "expert" in line


def test_wrong_items(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    from datasets import DatasetDict, load_from_disk

    def check(change: str) -> str:
        splits = dict(load_from_disk(pico_items))
        if change == "empty":
            splits["validation"] = splits["validation"].select([])
        if change == "overlap":
            splits["test"] = splits["search"]
        if change == "missing":
            del splits["test"]
        folder = tmp_path / change
        DatasetDict(splits).save_to_disk(folder)
        return refused("check", write_study(model_study(pico_models, folder), tmp_path))

    assert "empty" in check("empty") or "0 items" in check("empty")
    assert "search-" in check("overlap")
    assert "test" in check("missing")
    missing = model_study(pico_models, tmp_path / "nowhere")
    assert "nowhere" in refused("check", write_study(missing, tmp_path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "none.yaml" in refused("check", tmp_path / "none.yaml")
    assert "no study.yaml" in refused("show", tmp_path)
    assert "no study.yaml" in refused("export", tmp_path, "--out", tmp_path / "x")
    assert "no study.yaml" in refused("dashboard", tmp_path)
    assert "recipe.yaml" in refused("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "x")


def test_an_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused(
        "run", write_study(analytic(trials=9), tmp_path), "--run", tmp_path / "file" / "run"
    )
    assert "folder that can be written" in line


def test_trials_that_are_not_there_and_nothing_to_export(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    study = write_study(analytic(trials=9), tmp_path)
    mergesearch("run", study, "--run", tmp_path / "run")
    assert "nothing to export" in refused("export", tmp_path / "run", "--out", tmp_path / "x")
    data = model_study(pico_models, pico_items, budget={"trials": 9})
    mergesearch("run", write_study(data, tmp_path), "--run", tmp_path / "models-run")
    line = refused("export", tmp_path / "models-run", "--trial", 99, "--out", tmp_path / "x")
    assert "expected a trial from 0 to 8, received 99" in line


def test_a_port_in_use(tmp_path: Path) -> None:
    mergesearch("run", write_study(analytic(trials=9), tmp_path), "--run", tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused("dashboard", tmp_path / "run", "--port", port)


def test_a_changed_checkpoint_is_noticed_on_resume(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(pico_models, models)
    study = write_study(model_study(models, pico_items, budget={"trials": 9}), tmp_path)
    assert mergesearch("run", study, "--run", tmp_path / "run")[0] == 0
    tensors = load_file(models / "left" / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, models / "left" / "model.safetensors", metadata={"format": "pt"})
    assert "expected the weights that the recorded trials used" in refused(
        "run", study, "--run", tmp_path / "run", "--progress", "quiet"
    )
    assert "left" in refused("export", tmp_path / "run", "--out", tmp_path / "x")


def test_the_journal_is_only_readable_text(tmp_path: Path) -> None:
    """No pickle is ever written, so none is ever read."""
    mergesearch("run", write_study(analytic(trials=9), tmp_path), "--run", tmp_path / "run")
    for line in (tmp_path / "run" / "journal.log").read_text().splitlines():
        json.loads(line)
    assert os.access(tmp_path / "run" / "report.html", os.R_OK)


@pytest.mark.parametrize(
    "app",
    [
        # `python -m` ends by SIGINT where an executed text was left by a KeyboardInterrupt.
        "def app(): exec('signal.raise_signal(signal.SIGTERM)')",
        # A library makes another error of it.
        (
            "def app():\n"
            "    try:\n"
            "        signal.raise_signal(signal.SIGINT)\n"
            "    except KeyboardInterrupt as error:\n"
            "        raise RuntimeError('cannot build') from error"
        ),
    ],
    ids=["in a text", "as another error"],
)
def test_an_interrupt_inside_an_import_ends_with_130(app: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        f"import signal\nfrom mergesearch.search.cli import main\n{app}\n"
        "main.app = app\nmain.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "mergesearch: error: interrupted\n")
