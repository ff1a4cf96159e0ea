"""``check`` refuses what ``run`` would refuse: classes, tags, calibrations, GPUs, objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergesearch.merging import InputError, StudyFailedError
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.gradient_cost import gradient_cost
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.trial import make_family
from tests.architectures.vocabulary import save_tokenizer
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.conftest import LABELS, SIDE, model_study
from tests.search.init.journeys import write_lines
from tests.search.studies import analytic, run_in, spec_of, write_study


def planned(data: dict[str, Any], folder: Path) -> Plan:
    return plan_study(spec_of(data, folder))


def pictures(labels: list[int]) -> list[dict[str, Any]]:
    """Items of grey pictures, with a domain that takes turns."""
    return [
        {
            "pixels": [[n / 100] * SIDE] * SIDE,
            "label": label,
            "domain": ("odd", "even")[n % 2],
            "id": str(n),
        }
        for n, label in enumerate(labels)
    ]


class TestClasses:
    def test_a_class_number_beyond_the_head(self, tmp_path: Path, pico_models: Path) -> None:
        file = write_lines(tmp_path / "items.jsonl", pictures([*range(LABELS)] * 12))
        data = model_study(pico_models, file)
        planned(data, tmp_path)
        write_lines(file, pictures([*range(LABELS)] * 12 + [LABELS]))
        wanted = f"class numbers 0 to {LABELS - 1} for the items of 'odd'.* received {LABELS};"
        with pytest.raises(InputError, match=wanted):
            planned(data, tmp_path)

    def test_tags_of_another_length_than_words(self, tmp_path: Path) -> None:
        make_family(ARCHITECTURES["deberta_v2"], tmp_path)
        save_tokenizer(tmp_path / "base")
        rows = [{"words": ["a", f"cat {n}"], "tags": [0, 1]} for n in range(30)]
        file = write_lines(tmp_path / "items.jsonl", rows)
        section = {"kind": "token_classification", "data": str(file)}
        section |= {"words": "words", "tags": "tags"}
        study = model_study(tmp_path, tmp_path, evaluators=[section])
        planned(study, tmp_path)
        rows[7]["tags"] = [0]
        write_lines(file, rows)
        with pytest.raises(InputError, match="a tag for every word, received 2 words and 1 tags"):
            planned(study, tmp_path)
        rows[7]["tags"] = [0, 2]
        write_lines(file, rows)
        with pytest.raises(InputError, match="class numbers 0 to 1, as the model has 2 classes"):
            planned(study, tmp_path)


class TestCalibrations:
    def test_of_running_statistics(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        items = {"data": str(pico_items), "split": "search", "inputs": {"pixel_values": "pixels"}}
        items["model_class"] = "AutoModelForImageClassification"
        special = {"batch_norm": "recalibrate", "calibration": items | {"prompts": ["a {}"]}}
        with pytest.raises(InputError, match=r"calibration\.prompts: expected none, because"):
            spec_of(model_study(pico_models, pico_items, special=special), tmp_path)
        wrong = items | {"model_class": "AutoModelForCausalLM"}
        special = {"batch_norm": "recalibrate", "calibration": wrong}
        with pytest.raises(Exception, match=r"special\.calibration\.model_class: expected a class"):
            planned(model_study(pico_models, pico_items, special=special), tmp_path)

    def test_of_a_recipe(self, tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
        calibration = {
            "data": str(pico_items),
            "split": "search",
            "model_class": "AutoModelForImageClassification",
            "inputs": {"pixel": "pixels"},
        }
        recipe = tmp_path / "recipe.yaml"
        study = model_study(pico_models, pico_items)
        data = {key: study[key] for key in ("base", "experts")} | {"operator": "regmean"}
        recipe.write_text(yaml.safe_dump(data | {"hyperparameters": {"calibration": calibration}}))
        line = refused("merge", recipe, "--out", tmp_path / "out")
        assert "calibration.inputs: expected arguments of ViTForImageClassification" in line
        table = tmp_path / "items.csv"
        table.write_text("pixels\n1\n")
        calibration["data"] = str(table)
        recipe.write_text(yaml.safe_dump(data | {"hyperparameters": {"calibration": calibration}}))
        line = refused("merge", recipe, "--out", tmp_path / "out")
        assert "expected a folder written by save_to_disk, received a CSV file" in line


class TestModels:
    def test_a_classifier_of_texts_for_pictures(self, tmp_path: Path, pico_items: Path) -> None:
        make_family(ARCHITECTURES["bert"], tmp_path)
        with pytest.raises(InputError, match=r"evaluators\.0\.kind: expected an evaluator of"):
            planned(model_study(tmp_path, pico_items), tmp_path)

    def test_a_program_whose_class_config_json_names(self, tmp_path: Path) -> None:
        make_family(ARCHITECTURES["bart"], tmp_path)
        section = {"kind": "command", "command": ["true"]}
        section["objectives"] = [{"name": "loss", "direction": "minimize"}]
        study = model_study(tmp_path, tmp_path, evaluators=[section], allow_code=True)
        wanted = "received AutoModelForCausalLM.* use model_class: AutoModelForSeq2SeqLM"
        with pytest.raises(InputError, match=wanted):
            planned(study, tmp_path)
        section["model_class"] = "AutoModelForSeq2SeqLM"
        planned(study, tmp_path)

    def test_data_of_another_kind(self, tmp_path: Path, pico_models: Path) -> None:
        (tmp_path / "items.xlsx").write_bytes(b"PK")
        data = model_study(pico_models, tmp_path / "items.xlsx")
        with pytest.raises(InputError, match=r"received an Excel file; export it as one of these"):
            planned(data, tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a card")
def test_a_gpu_that_is_not_there(tmp_path: Path, pico_models: Path, pico_items: Path) -> None:
    data = model_study(pico_models, pico_items, workers={"gpus": 1, "backend": "inline"})
    study = write_study(data, tmp_path)
    code, out, err = mergesearch("check", study)
    assert code == 2
    assert "cards       none here; " in out
    assert "workers.gpus: expected 1 GPU here, found none that torch can use;" in err
    assert mergesearch("check", study, "--card", "80")[0] == 0
    assert "fail  gpus" in mergesearch("doctor", study)[1]


class TestStrategies:
    def test_one_objective_where_several_are_needed(self, tmp_path: Path) -> None:
        data = analytic(strategy={"name": "map"}, trials=80)
        line = refused("check", write_study(data, tmp_path))
        assert "strategy.name: expected two objectives or more with map" in line
        with pytest.raises(InputError, match="expected two objectives or more with map"):
            run_in(data, tmp_path / "run")

    def test_a_budget_below_the_least_is_warned_of(self, tmp_path: Path) -> None:
        warning = (
            "budget: 38 search trials with strategy cma_es, which needs 100 or more: raise "
            "budget.trials to 102, or choose auto"
        )
        data = analytic(trials=40)
        study = write_study(data, tmp_path)
        code, out, _ = mergesearch("check", study)
        assert code == 0
        assert f"warning     {warning}" in out
        _, out, err = mergesearch("run", study, "--run", tmp_path / "run", "--progress", "plain")
        assert warning in out + err
        for more in ({"trials": 110}, {"strategy": {"name": "auto"}}):
            plan = planned(data | analytic(**({"trials": 40} | more)), tmp_path)
            assert not any("warning" in line for line in describe_plan(plan))

    def test_what_gradient_steps_cost(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        data = model_study(pico_models, pico_items, strategy={"name": "hybrid"})
        data["budget"] = {"trials": 60}
        [line] = [
            one for one in describe_plan(planned(data, tmp_path)) if one.startswith("gradients")
        ]
        assert "count as" in line
        assert "at most 50% of the budget go there" in line

    @pytest.mark.slow
    def test_what_is_said_of_gradients_is_what_is_counted(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        data = model_study(pico_models, pico_items, strategy={"name": "hybrid"})
        run = run_in(data | {"budget": {"trials": 3}, "anchors": "none"}, tmp_path / "run")
        cost = gradient_cost(run.plan)
        first = next(record for record in run.log.records if record.gradient_items)
        assert cost is not None
        assert cost.items == first.gradient_items


def test_a_reference_that_fails_is_one_line(tmp_path: Path, pico_models: Path) -> None:
    script = tmp_path / "judging.py"
    script.write_text("def judge(recipe):\n    raise ValueError('the tokenizer\\nis missing')\n")
    section = {
        "kind": "python",
        "function": f"{script}:judge",
        "model": "none",
        "objectives": [{"name": "gain", "direction": "maximize"}],
        "constraints": [{"metric": "harm", "at_most": "base"}],
    }
    data = model_study(pico_models, pico_models, evaluators=[section], allow_code=True)
    with pytest.raises(StudyFailedError) as caught:
        run_in(data, tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "base could not be measured on search items: ValueError: the tokenizer is miss" in message
    )
    assert f"({script}:2); objectives or bounds are relative to it" in message
