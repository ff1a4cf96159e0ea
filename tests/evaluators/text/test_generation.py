"""Generation agrees with that of transformers; stop strings, scorers and their errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.text import transformers_writer
from mergesearch.evaluators.text.generation import SCORERS, find_scorer
from mergesearch.evaluators.text.stop_strings import DeviceCriterion
from mergesearch.evaluators.text.writer import cut
from mergesearch.merging import InputError, MergesearchError
from tests.evaluators.items import build, candidate_at, opened, save
from tests.evaluators.measuring import batch_sizes
from tests.evaluators.texts import make_tokenizer, text_folder, text_llama, text_splits

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if "
    "add_generation_prompt %}>{% endif %}"
)
SCORER_FILE = """
calls = []
def note(prediction, target, prompt):
    calls.append((prediction, target, prompt))
    return len(prediction)
def fail(prediction, target, prompt):
    raise KeyError("no such answer")
def text(prediction, target, prompt):
    return "1"
def nothing(prediction, target, prompt):
    return None
def nan(prediction, target, prompt):
    return float("nan")
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model() -> Any:
    return text_llama()


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_scorers.py").write_text(SCORER_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scorers", raising=False)
    import importlib

    return importlib.import_module("own_scorers")


def section(folder: Path, **options: Any) -> dict[str, Any]:
    columns = {
        "data": "texts",
        "tokenizer": str(folder / "tokenizer"),
        "target": "target",
        "max_new_tokens": 8,
    }
    return (
        {"kind": "generation", "domain": "domain", "id": "id", "batch_size": 3} | columns | options
    )


def scorer_calls(
    folder: Path, model: Any, scorers: Any, **options: Any
) -> list[tuple[str, str | None, str]]:
    """The scorer's arguments, in the order of the items."""
    scorers.calls.clear()
    evaluator = opened(section(folder, scorer="own_scorers:note", **options), folder=folder)
    measured = evaluator.evaluate(candidate_at([1], model), "search")
    by_prompt = {
        prompt: (prediction, target, prompt) for prediction, target, prompt in scorers.calls
    }
    results = [by_prompt[prompt] for prompt in text_splits()["search"]["prompt"]]
    assert measured.items["score"].tolist() == [len(prediction) for prediction, _, _ in results]
    return results


def own(folder: Path, model: Any, text: str, count: int = 8) -> Any:
    """New tokens of transformers' own greedy generation, one prompt at a time."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        results = model.generate(
            ids,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )
    return results[0, ids.shape[1] :], tokenizer


class TestWriting:
    def test_agrees_with_transformers(self, folder: Path, model: Any, scorers: Any) -> None:
        for prediction, target, prompt in scorer_calls(folder, model, scorers):
            tokens, tokenizer = own(folder, model, prompt)
            assert prediction == tokenizer.decode(tokens, skip_special_tokens=True)
            assert target in text_splits()["search"]["target"]

    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_batches_change_nothing(
        self, folder: Path, model: Any, scorers: Any, size: int
    ) -> None:
        assert scorer_calls(folder, model, scorers, batch_size=size) == scorer_calls(
            folder, model, scorers, batch_size=3
        )

    def test_predictions_differ(self, folder: Path, model: Any, scorers: Any) -> None:
        assert len({prediction for prediction, _, _ in scorer_calls(folder, model, scorers)}) > 3

    def test_stop_strings(self, folder: Path, model: Any, scorers: Any) -> None:
        whole = scorer_calls(folder, model, scorers)
        stop = next(p[2:4] for p, _, _ in whole if len(p) > 5)
        stopped = scorer_calls(folder, model, scorers, until=[stop, "never said"])
        assert [p for p, _, _ in stopped] == [p.split(stop)[0] for p, _, _ in whole]
        assert stopped != whole

    def test_stopped_rows_take_fewer_tokens(self, folder: Path, model: Any, scorers: Any) -> None:
        objectives = [{"metric": "tokens"}]
        whole = opened(section(folder, objectives=objectives), folder=folder)
        assert [o.direction for o in whole.objectives] == ["minimize"]
        stop = next(p[2:4] for p, _, _ in scorer_calls(folder, model, scorers) if len(p) > 5)
        stopped = opened(section(folder, objectives=objectives, until=[stop]), folder=folder)
        many, few = (
            e.evaluate(candidate_at([1], model), "search").items["tokens"] for e in (whole, stopped)
        )
        assert (many <= 8).all()
        assert (few <= many).all()
        assert few.sum() < many.sum()

    def test_an_empty_prediction_is_scored(self, folder: Path, scorers: Any) -> None:
        import torch

        model = text_llama(1, tie_word_embeddings=False)
        tokenizer = make_tokenizer(folder / "tokenizer")
        with torch.no_grad():
            model.lm_head.weight.zero_()
        model.generation_config.eos_token_id = [
            0,
            tokenizer.eos_token_id,
        ]  # all logits are 0: the first token wins
        objectives = [{"metric": "score"}, {"metric": "tokens"}]
        assert {p for p, _, _ in scorer_calls(folder, model, scorers, objectives=objectives)} == {
            ""
        }
        evaluator = opened(section(folder, objectives=objectives), folder=folder)
        assert evaluator.evaluate(candidate_at([1], model), "search").values == {
            "score": 0.0,
            "tokens": 0.0,
        }

    def test_chat_template(self, tmp_path: Path, model: Any, scorers: Any) -> None:
        text_folder(tmp_path, TEMPLATE)
        options = {"chat_template": True, "system_prompt": "be old"}
        for prediction, _, prompt in scorer_calls(tmp_path, model, scorers, **options):
            tokens, tokenizer = own(tmp_path, model, f"[system] be old [user] {prompt} >")
            assert prediction == tokenizer.decode(tokens, skip_special_tokens=True)

    def test_the_same_twice_and_for_a_part(self, folder: Path, model: Any) -> None:
        one, two = (
            opened(section(folder, objectives=[{"metric": "tokens"}]), folder=folder)
            for _ in range(2)
        )
        first = one.evaluate(candidate_at([1], model), "search")
        assert two.evaluate(candidate_at([1], model), "search").values == first.values
        part = two.evaluate(candidate_at([1], model), "search", 4)
        np.testing.assert_array_equal(
            part.items["tokens"], first.items["tokens"][part.item_indices["tokens"]]
        )

    def test_prompts_that_are_too_long(self, folder: Path, model: Any) -> None:
        evaluator = opened(section(folder, max_new_tokens=60), folder=folder)
        with pytest.raises(
            InputError,
            match="expected prompts and predictions of at most 64 tokens, received a prompt",
        ):
            evaluator.evaluate(candidate_at([1], model), "search")


class TestStopStrings:
    """Rows end at stop strings that are found without text, exactly as if they were read."""

    def written(self, folder: Path, model: Any, until: list[str], **options: Any) -> list[float]:
        objectives = [{"metric": "tokens"}]
        evaluator = opened(
            section(folder, objectives=objectives, until=until, **options), folder=folder
        )
        return list(evaluator.evaluate(candidate_at([1], model), "search").items["tokens"])

    @pytest.fixture
    def stop(self, folder: Path, model: Any, scorers: Any) -> str:
        return next(p[2:4] for p, _, _ in scorer_calls(folder, model, scorers) if len(p) > 5)

    @pytest.mark.parametrize("size", [2, 8])
    def test_texts_are_decoded_once_a_batch(
        self, folder: Path, model: Any, stop: str, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        slow = transformers_writer.device_criterion
        monkeypatch.setattr(transformers_writer, "device_criterion", lambda *given: None)
        expected = self.written(folder, model, [stop, "never said"], batch_size=size)
        monkeypatch.setattr(transformers_writer, "device_criterion", slow)
        calls: list[int] = []
        decode = PreTrainedTokenizerFast.batch_decode

        def counted(self: Any, rows: Any, **options: Any) -> Any:
            calls.append(len(rows))
            return decode(self, rows, **options)

        monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", counted)
        found = self.written(folder, model, [stop, "never said"], batch_size=size)
        assert found == expected
        assert min(found) < 8
        assert calls == [size] * (8 // size)

    def test_rows_that_were_stopped_for_no_reason_are_written_again(
        self, folder: Path, model: Any, stop: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        expected = self.written(folder, model, [stop])

        def at_once(tokenizer: Any, until: Any, start: int) -> DeviceCriterion:
            return DeviceCriterion(lambda ids, scores: torch.ones(len(ids)).bool(), start)

        monkeypatch.setattr(transformers_writer, "device_criterion", at_once)
        assert self.written(folder, model, [stop]) == expected

    def test_batches_of_few_tokens(self, folder: Path, model: Any, stop: str) -> None:
        expected = self.written(folder, model, [stop])
        with batch_sizes(model) as sizes:
            assert self.written(folder, model, [stop], batch_size=8, batch_tokens=60) == expected
        prompts = [size for size in sizes if size > 8]
        assert len(prompts) > 2
        assert max(prompts) < 60


class TestScorers:
    def test_built_in(self) -> None:
        pairs = [
            ("a b", "a b"),
            (" a b ", "a b"),
            ("a b c", "a b"),
            ("c a b", "a b"),
            ("", "a"),
            ("a", None),
        ]
        results = {name: [scorer(*pair, "") for pair in pairs] for name, scorer in SCORERS.items()}
        assert results == {
            "exact_match": [1, 1, 0, 0, 0, 0],
            "contains": [1, 1, 1, 1, 0, 0],
            "prefix": [1, 1, 1, 0, 0, 0],
        }

    def test_missing_targets_are_none(
        self, folder: Path, tmp_path: Path, model: Any, scorers: Any
    ) -> None:
        splits = text_splits()
        splits["search"]["target"][0] = None
        save(tmp_path / "some", splits)
        results = scorer_calls(folder, model, scorers, data=str(tmp_path / "some"))
        assert [target is None for _, target, _ in results] == [True] + [False] * 7
        assert all(
            target is None for _, target, _ in scorer_calls(folder, model, scorers, target=None)
        )

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("fail", "expected a number, received KeyError: 'no such answer'; mend the scorer"),
            ("text", "expected a number, received str"),
            ("nothing", "expected a number, received NoneType"),
            ("nan", "expected a finite number, received nan"),
        ],
    )
    def test_what_goes_wrong_names_scorer_and_item(
        self, folder: Path, model: Any, scorers: Any, name: str, message: str
    ) -> None:
        evaluator = opened(section(folder, scorer=f"own_scorers:{name}"), folder=folder)
        with pytest.raises(MergesearchError, match=message) as caught:
            evaluator.evaluate(candidate_at([1], model), "search")
        assert str(caught.value).startswith(f"evaluators.0.scorer: own_scorers:{name}: item '0-")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:f", "received 'no_such_module': ModuleNotFoundError"),
            (
                "own_scorers:absent",
                "expected a function 'absent' in module 'own_scorers', received none",
            ),
            (
                "own_scorers:number",
                "expected a function 'number' in module 'own_scorers', received int",
            ),
            (":f", "received '': ValueError"),
        ],
    )
    def test_scorers_that_are_not_there(
        self, folder: Path, scorers: Any, name: str, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            build(section(folder, scorer=name), folder=folder).check()

    def test_a_module_that_cannot_be_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "broken_scorers.py").write_text("1 / 0")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(
            InputError, match="'broken_scorers': ZeroDivisionError: division by zero"
        ):
            find_scorer("broken_scorers:f", "here")

    def test_a_loss_is_minimised(self, folder: Path, model: Any, scorers: Any) -> None:
        evaluator = opened(
            section(folder, scorer="own_scorers:note", direction="minimize"), folder=folder
        )
        assert [(o.name, o.direction) for o in evaluator.objectives] == [("loss", "minimize")]
        assert evaluator.evaluate(candidate_at([1], model), "search").values["loss"] > 0


class TestChecks:
    def test_no_tokenizer(self, folder: Path) -> None:
        with pytest.raises(InputError, match=r"evaluators\.0\.tokenizer: required key is missing"):
            build(section(folder, tokenizer=None, chat_template=True), folder=folder).check()
        with pytest.raises(InputError, match=r"evaluators\.0\.tokenizer: required key is missing"):
            build(section(folder, tokenizer=None), folder=folder).check()

    def test_no_chat_template(self, folder: Path) -> None:
        with pytest.raises(
            InputError, match="expected a tokenizer with a chat template, found none"
        ):
            build(section(folder, chat_template=True), folder=folder).check()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"system_prompt": "x"}, "expected chat_template: true"),
            ({"scorer": "exactly"}, "expected module:function or one of"),
            ({"target": None}, "target: required key is missing"),
            ({"until": [""]}, "at least 1 character"),
        ],
    )
    def test_sections_that_do_not_fit(
        self, folder: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            build(section(folder, **options), folder=folder)

    def test_which_sections_run_code(self, folder: Path) -> None:
        from mergesearch.evaluators.spec.evaluators import parse_evaluators

        specs = parse_evaluators([section(folder), section(folder, scorer="a:b")])
        assert [spec.runs_code for spec in specs] == [False, True]  # type: ignore[union-attr]

    def test_sections_are_checked_without_torch(self, folder: Path) -> None:
        program = (
            "import sys\nfrom mergesearch.evaluators.spec.evaluators import parse_evaluators\n"
        )
        program += f"parse_evaluators([{section(folder)!r}])\n"
        program += "assert not {'torch', 'transformers'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True)


def test_cut() -> None:
    assert [cut("a b c", until) for until in ((), ("b",), ("c", "b"), ("x",), ("a",))] == [
        "a b c",
        "a ",
        "a ",
        "a b c",
        "",
    ]
