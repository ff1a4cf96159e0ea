"""The evaluator contract, which every section in ``sections`` is tested against.

To add an evaluator, add its section there and a row to ``CASES``.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import SPLITS, Candidate, Evaluator, Measurement
from mergesearch.evaluators.composite import Composite
from mergesearch.evaluators.spec.evaluators import EVALUATORS
from mergesearch.merging import Source
from tests.evaluators.answered import make_processor, pico_llava, question_folder
from tests.evaluators.classified import classified_folder, pico_bert
from tests.evaluators.items import (
    DOMAINS,
    build,
    candidate_at,
    classification,
    opened,
    pico_vit,
    save,
    three_splits,
    token_splits,
)
from tests.evaluators.language import lm_section, make_tasks
from tests.evaluators.masks import pico_sam, stored
from tests.evaluators.masks import splits as masks
from tests.evaluators.pairs import (
    letter_tokenizer,
    pair_folder,
    pico_encoder,
    pico_t5,
    pico_wav2vec,
)
from tests.evaluators.prompted import (
    CLASSES,
    image_folder,
    pico_clip,
    word_tokenizer,
    zero_shot,
)
from tests.evaluators.texts import make_tokenizer, text_folder, text_llama

CASES = {
    "synthetic sphere": ["synthetic"],
    "synthetic ellipsoid": ["synthetic"],
    "synthetic tasks": ["synthetic"],
    "synthetic zdt1": ["synthetic"],
    "classification": ["classification"],
    "classification by domain": ["classification"],
    "composite": ["synthetic", "classification"],
    "entropy": ["entropy"],
    "alignment": ["alignment"],
    "language model": ["language_model"],
    "entropy of tokens": ["entropy"],
    "t3": ["t3"],
    "twin merging": ["twin_merging"],
    "task masks": ["task_masks"],
    "tasks": ["lm_eval"],
    "tasks in the harness's loop": ["lm_eval"],
    "generation": ["generation"],
    "people": ["preference"],
    "perplexity": ["perplexity"],
    "segmentation": ["segmentation"],
    "a program": ["command"],
    "a function": ["python"],
    "distance": ["distance"],
    "relative": ["classification"],
    "texts with numbers": ["text_classification"],
    "words with classes": ["token_classification"],
    "prompted images": ["zero_shot"],
    "preferred texts": ["reward"],
    "written texts": ["sequence_to_sequence"],
    "similar texts": ["similarity", "retrieval"],
    "recordings": ["audio_classification"],
    "speech": ["speech_recognition"],
    "questions about pictures": ["visual_questions"],
}


def sections(case: str) -> list[dict[str, Any]]:
    """The ``evaluators:`` section of a study, with the data in ``data`` beside it."""
    synthetic = {"kind": "synthetic", "noise": 0.1, "seed": 3}
    both = [{"metric": "accuracy"}, {"metric": "cross_entropy"}]
    by_domain = [
        {"metric": "accuracy", "domains": ["night"]},
        {"metric": "accuracy", "reduce": "worst"},
        {"name": "loss by day", "metric": "cross_entropy", "domains": ["day"]},
    ]
    return {
        "synthetic sphere": [synthetic | {"problem": "sphere", "items": 30}],
        "synthetic ellipsoid": [synthetic | {"problem": "ellipsoid"}],
        "synthetic tasks": [
            synthetic | {"problem": "quadratic_tasks", "objectives": 3, "items": 30}
        ],
        "synthetic zdt1": [synthetic | {"problem": "zdt1"}],
        "classification": [classification("data", *both, domain=None)],
        "classification by domain": [classification("data", *by_domain, batch_size=7)],
        "composite": [
            synthetic | {"problem": "sphere", "items": 30},
            classification("data", *both),
        ],
        "entropy": [
            unlabelled("entropy", objectives=[{}, {"domains": ["night"]}, {"reduce": "worst"}])
        ],
        "alignment": [
            unlabelled("alignment", layers=[1, 2], teachers=dict.fromkeys(DOMAINS, "teacher"))
        ],
        "language model": [tokens("language_model", labels="labels", batch_size=3)],
        "entropy of tokens": [
            tokens(
                "entropy",
                inputs={"input_ids": "input_ids"},
                model_class="AutoModelForCausalLM",
                batch_size=3,
            )
        ],
        "t3": [classification("data", *both) | {"kind": "t3"}],
        "twin merging": [classification("data", *both) | {"kind": "twin_merging"}],
        "task masks": [
            {
                "kind": "task_masks",
                "function": "tests.evaluators.routing.functions:size_of_weights",
                "sizes": {"search": 6, "validation": 5, "test": 4},
                "model_class": "AutoModelForImageClassification",
            }
        ],
        "tasks": [
            lm_section(
                FOLDER, "choose", "write", objectives=[{"name": "mean"}, {"domains": ["choose"]}]
            )
        ],
        "tasks in the harness's loop": [lm_section(FOLDER, {"task": "choose", "tier": "two"})],
        "people": [
            {
                "kind": "preference",
                "data": "texts",
                "tokenizer": str(FOLDER / "tokenizer"),
                "domain": "domain",
                "choices": 3,
                "max_new_tokens": 4,
            }
        ],
        "generation": [
            texts(
                "generation",
                max_new_tokens=8,
                until=["e"],
                objectives=[{"metric": "tokens"}],
                **PREFIX,
            )
        ],
        "perplexity": [texts("perplexity", objectives=[{"metric": "log_perplexity"}])],
        "segmentation": [
            unlabelled(
                "segmentation", data="masks", objectives=[{"metric": m} for m in ("dice", "iou")]
            )
        ],
        "a program": [program()],
        "a function": [
            {
                "kind": "python",
                "function": "tests.evaluators.functions:scored",
                "sizes": {"search": 6, "validation": 5, "test": 4},
                "model": "none",
            }
        ],
        "distance": [{"kind": "distance", "model_class": "AutoModelForImageClassification"}],
        "relative": [
            classification(
                "data", {"normalise": "chance", "chance": 0.1}, {"metric": "cross_entropy"}
            )
            | {"constraints": [{"at_least": 0.5}]}
        ],
        "texts with numbers": [
            classified("text_classification", "squared_error", number="score", pair="pair")
        ],
        "words with classes": [classified("token_classification", "accuracy", "cross_entropy")],
        "preferred texts": [classified("reward", "cross_entropy", data="pairs.jsonl")],
        "written texts": [
            classified("sequence_to_sequence", "chrf", data="pairs.jsonl", max_new_tokens=4)
        ],
        "similar texts": [
            classified("similarity", "squared_error", data="pairs.jsonl"),
            classified("retrieval", "ndcg", data="pairs.jsonl"),
        ],
        "recordings": [
            unlabelled(
                "audio_classification",
                data="pairs.jsonl",
                domain=None,
                batch_size=1,  # convolutions see the padding of shorter recordings
                objectives=[{"metric": "cross_entropy"}],
            )
        ],
        "speech": [
            classified(
                "speech_recognition",
                "cer",
                data="pairs.jsonl",
                tokenizer=str(FOLDER / "letters"),
                batch_size=1,
            )
        ],
        "questions about pictures": [
            unlabelled(
                "visual_questions",
                data="questions.parquet",
                tokenizer=str(FOLDER / "processor"),
                answer="sign",
                max_new_tokens=1,
            )
        ],
        "prompted images": [zero_shot(FOLDER, "accuracy", "entropy", data=IMAGES)],
    }[case]


def classified(kind: str, *metrics: str, **options: Any) -> dict[str, Any]:
    given = {"data": "texts.jsonl", "tokenizer": str(FOLDER / "tokenizer")}
    return unlabelled(
        kind, **given | {"objectives": [{"metric": metric} for metric in metrics]} | options
    )


#: Items of tasks with class names, beside the study.
IMAGES = {"file": "images", "classes": CLASSES}


def unlabelled(kind: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind, "data": "data", "domain": "domain", "id": "id", "batch_size": 7} | options


def tokens(kind: str, **options: Any) -> dict[str, Any]:
    return unlabelled(
        kind, **{"data": "tokens", "objectives": [{}, {"domains": ["day"]}]} | options
    )


PREFIX = {"target": "target", "scorer": "prefix"}


def texts(kind: str, **options: Any) -> dict[str, Any]:
    return unlabelled(kind, data="texts", tokenizer=str(FOLDER / "tokenizer"), **options)


def program() -> dict[str, Any]:
    """A program that scores items by the coefficients of the recipe."""
    code = (
        "import json, sys; r = json.load(sys.stdin); n = {'search': 6, 'validation': 5, 'test': "
        "4}[r['split']];"
        "s = [sum(map(sum, r['recipe']['field']['values'])) * (k + 1 + n) for k in range(n)][: "
        "r['count']];"
        "print(json.dumps({'values': {'f': sum(s) / len(s)}, 'items': {'f': s}}))"
    )
    sizes = {"search": 6, "validation": 5, "test": 4}
    objectives = [{"name": "f", "direction": "minimize"}]
    words = [sys.executable, "-c", code]
    return {
        "kind": "command",
        "command": words,
        "objectives": objectives,
        "sizes": sizes,
        "model": "none",
    }


#: Tokenizer and tasks, which their evaluators want in full.
FOLDER = Path(tempfile.mkdtemp(prefix="mergesearch-contract-"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("study")
    make_tasks(FOLDER, 30)
    pico_vit(seed=5).save_pretrained(FOLDER / "base")
    text_folder(folder)
    make_tokenizer(FOLDER / "tokenizer")
    classified_folder(folder, 40)
    image_folder(folder)
    word_tokenizer(FOLDER / "words")
    pair_folder(folder, 40)
    question_folder(folder)
    make_processor(FOLDER / "processor")
    letter_tokenizer(FOLDER / "letters")
    stored(folder / "masks", masks())
    save(folder / "data", three_splits())
    save(folder / "tokens", token_splits())
    pico_vit(seed=5).save_pretrained(folder / "teacher")
    yield folder
    shutil.rmtree(FOLDER)


#: Small models; a vocabulary of the texts' tokenizer holds the token ids of the other items too.
MAKERS: dict[str, Callable[..., Any]] = {
    "AutoModelForImageClassification": pico_vit,
    "AutoModelForCausalLM": text_llama,
    "AutoModelForMaskGeneration": pico_sam,
    "AutoModelForSequenceClassification": partial(pico_bert, "sequence", num_labels=1),
    "AutoModelForTokenClassification": partial(pico_bert, "token"),
    "AutoModelForZeroShotImageClassification": pico_clip,
    "AutoModelForSeq2SeqLM": pico_t5,
    "AutoModel": pico_encoder,
    "AutoModelForAudioClassification": partial(pico_wav2vec, "classes"),
    "AutoModelForImageTextToText": pico_llava,
    "AutoModelForCTC": partial(pico_wav2vec, "ctc"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: maker() for name, maker in MAKERS.items()}


@pytest.fixture
def model(evaluator: Evaluator, models: dict[str, Any]) -> Any:
    return models.get(evaluator.model_class or "")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def evaluator(case: str, folder: Path) -> Evaluator:
    return opened(*sections(case), folder=folder)


def candidates(evaluator: Evaluator, model: Any) -> list[Candidate]:
    points = np.random.default_rng(0).random((3, 4)).tolist()
    made = [
        candidate_at(point, model if evaluator.model_class is not None else None)
        for point in points
    ]
    base = Source("base", str(FOLDER / "base"))
    return [replace(candidate, recipe=replace(candidate.recipe, base=base)) for candidate in made]


def assert_same(one: Measurement, two: Measurement) -> None:
    assert one.values == two.values
    assert one.errors == two.errors
    assert one.items.keys() == two.items.keys()
    for name, scores in one.items.items():
        np.testing.assert_array_equal(scores, two.items[name])


def test_every_kind_has_a_case() -> None:
    assert {kind for kinds in CASES.values() for kind in kinds} == set(EVALUATORS)
    assert all(
        [section["kind"] for section in sections(case)] == kinds for case, kinds in CASES.items()
    )


class TestEvaluatorContract:
    def test_objectives_are_known_before_any_data(
        self, case: str, tmp_path: Path, folder: Path
    ) -> None:
        nowhere = build(*sections(case), folder=tmp_path / "absent")
        assert nowhere.objectives == opened(*sections(case), folder=folder).objectives
        names = [objective.name for objective in nowhere.objectives]
        assert names
        assert len(set(names)) == len(names)
        assert {objective.direction for objective in nowhere.objectives} <= {"maximize", "minimize"}
        assert nowhere.provides <= {"items", "gradient"}
        assert (nowhere.model_class is None) == all(
            section["kind"] in ("synthetic", "command", "python") for section in sections(case)
        )

    @pytest.mark.parametrize("split", SPLITS)
    def test_values_for_exactly_the_objectives(
        self, evaluator: Evaluator, model: Any, split: Any
    ) -> None:
        names = [objective.name for objective in evaluator.objectives]
        for candidate in candidates(evaluator, model):
            measured = evaluator.evaluate(candidate, split)
            assert list(measured.values) == names
            assert all(
                type(value) is float and math.isfinite(value) for value in measured.values.values()
            )
            assert set(measured.errors) <= set(names)
            assert all(
                type(error) is float and 0 <= error < math.inf for error in measured.errors.values()
            )

    @pytest.mark.parametrize(
        "split", ["search", *(pytest.param(s, marks=pytest.mark.slow) for s in SPLITS[1:])]
    )
    def test_the_same_twice_and_in_another_worker(
        self, evaluator: Evaluator, case: str, folder: Path, model: Any, split: Any
    ) -> None:
        another = opened(*sections(case), folder=folder)
        measured = [
            evaluator.evaluate(candidate, split) for candidate in candidates(evaluator, model)
        ]
        # The other order: nothing may depend on what was evaluated before.
        for candidate, first in reversed(
            list(zip(candidates(evaluator, model), measured, strict=True))
        ):
            assert_same(evaluator.evaluate(candidate, split), first)
            assert_same(another.evaluate(candidate, split), first)

    def test_only_what_is_known_to_repeat_itself_says_so(
        self, evaluator: Evaluator, case: str
    ) -> None:
        """Code of others, people, and answers that a task may draw promise nothing."""
        silent = {
            "a function",
            "a program",
            "people",
            "task masks",
            "tasks",
        }
        assert getattr(evaluator, "deterministic", False) == (case not in silent)

    def test_item_scores_explain_the_values(self, evaluator: Evaluator, model: Any) -> None:
        measured = evaluator.evaluate(candidates(evaluator, model)[0], "search")
        if "items" in evaluator.provides:
            assert set(measured.items) == set(measured.values)
        for name, scores in measured.items.items():
            assert scores.dtype == np.float64
            assert scores.ndim == 1
            # Domains are of one size here, so the mean over items is the mean over domains.
            assert scores.mean() == pytest.approx(measured.values[name], abs=1e-12)
            assert name in measured.errors

    @pytest.mark.parametrize("split", SPLITS)
    def test_size_and_cost_are_known_before_items_are_read(
        self, case: str, folder: Path, model: Any, split: Any
    ) -> None:
        closed = build(*sections(case), folder=folder)
        closed.check()
        open_ = opened(*sections(case), folder=folder)
        measured = open_.evaluate(candidates(open_, model)[0], split)
        longest = max((scores.size for scores in measured.items.values()), default=0)
        assert closed.size(split) >= longest
        assert closed.cost(split) >= max(closed.size(split), 1)
        if closed.size(split):
            assert closed.cost(split, 10**9) == closed.cost(split)
            assert closed.cost(split, 2) <= 2 * len(sections(case))

    def test_a_part_is_the_beginning_of_a_larger_part(
        self, evaluator: Evaluator, model: Any
    ) -> None:
        candidate = candidates(evaluator, model)[0]
        whole = evaluator.evaluate(candidate, "search")
        assert_same(evaluator.evaluate(candidate, "search", 10**9), whole)
        if "items" not in evaluator.provides:
            return
        smaller = evaluator.evaluate(candidate, "search", 2)
        for part in (4, 7, evaluator.size("search")):
            larger = evaluator.evaluate(candidate, "search", part)
            for name, scores in larger.items.items():
                assert 0 < smaller.items[name].size <= scores.size <= part
                # Not bit for bit: batches of another size may round otherwise.
                gaps = np.abs(smaller.items[name][:, None] - scores[None, :]).min(axis=1)
                assert gaps.max() < 1e-5
            smaller = larger

    def test_items_may_be_asked_for_by_index(self, evaluator: Evaluator, model: Any) -> None:
        if not evaluator.selects or "items" not in evaluator.provides:
            return
        candidate = candidates(evaluator, model)[0]
        whole = evaluator.evaluate(candidate, "search")
        indices = np.array([0, 2, 3])
        some = evaluator.evaluate(candidates(evaluator, model)[0], "search", indices)
        assert set(some.weights) == set(some.item_indices) == set(evaluator.additive)
        for name in evaluator.additive:
            if whole.items[name].size == evaluator.size("search"):
                np.testing.assert_array_equal(some.item_indices[name], indices)
            np.testing.assert_allclose(
                some.items[name], whole.items[name][some.item_indices[name]], atol=1e-5
            )
            assert some.weights[name] @ some.items[name] == pytest.approx(
                some.values[name], abs=1e-9
            )

    def test_splits_hold_other_items(self, evaluator: Evaluator, model: Any, case: str) -> None:
        if case == "distance":
            pytest.skip("there are no items")
        candidate = candidates(evaluator, model)[0]
        measured = [evaluator.evaluate(candidate, split) for split in SPLITS]
        answers = [
            (m.values, {name: scores.tolist() for name, scores in m.items.items()}, m.exhibits)
            for m in measured
        ]
        for index in range(3):
            assert answers[index] != answers[index - 1]

    def test_other_candidates_score_otherwise(self, evaluator: Evaluator) -> None:
        maker = MAKERS.get(evaluator.model_class or "", lambda seed: None)
        models = [maker(seed) for seed in (0, 1)]
        base = Source("base", str(FOLDER / "base"))
        recipes = [
            replace(candidate_at([0.2 + index / 2] * 4).recipe, base=base) for index in (0, 1)
        ]
        one, two = (
            evaluator.evaluate(Candidate(recipe, model), "search")
            for recipe, model in zip(recipes, models, strict=True)
        )
        assert (one.values, one.exhibits) != (two.values, two.exhibits)

    def test_composites_are_made_for_several_sections_alone(
        self, evaluator: Evaluator, case: str
    ) -> None:
        assert isinstance(evaluator, Composite) == (len(sections(case)) > 1)

    def test_global_generators_are_left_alone(self, evaluator: Evaluator, model: Any) -> None:
        import torch

        before = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
        evaluator.evaluate(candidates(evaluator, model)[0], "search")
        after = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1])
