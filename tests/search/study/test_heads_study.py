"""Studies of experts with heads of their own: every task by its head, in searches and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import InputError
from mergesearch.merging.models.loading import load_model
from mergesearch.search.api.study import Study
from mergesearch.search.cli.check import describe_plan, memory
from mergesearch.search.plan.card_needs import CardSettings, card_bytes, demand_of
from mergesearch.search.plan.cards import PlannedCard
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import export_bundle, rescore
from mergesearch.search.runs.exporting import export_trial
from mergesearch.search.runs.opened import Run
from mergesearch.search.workers.messages import Task, WorkerSpec
from mergesearch.search.workers.worker import Worker
from tests.merging.headed import save_modalities
from tests.search.conftest import SIDE, model_study
from tests.search.studies import spec_of

CLASS = "AutoModelForImageClassification"
LABELS = {"left": 2, "right": 5}


@pytest.fixture(scope="module")
def headed_models(tmp_path_factory: pytest.TempPathFactory, pico_models: Path) -> Path:
    """The pico models: a base without a head, and experts of two and five labels."""
    folder = tmp_path_factory.mktemp("headed")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "left", "right"):
        tensors = load_file(pico_models / name / "model.safetensors")
        config = json.loads((pico_models / name / "config.json").read_text())
        width = tensors.pop("classifier.weight").shape[1]
        tensors.pop("classifier.bias")
        if name in LABELS:
            labels = [f"{name}{k}" for k in range(LABELS[name])]
            weight = torch.randn((len(labels), width), generator=generator)
            tensors |= {"classifier.weight": weight, "classifier.bias": torch.zeros(len(labels))}
            config["id2label"] = {str(k): label for k, label in enumerate(labels)}
            config["label2id"] = {label: k for k, label in enumerate(labels)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def headed_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of the domains ``left`` and ``right``, in turns, and of one domain called ``right``."""
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(0)
    splits = {}
    for split in ("search", "validation", "test"):
        domains = [("left", "right")[index % 2] for index in range(16)]
        splits[split] = Dataset.from_dict(
            {
                "pixels": rng.random((16, SIDE, SIDE)).astype("float32").tolist(),
                "label": [int(rng.integers(0, LABELS[domain])) for domain in domains],
                "few": rng.integers(0, 2, 16).tolist(),
                "domain": domains,
                "id": [f"{split}-{index}" for index in range(16)],
            }
        )
    folder = tmp_path_factory.mktemp("items") / "data"
    DatasetDict(splits).save_to_disk(folder)
    return folder


def by_domain(items: Path, **options: Any) -> dict[str, Any]:
    return {
        "kind": "classification",
        "data": str(items),
        "domain": "domain",
        "id": "id",
        "objectives": [{"metric": "accuracy"}],
    } | options


def study(models: Path, items: Path, **sections: Any) -> dict[str, Any]:
    data = {
        "name": "heads",
        "special": {"heads": "own"},
        "space": {"granularity": "task"},
        "strategy": {"name": "adamerging", "steps": 2},
        "evaluators": [
            by_domain(items),
            {"kind": "entropy", "data": str(items), "domain": "domain", "id": "id"},
        ],
        "selection": {"leaders": 1},
        "budget": {"trials": 10},
    }
    return model_study(models, items, **(data | sections))


def test_classes_are_those_of_the_expert_whose_head_scores(
    headed_models: Path, headed_items: Path, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("text,label\na,right4\n")
    sections = [
        {"kind": "text_classification", "data": str(tmp_path / "table.csv"), "head": head}
        for head in ("right", None)
    ]
    spec = spec_of(study(headed_models, headed_items, evaluators=sections), tmp_path)
    owners = [section.data.processor for section in spec.evaluators]
    assert owners == [str(headed_models / "right"), str(headed_models / "base")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, headed_models: Path, headed_items: Path) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    return run_study(spec_of(study(headed_models, headed_items), folder), folder / "run")


def test_anchors_are_experts_with_every_head(
    run: Run, headed_models: Path, headed_items: Path
) -> None:
    from datasets import load_from_disk

    assert all(record.state == "complete" for record in run.log.records)
    left = next(record for record in run.log.records if record.name == "expert left")
    items = load_from_disk(headed_items)["search"].with_format("numpy")
    with torch.inference_mode():
        pixels = torch.from_numpy(np.asarray(items["pixels"], np.float32))[:, None]
        logits = load_model(str(headed_models / "left"), CLASS)(pixels).logits
    # Items of its own domain as the expert scores them; the others by the other expert's head.
    right = logits.argmax(dim=1).numpy() == np.asarray(items["label"])
    np.testing.assert_array_equal(left.items["accuracy"][::2], right[::2].astype(float))


def test_gradients_go_through_the_heads(run: Run) -> None:
    losses = [
        record.gradient_result.losses
        for record in run.log.records
        if record.gradient_result is not None
    ]
    assert losses
    assert losses[-1][-1] < losses[0][0]


def test_exports_score_as_recorded(run: Run, tmp_path: Path) -> None:
    record = run.trial(None)
    exported = export_trial(run, record, tmp_path / "out", overwrite=False, rescored=True)
    assert exported.result["identical"]
    assert (tmp_path / "out" / "heads" / "left" / "model.safetensors").is_file()
    one = export_trial(run, record, tmp_path / "left", overwrite=False, rescored=True, head="left")
    assert one.lines[-1] == "not scored again: items of right need other heads"
    asked = export_trial(
        run, record, tmp_path / "asked", overwrite=False, rescored=False, head="left"
    )
    assert [line for line in asked.lines if "scored" in line] == []
    assert load_model(str(tmp_path / "left"), CLASS).config.num_labels == 2
    with pytest.raises(InputError, match="head: expected one of left, right, base"):
        export_trial(run, record, tmp_path / "x", overwrite=False, rescored=False, head="up")


def test_from_python(run: Run, headed_models: Path, headed_items: Path) -> None:
    opened = Study(study(headed_models, headed_items), run=run.folder.path)
    assert opened.best_model(head="right").config.num_labels == LABELS["right"]
    with pytest.raises(InputError, match=r"best_model: expected head=, one of \['left', 'right'\]"):
        opened.best_model()


def test_one_head_for_all_items(tmp_path: Path, headed_models: Path, headed_items: Path) -> None:
    evaluators = [
        by_domain(headed_items, label="few", head="left"),
        {"kind": "distance", "model_class": CLASS},
    ]
    data = study(
        headed_models, headed_items, evaluators=evaluators, strategy="cma_es", budget={"trials": 9}
    )
    done = run_study(spec_of(data, tmp_path), tmp_path / "run")
    out = tmp_path / "out"
    exported = export_trial(
        done, done.trial(None), out, overwrite=False, rescored=True, head="left"
    )
    assert exported.result["identical"]
    distances = {record.name: record.values["distance"] for record in done.log.records}
    assert distances["base"] == 0 < distances["expert left"]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_workers_hold_the_heads_as_well(
    cluster: Any, run: Run, tmp_path: Path, headed_models: Path, headed_items: Path
) -> None:
    data = study(headed_models, headed_items, workers={"backend": "ray", "count": 2})
    remote = run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert all(record.state == "complete" for record in remote.log.records)
    assert any(record.gradient_result is not None for record in remote.log.records)
    here, there = (
        {r.name: dict(r.values) for r in one.log.records if r.kind == "anchor"}
        for one in (run, remote)
    )
    assert here == there


def test_check_says_which_heads_are_used(
    tmp_path: Path, headed_models: Path, headed_items: Path
) -> None:
    plan = plan_study(spec_of(study(headed_models, headed_items), tmp_path))
    lines = describe_plan(plan)
    heads = next(line for line in lines if line.startswith("heads"))
    assert "left (34 parameters), right (85 parameters)" in heads
    assert plan.layout is not None
    merged = sum(spec.size for spec in plan.layout.tensors) * 4
    assert memory(plan)["worker"] == 2 * merged + (34 + 85) * 4  # gradients of the shared part
    demand = demand_of(plan)
    assert demand is not None
    assert demand.heads == (34 + 85) * 4
    card = PlannedCard("any", 1 << 40)
    (one,) = card_bytes(demand, CardSettings(), card)
    (none,) = card_bytes(replace(demand, heads=0), CardSettings(), card)
    assert one.total == none.total + demand.heads


@pytest.mark.parametrize(
    ("special", "evaluator", "message"),
    [
        (
            {"heads": "own"},
            {"head": "up"},
            r"evaluators\.0\.head: expected one of left, right, base, received 'up'",
        ),
        (
            {"heads": "own"},
            {"domain": None},
            r"evaluators\.0\.head: expected one of left, right, base, received none; write head:",
        ),
        (
            {"heads": "own"},
            {"domain": "few"},
            "expected one of left, right, base for the items of domain '0', received none",
        ),
        ({}, {}, r"special: \{heads: own \| base \| average\}"),
        (
            {"heads": "base"},
            {},
            "special.heads: base: expected a head in base",
        ),
        (
            {"heads": "average"},
            {},
            "special.heads: average: expected one shape of 'classifier.bias' in all experts",
        ),
    ],
)
def test_refusals_before_weights_are_read(
    special: Any,
    evaluator: Any,
    message: str,
    tmp_path: Path,
    headed_models: Path,
    headed_items: Path,
) -> None:
    evaluators = [by_domain(headed_items, **evaluator)]
    data = study(
        headed_models, headed_items, special=special, evaluators=evaluators, strategy="cma_es"
    )
    with pytest.raises(InputError, match=message) as caught:
        plan_study(spec_of(data, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_head_without_heads(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    evaluators = [by_domain(pico_items, head="left")]
    for special in ({}, {"heads": "own"}):
        data = study(pico_models, pico_items, evaluators=evaluators, special=special)
        with pytest.raises(InputError, match=r"evaluators\.0\.head: expected .* received 'left'"):
            plan_study(spec_of(data | {"strategy": "cma_es"}, tmp_path))


def test_averaged_heads_around_a_tower_that_is_stored_by_itself(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    """A base without its head and its prefix gives the merges of a base that has both."""
    bare = tmp_path / "bare"
    copytree(pico_models, bare)
    file = bare / "base" / "model.safetensors"
    tensors = load_file(file)
    tower = {n.removeprefix("vit."): t for n, t in tensors.items() if n.startswith("vit.")}
    save_file(tower, file, metadata={"format": "pt"})
    distance = {"kind": "distance", "model_class": CLASS}
    evaluators = [by_domain(pico_items, domain=None), distance]
    sections = {"special": {"heads": "average"}, "evaluators": evaluators, "strategy": "cma_es"}
    values = []
    for models in (pico_models, bare):
        plan = plan_study(spec_of(study(models, pico_items, **sections), tmp_path))
        kinds = tuple(one.model_dump(mode="json") for one in plan.spec.evaluators)
        worker = Worker(WorkerSpec(plan.template, kinds, str(tmp_path / f"arenas-{models.name}")))
        outcome = worker.run(Task("one", plan.space.decode(plan.space.start), "search"))
        assert outcome.measurement is not None, outcome.failure
        values.append(dict(outcome.measurement.values))
    whole, alone = values
    assert whole.pop("distance") > alone.pop("distance") > 0  # one base has a head to be far from
    assert whole == alone


def test_an_objective_may_name_the_expert(
    tmp_path: Path, headed_models: Path, headed_items: Path
) -> None:
    section = by_domain(
        headed_items, domain=None, objectives=[{"name": "right", "metric": "accuracy"}]
    )
    data = study(headed_models, headed_items, evaluators=[section], strategy="cma_es")
    plan = plan_study(spec_of(data, tmp_path))
    assert plan.evaluator.use_heads(["left", "right", "base"]) == {"right": CLASS}


def routed_study(models: Path, items: Path, kind: str, **options: Any) -> dict[str, Any]:
    section = by_domain(items, kind=kind, **options)
    section["objectives"].append({"metric": "cross_entropy"})
    data = study(models, items, evaluators=[section], strategy="cma_es", budget={"trials": 10})
    del data["space"]
    return data


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "twin_merging", "per": "batch", "router_steps": 15, "router_width": 8},
        pytest.param(
            {"kind": "twin_merging", "router_steps": 15, "router_width": 8},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"kind": "t3", "head": "right"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_merges_for_each_input_answer_by_the_head_of_the_task(
    options: dict[str, Any], tmp_path: Path, headed_models: Path, headed_items: Path
) -> None:
    from mergesearch.merging.models.own_heads import OwnHeads
    from mergesearch.merging.routing.bundle import load

    if options["kind"] == "t3":
        options = options | {"label": "few", "domain": None}
    data = routed_study(headed_models, headed_items, **options)
    if options["kind"] == "t3":
        del data["experts"]["left"]
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert all(record.state == "complete" for record in run.log.records)
    record = [one for one in run.log.records if one.recipe.routing][-1]
    out = tmp_path / "out"
    export_bundle(run, record, out, facts={}, overwrite=False, threads=1)
    assert rescore(run, record, out).agreement.identical
    routed = load(out)
    assert isinstance(routed.head, OwnHeads)
    images = torch.rand((3, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    answer = routed(pixel_values=images, tasks="right")
    assert answer.logits.shape == (3, LABELS["right"])
    assert not {n for n in routed._targets if n.startswith("classifier.")} & routed.head.private
    if len(routed.head.models) > 1:
        both = routed(pixel_values=images, tasks=["left", "right", "left"]).logits
        assert torch.isneginf(both[0, LABELS["left"] :]).all()
        assert torch.isfinite(both[1]).all()
    with pytest.raises(InputError, match=r"tasks: expected one of .*, received none"):
        routed(pixel_values=images)
    # A weight that is written for one head is that of all.
    first, *others = routed.head.models.values()
    name = next(n for n, _ in first.named_parameters() if n not in routed.head.private)
    routed.double()
    assert all(other.get_parameter(name) is first.get_parameter(name) for other in others)
    assert {p.dtype for other in others for p in other.parameters()} <= {torch.float64}


def test_modules_of_single_experts_do_not_go_with_merges_for_each_input(
    tmp_path: Path, headed_models: Path, headed_items: Path
) -> None:
    options: dict[str, Any] = {"kind": "twin_merging"}
    data = routed_study(headed_models, headed_items, **options)
    data["special"] = {"absent": "own"}
    with pytest.raises(InputError, match=r"special\.absent: expected no policy but") as caught:
        plan_study(spec_of(data, tmp_path))
    assert "\n" not in str(caught.value)


def test_studies_without_heads_are_what_they_were(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    data = spec_of(model_study(pico_models, pico_items), tmp_path).to_dict()
    assert "head" not in data["evaluators"][0]


def test_texts_and_images_in_one_study(tmp_path: Path) -> None:
    """Each evaluator runs the class of model that its head needs, around one merge."""
    from datasets import Dataset, DatasetDict

    models = save_modalities(tmp_path)
    splits = {}
    for number, split in enumerate(("search", "validation", "test")):
        pixels = np.random.default_rng(number).random((2, 3, 8, 8)).astype("float32")
        splits[split] = Dataset.from_dict(
            {
                "input_ids": [[1 + number, 5, 39, 39, 39, 39, 7], [2, 9, 39, 39, 39, 39, number]],
                "pixels": pixels.tolist(),
            }
        )
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    data = {"data": str(tmp_path / "data")}
    inputs = {"input_ids": "input_ids", "pixel_values": "pixels"}
    evaluators = [
        {"kind": "language_model", "head": "words", **data},
        {
            "kind": "entropy",
            "model_class": "AutoModelForImageTextToText",
            "inputs": inputs,
            "head": "seeing",
            **data,
        },
    ]
    study = {
        "name": "modalities",
        "base": str(models["base"]),
        "experts": {name: str(models[name]) for name in ("words", "seeing")},
        "special": {"absent": "own"},
        "space": {"granularity": "task"},
        "strategy": {"name": "adamerging"},
        "evaluators": evaluators,
        "budget": {"trials": 10},
    }
    plan = plan_study(spec_of(study, tmp_path))
    sections = tuple(plan.spec.to_dict()["evaluators"])
    worker = Worker(WorkerSpec(plan.template, sections, str(tmp_path / "arenas")))
    anchors = {anchor.name: anchor.recipe for anchor in plan.anchors}
    scores = {}
    for name in ("expert words", "expert seeing"):
        outcome = worker.run(Task(name, anchors[name], "search"))
        assert outcome.failure is None
        assert outcome.measurement is not None
        scores[name] = outcome.measurement.values
    assert scores["expert words"] != scores["expert seeing"]
    alone = {"base": study["base"], "experts": {"seeing": str(models["seeing"])}}
    with pytest.raises(InputError, match=r"head: expected one of seeing, base, received 'words'"):
        plan_study(spec_of(study | alone, tmp_path))
