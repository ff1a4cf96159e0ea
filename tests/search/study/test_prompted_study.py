"""Studies of CLIP by class prompts, and of text classifiers on a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.routing.bundle import load
from mergesearch.search.cli.check import describe_plan, plan_dict
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import export_bundle, rescore
from mergesearch.search.spec.study_file import resolve, validate
from tests.evaluators.classified import classified_folder, pico_bert
from tests.evaluators.prompted import CLASSES, image_folder, pico_clip, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and two experts of its vision tower, their images; a BERT and two experts, texts."""
    folder = image_folder(tmp_path_factory.mktemp("study"))
    classified_folder(folder)
    for seed, name in enumerate(("base", *CLASSES)):
        clip = pico_clip()
        bert = pico_bert("sequence")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in [*clip.named_parameters(), *bert.named_parameters()]:
                if seed and not key.startswith(("text_model", "text_projection", "logit_scale")):
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        clip.save_pretrained(folder / "clip" / name)
        bert.save_pretrained(folder / "bert" / name)
    word_tokenizer(folder / "clip" / "base")
    return folder


def study(family: str, evaluator: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "name": family,
        "base": f"{family}/base",
        "experts": {name: f"{family}/{name}" for name in CLASSES},
        "evaluators": [evaluator],
        "budget": {"trials": 3},
        "anchors": "none",
        "selection": {"leaders": 1},
        **sections,
    }


PROMPTED = {
    "kind": "zero_shot",
    "data": {"file": "images", "classes": CLASSES},
    "domain": "domain",
    "prompts": ["a photo of a {}"],
    "objectives": [{"metric": "entropy"}],
    "transductive": True,
}


def resolved(folder: Path, plain: dict[str, Any]) -> Any:
    return resolve(validate(plain, "study"), folder)


@pytest.mark.parametrize("metric", ["entropy", "cross_entropy"])
def test_gradients_move_the_coefficients(folder: Path, tmp_path: Path, metric: str) -> None:
    plain = study(
        "clip",
        PROMPTED | {"objectives": [{"metric": metric}], "transductive": metric == "entropy"},
        strategy={"name": "adamerging", "steps": 2},
        space={"granularity": "tensor"},
    )
    run = run_study(resolved(folder, plain), tmp_path / "run")
    searched = [record for record in run.log.records if record.kind == "search"]
    assert any(record.gradient_result is not None for record in searched)
    (chosen,) = (record for record in run.log.records if record.kind == "recommended")
    start = searched[0].recipe.field.values
    assert (chosen.recipe.field.values != start).any()
    assert run.verdict is not None


def routed_study(kind: str) -> dict[str, Any]:
    section = PROMPTED | {"kind": kind, "input": "image", "objectives": [{"metric": "accuracy"}]}
    del section["transductive"]
    options = {"router_steps": 5, "router_width": 4} if kind == "twin_merging" else {}
    made = study("clip", section | options, strategy="cma_es")
    return made if options else made | {"experts": {"colours": "clip/colours"}}


@pytest.mark.parametrize("kind", ["t3", "twin_merging"])
def test_merges_for_each_input_answer_by_class_prompts(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    run = run_study(resolved(folder, routed_study(kind)), tmp_path / "run")
    record = run.log.records[0]
    assert dict(record.recipe.routing)["method"] == kind
    assert all(record.state == "complete" for record in run.log.records)
    out = tmp_path / "out"
    export_bundle(run, record, out, facts={}, overwrite=False, threads=1)
    assert rescore(run, record, out).agreement.identical
    bundle = load(out)
    images = torch.zeros(2, 3, 8, 8)
    assert bundle(images, tasks="colours").logits.shape == (2, 3)
    assert bundle(images, tasks=["colours", "shapes"]).logits[1, 2] == float("-inf")
    assert 'tasks="colours"' in (out / "README.md").read_text()


def test_merges_for_each_input_need_prompts_for_clip(folder: Path) -> None:
    plain = routed_study("t3")
    del plain["evaluators"][0]["prompts"]
    with pytest.raises(InputError, match=r"base's CLIPModel, received t3.*use prompts"):
        plan_study(resolved(folder, plain))


def test_fisher_goes_by_the_prompts_of_the_study(folder: Path, tmp_path: Path) -> None:
    calibration = {
        "data": "images",
        "split": "search",
        "domain": "domain",
        "model_class": "AutoModelForZeroShotImageClassification",
        "inputs": {"pixel_values": "image"},
        "prompts": PROMPTED["prompts"],
        "classes": CLASSES,
        "samples": 2,
    }
    section = PROMPTED | {"objectives": [{"metric": "accuracy"}], "transductive": False}
    plain = study("clip", section, operator={"name": "fisher", "calibration": calibration})
    run = run_study(resolved(folder, plain), tmp_path / "run")
    assert run.plan.template.operator == "fisher"
    assert all(record.state == "complete" for record in run.log.records)


def test_check_prints_the_sizes_of_a_table(folder: Path) -> None:
    texts = {
        "kind": "text_classification",
        "data": "texts.jsonl",
        "tokenizer": "tokenizer",
        "objectives": [{"metric": "cross_entropy"}],
    }
    spec = resolved(folder, study("bert", texts))
    assert spec.evaluators[0].data.file == str(folder / "texts.jsonl")
    assert spec.evaluators[0].data.processor == str(folder / "bert" / "base")
    plan = plan_study(spec)
    sizes = plan_dict(plan)["items"]
    assert sum(sizes.values()) == 60
    assert f"items       {sizes['search']} search" in "\n".join(describe_plan(plan))


def test_a_base_of_another_kind_is_refused(folder: Path) -> None:
    wrong = {"kind": "classification", "data": "images", "input": "image", "domain": "domain"}
    with pytest.raises(InputError, match=r"base's CLIPModel, received classification.*zero_shot"):
        plan_study(resolved(folder, study("clip", wrong)))
    bare = {
        "kind": "entropy",
        "data": "images",
        "inputs": {"pixel_values": "image"},
        "model_class": "AutoModel",
    }
    with pytest.raises(InputError, match=r"use model_class: AutoModelForSequenceClassification"):
        plan_study(resolved(folder, study("bert", bare)))
