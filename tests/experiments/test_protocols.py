"""Protocols: their tables fit the product, wrong files are refused, and a small one runs whole."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiments.protocols.__main__ import README, main, write_tables
from experiments.protocols.cells import Cell, file_of, subsets
from experiments.protocols.figures import Judge, method_row, reference_row
from experiments.protocols.merges import method_study, reference_study
from experiments.protocols.models_file import Models, models_of, read_models
from experiments.protocols.protocol import Method, Protocol
from experiments.protocols.running import check, run
from experiments.protocols.table import PROTOCOLS
from experiments.protocols.tables import as_json, results_table
from experiments.protocols.zoos import ON_ZOOS
from mergesearch.merging import InputError
from mergesearch.merging.operators import get_operator
from mergesearch.search.strategies.table import STRATEGIES
from tests.search.conftest import make_pico_items, make_pico_models

ROOT = Path(__file__).parents[2]
SMALL = Protocol(
    name="small",
    title="A small protocol",
    paper="none",
    settings="this test",
    tasks={"left": "odd items", "right": "even items"},
    base="",
    experts={},
    methods=(
        Method("Averaging", "average"),
        Method("Chosen", "task_arithmetic", grid=(0.2, 0.6)),
        Method("Needs items", "regmean"),
    ),
    reports=("tasks", "general", "cost"),
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file of models: two experts, one accuracy for each, and a loss as what the base can do."""
    folder = tmp_path_factory.mktemp("models")
    models = make_pico_models(folder)
    items = make_pico_items(folder / "items")
    return {
        "name": "pico",
        "base": str(models / "base"),
        "experts": {"left": str(models / "left"), "right": str(models / "right")},
        "tasks": {"left": "odd", "right": ["even"]},
        "general": "loss",
        "evaluators": [
            {
                "kind": "classification",
                "data": str(items),
                "domain": "domain",
                "id": "id",
                "objectives": [
                    {"name": "odd", "metric": "accuracy", "domains": ["odd"]},
                    {"name": "even", "metric": "accuracy", "domains": ["even"]},
                    {"name": "loss", "metric": "cross_entropy"},
                ],
            }
        ],
    }


def small(content: dict[str, Any], **changes: Any) -> Models:
    return models_of({**content, **changes}, "models.yaml", ROOT)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_methods_are_operators_with_those_hyperparameters(name: str) -> None:
    protocol = PROTOCOLS[name]
    labels = [method.label for method in protocol.methods]
    assert len(set(labels)) == len(labels)
    for method in protocol.methods:
        operator = get_operator(method.operator)
        items = {"calibration": {"data": "x", "model_class": "AutoModel", "inputs": {"a": "b"}}}
        options = {**method.options, **(items if operator.needs - {"weights"} else {})}
        completed = operator.complete(options)
        assert all(completed[key] == value for key, value in method.options.items())
        if method.adaptation is not None:
            assert method.adaptation.strategy in STRATEGIES


def test_mergebench_has_its_eight_methods() -> None:
    operators = [method.operator for method in PROTOCOLS["mergebench"].methods]
    published = "average task_arithmetic fisher regmean ties dare consensus localize_and_stitch"
    assert sorted(operators) == sorted(published.split())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_file_in_the_repository_describes_a_study_of_every_method(name: str) -> None:
    protocol = PROTOCOLS[name]
    models = read_models(ROOT / "experiments" / "protocols" / "models" / f"{name}.yaml")
    assert set(reference_study(models).experts) >= set(models.file.experts)
    for method in protocol.methods:
        if "inputs" not in get_operator(method.operator).needs or models.file.calibration:
            study = method_study(models, protocol, method, tuple(models.file.experts))
            assert study.operator.name == method.operator


def test_every_protocol_has_its_place_in_the_readme_and_on_a_zoo() -> None:
    text = README.read_text()
    for name in PROTOCOLS:
        assert f"<!-- {name}: written by the command above -->" in text
        assert f"<!-- end of {name} -->" in text
        assert ON_ZOOS[name]


JUDGE = Judge(
    tasks={"a": ["a1", "a2"], "b": ["harm"]},
    held_out={},
    general=["loss", "quiz"],
    rates=["harm"],
    minimised={"harm", "loss"},
    base={"a1": 0.2, "a2": 0.4, "harm": 0.6, "loss": 2.0, "quiz": 0.5},
    experts={
        "a": {"a1": 0.8, "a2": 0.8, "harm": 0.5, "loss": 2.0, "quiz": 0.5},
        "b": {"a1": 0.1, "a2": 0.2, "harm": 0.2, "loss": 2.0, "quiz": 0.5},
    },
)
MERGED = {"a1": 0.6, "a2": 0.2, "harm": 0.4, "loss": 2.5, "quiz": 0.4}


def merge(*experts: str, **values: float) -> dict[str, Any]:
    return {
        "method": "m",
        "experts": list(experts),
        "coefficient": 0.5,
        "values": {**MERGED, **values},
        "seconds": {"prepare": 1.0},
        "peak": {"memory": 5, "card": None},
    }


def test_figures_of_a_merge_of_all_experts() -> None:
    row = method_row(JUDGE, [merge("a", "b")])
    assert row.scores == pytest.approx({"a": 0.4, "b": 0.6})
    assert row.average == pytest.approx(0.5)
    assert row.normalised[0] == pytest.approx((0.4 / 0.8 + 0.6 / 0.8) / 2)
    assert row.general == pytest.approx((-0.5 / 2 - 0.1 / 0.5) / 2)
    assert math.isnan(row.held_out[0])
    assert reference_row(JUDGE, "base", JUDGE.base).general == 0


def test_tasks_of_other_experts_are_held_out_of_a_subset() -> None:
    row = method_row(JUDGE, [merge("a"), merge("b", harm=0.0)])
    assert row.merges == 2
    assert row.scores == {}
    assert row.normalised[0] == pytest.approx((0.5 + 1.0 / 0.8) / 2)
    assert row.held_out[0] == pytest.approx((0.6 / 0.4 + 0.4 / 0.3) / 2)
    named = dataclasses.replace(JUDGE, held_out={"c": ["quiz"]})
    assert method_row(named, [merge("a")]).held_out[0] == pytest.approx(0.8)


def test_subsets_are_all_or_a_seeded_draw(content: dict[str, Any]) -> None:
    four = {name: name for name in "abcd"}
    tasks = dict.fromkeys(four, "odd")
    models = small(content, experts=four, tasks=tasks)
    assert len(subsets(models)) == 6 + 4 + 1
    few = {"sizes": [2, 4], "draws": 2, "seed": 1}
    drawn = subsets(small(content, experts=four, tasks=tasks, subsets=few))
    assert [len(group) for group in drawn] == [2, 2, 4]
    assert drawn == subsets(small(content, experts=four, tasks=tasks, subsets=few))
    assert len(set(drawn)) == 3


WRONG = {
    "no mapping": (["base"], "expected a mapping with base, experts, tasks and evaluators"),
    "unknown key": ({"expert": {}}, r"expert: unknown key; .*experts"),
    "no expert": ({"tasks": {"left": "odd", "rigt": "even"}}, r"'rigt' is no expert; .*right"),
    "no task": ({"tasks": {"left": "odd"}}, "for every expert, received none for 'right'"),
    "both": ({"held_out": {"left": "odd"}}, "expected tasks without an expert, received 'left'"),
    "study key": ({"study": {"worker": {}}}, r"study\.worker: unknown key; .*workers"),
    "one size": ({"subsets": {"sizes": [1]}}, "subsets.sizes.0: input should be greater"),
    "too many": ({"subsets": {"sizes": [2, 9]}}, "subsets.sizes: expected at most 2, the number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_file(content: dict[str, Any], wrong: str) -> None:
    change, message = WRONG[wrong]
    data = {**content, **change} if isinstance(change, dict) else change
    with pytest.raises(InputError, match=message):
        models_of(data, "models.yaml", ROOT)


UNPLANNED = {
    "objective": ({"tasks": {"left": "ood", "right": "even"}}, r"received 'ood'; .*odd"),
    "loss": ({"tasks": {"left": "loss", "right": "even"}}, "which is minimised; list it in rates"),
    "rate": ({"rates": ["odd"]}, "rates: expected objectives that are minimised, received 'odd'"),
    "checkpoint": ({"base": "nowhere/at/all"}, "nowhere/at/all"),
    "exclude": ({"exclude": "nosuch"}, "nosuch"),
}


@pytest.mark.parametrize("wrong", UNPLANNED)
def test_what_is_refused_before_weights_are_read(content: dict[str, Any], wrong: str) -> None:
    change, message = UNPLANNED[wrong]
    models = small(content, **change)
    if wrong == "exclude":  # what single methods cannot do is told of each
        assert message in check(SMALL, models).left_out["Averaging"]
        return
    with pytest.raises(InputError, match=message):
        check(SMALL, models)


def plain_accuracy(content: dict[str, Any], coefficient: float, domain: str) -> float:
    """Test accuracy of base + coefficient · sum of task vectors, by transformers alone."""
    import datasets
    from transformers import ViTForImageClassification

    def load(path: str) -> Any:
        return ViTForImageClassification.from_pretrained(path).eval()

    model = load(content["base"])
    experts = [load(path).state_dict() for path in content["experts"].values()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = sum(expert[name] - parameter for expert in experts)
            parameter.add_(coefficient * moved)
        items = datasets.load_from_disk(content["evaluators"][0]["data"])["test"]
        chosen = [index for index, own in enumerate(items["domain"]) if own == domain]
        pixels = torch.tensor(np.array(items["pixels"])[chosen])[:, None]
        said = model(pixel_values=pixels).logits.argmax(dim=1).numpy()
    return float(np.mean(said == np.array(items["label"])[chosen]))


def test_a_protocol_runs_goes_on_and_tells_what_failed(
    content: dict[str, Any], tmp_path: Path
) -> None:
    models = small(content)
    checked = check(SMALL, models)
    assert list(checked.left_out) == ["Needs items"]
    results = run(SMALL, models, tmp_path, checked, apart=False)
    base, home, average, chosen = results.rows
    assert (base.label, home.label) == ("base", "each expert at home")
    for row, coefficient in ((base, 0.0), (average, 0.5)):
        wanted = {
            task: plain_accuracy(content, coefficient, name)
            for task, name in (("left", "odd"), ("right", "even"))
        }
        assert row.scores == pytest.approx(wanted)
    assert chosen.coefficient in ("0.2", "0.6")
    assert average.memory is not None
    assert average.memory > 10_000_000

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "merges").iterdir()}
    assert len(files) == 3
    gone = file_of(SMALL, models, Cell(SMALL.methods[0], ("left", "right")), tmp_path)
    gone.unlink()
    again = run(SMALL, models, tmp_path, checked, apart=False)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "merges").iterdir()}
    assert [path for path in files if after[path] != files[path]] == [gone]
    assert [row.scores for row in again.rows] == [row.scores for row in results.rows]
    assert not list(tmp_path.glob(".arenas-*"))

    far = dataclasses.replace(SMALL, methods=(Method("Far", "task_arithmetic", {}, 1e39),))
    broken = run(far, models, tmp_path, check(far, models), apart=False)
    assert "Far (left, right)" in broken.failed
    assert len(broken.rows) == 2

    table = results_table(SMALL, results)
    assert "| method | left | right | average |" in table
    assert "- Needs items: it runs the experts on items" in table
    plain = as_json(SMALL, models, results)
    assert json.loads(json.dumps(plain, allow_nan=False))["rows"][2]["label"] == "Averaging"


def test_a_change_of_the_file_asks_for_other_merges(content: dict[str, Any]) -> None:
    cell = Cell(SMALL.methods[1], ("left", "right"))
    paths = {
        file_of(SMALL, small(content, **change), cell, Path("out"))
        for change in ({}, {"choose_by": "loss"}, {"study": {"seed": 1}}, {"general": "odd"})
    }
    assert len(paths) == 3  # what is only reported asks for none


def test_the_command_line_refuses_and_describes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["mergebensh"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["mergebench"]) == 0
    assert "Localize-and-Stitch: `localize_and_stitch`, density 0.1" in capsys.readouterr().out
    assert main(["mllm", "--models", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["mllm", "--zoo", "--methods", "TIESS"]) == 2
    assert "--methods: expected methods of mllm" in capsys.readouterr().err


def test_tables_go_between_the_marks_of_their_protocol(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(README.read_text())
    write_tables(PROTOCOLS["mllm"], ["| new |"], page)
    before, _, rest = README.read_text().partition("<!-- mllm: written by the command above -->")
    after = rest.partition("<!-- end of mllm -->")[2]
    text = page.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "| new |" in text


@pytest.mark.slow
def test_the_command_gives_json_and_keeps_merges(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "experiments.protocols", "at-scale", "--models", str(file)]
    options = ["--methods", "Averaging", "TIES", "--json", "--out", str(tmp_path / "out")]
    first = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    [found] = json.loads(first.stdout)
    labels = [row["label"] for row in found["rows"]]
    assert labels == ["base", "each expert at home", "Averaging", "TIES"]
    assert found["rows"][3]["seconds"]["choose"] > 0
    second = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(second.stdout) == [found]
