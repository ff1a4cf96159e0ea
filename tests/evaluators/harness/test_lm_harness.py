"""Both tiers of the lm_eval evaluator against the harness itself, document by document."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mergesearch.evaluators import Candidate
from mergesearch.evaluators.harness.rows import Options, Request
from mergesearch.evaluators.harness.scoring import can_pack, score_requests
from mergesearch.evaluators.harness.tasks import load_split
from mergesearch.evaluators.items import resamples
from mergesearch.merging import InputError, MergesearchError
from tests.evaluators.items import candidate_at, opened
from tests.evaluators.language import by_split, lm_section, make_tasks, make_tokenizer, text_llama

KINDS = {
    "choose": ("acc", "acc_norm"),
    "continue": ("perplexity", "acc"),
    "read": ("word_perplexity",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    make_tokenizer(
        folder / "tokenizer",
        chat_template="{% for m in messages %}[{{m.role}}] {{m.content}}\n{% endfor %}",
    )
    make_tasks(folder)
    return folder


def measured(
    folder: Path,
    model: Any,
    *tasks: Any,
    split: Any = "search",
    items: int | None = None,
    **options: Any,
):
    return opened(lm_section(folder, *tasks, **options)).evaluate(
        candidate_at([0.1], model), split, items
    )


def by_harness(folder: Path, model: Any, task: str, **options: Any) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` says of the search documents, with its own overheads."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    lm = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        batch_size=5,
        softmax_dtype=torch.float32,
    )
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    spec = {"group": "all", "task": [{"task": task, "test_split": "search"}]}
    with pytest.MonkeyPatch.context() as patch:
        # It lists the packages of the environment by processes of its own, which nobody reads.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return lm_eval.simple_evaluate(
            lm, tasks=[spec], task_manager=manager, bootstrap_iters=0, **options
        )


def models(kind: str) -> Any:
    import torch

    tied = not kind.startswith("untied")
    model = text_llama(3, tie_word_embeddings=tied)
    return model.to(torch.bfloat16) if kind.endswith("bf16") else model


class TestTiers:
    @pytest.mark.parametrize("task", KINDS)
    @pytest.mark.parametrize(
        ("kind", "padding"),
        [
            ("tied", "right"),
            ("untied bf16", "left"),
            *(
                pytest.param(kind, padding, marks=pytest.mark.slow)
                for kind, padding in (
                    ("tied", "left"),
                    ("untied", "right"),
                    ("untied", "left"),
                    ("tied bf16", "right"),
                    ("tied bf16", "left"),
                    ("untied bf16", "right"),
                )
            ),
        ],
    )
    def test_one_equals_two_and_the_harness_item_by_item(
        self, folder: Path, task: str, padding: str, kind: str
    ) -> None:
        model = models(kind)
        metrics = KINDS[task]
        objectives = [{"metric": metric} for metric in metrics]
        plain = by_harness(folder, model, task)
        for tier in ("one", "two"):
            for packed in (False, "auto"):
                result = measured(
                    folder,
                    model,
                    {"task": task, "tier": tier},
                    objectives=objectives,
                    padding=padding,
                    packed=packed,
                )
                for metric in metrics:
                    expected = plain["results"][task][f"{metric},none"]
                    assert result.values[metric] == pytest.approx(
                        expected, rel=5e-4 if kind.endswith("bf16") else 1e-4
                    )
                    items = [sample[metric] for sample in plain["samples"][task]]
                    self.check_items(
                        metric,
                        result.items[metric],
                        items,
                        rtol=1e-4 if kind.endswith("bf16") else 0,
                    )

    @staticmethod
    def check_items(metric: str, ours: np.ndarray, theirs: list[Any], rtol: float) -> None:
        """Compare item scores, those of texts relatively.

        Texts of a thousand nats in bf16 differ by the padding of their batch.
        """
        if metric == "word_perplexity":
            theirs = [-value / words for value, words in theirs]
        elif metric == "perplexity":
            theirs = [-value for value in theirs]
        np.testing.assert_allclose(
            ours,
            np.array(theirs, float),
            rtol=rtol if metric == "word_perplexity" else 0,
            atol=1e-4,
        )

    @pytest.mark.parametrize("options", [{"num_fewshot": 2}, {"num_fewshot": 1, "fewshot_seed": 5}])
    def test_examples_before_the_question(self, folder: Path, options: dict[str, Any]) -> None:
        model = text_llama(3)
        plain = by_harness(
            folder,
            model,
            "choose",
            num_fewshot=options["num_fewshot"],
            fewshot_random_seed=options.get("fewshot_seed", 1234),
        )
        for tier in ("one", "two"):
            result = measured(folder, model, {"task": "choose", "tier": tier} | options)
            assert result.items["acc"].tolist() == [
                sample["acc"] for sample in plain["samples"]["choose"]
            ]

    def test_held_out_perplexities_are_known_on_resamples_of_documents(self, folder: Path) -> None:
        result = measured(
            folder,
            text_llama(3),
            "continue",
            split="test",
            objectives=[{"metric": "perplexity"}, {"metric": "acc"}],
        )
        nats = result.items["perplexity"]
        drawn = resamples("continue", len(nats))
        expected = [np.exp(nats[rows].mean()) for rows in drawn]
        np.testing.assert_allclose(result.resampled["perplexity"], expected, rtol=1e-6)
        assert set(result.resampled) == {"perplexity"}

    def test_chat_template_and_system_prompt(self, folder: Path) -> None:
        model = text_llama(3)
        plain = by_harness(
            folder, model, "continue", apply_chat_template=True, system_instruction="Be brief."
        )
        for tier in ("one", "two"):
            result = measured(
                folder,
                model,
                {"task": "continue", "tier": tier},
                apply_chat_template=True,
                system_prompt="Be brief.",
            )
            assert result.values["perplexity"] == pytest.approx(
                plain["results"]["continue"]["perplexity,none"], rel=1e-4
            )

    def test_generation(self, folder: Path) -> None:
        model = text_llama(3)
        plain = by_harness(folder, model, "write")
        result = [
            measured(folder, model, {"task": "write", "tier": tier}) for tier in ("one", "two")
        ]
        for one in result:
            assert one.items["exact_match"].tolist() == [
                s["exact_match"] for s in plain["samples"]["write"]
            ]

    def test_generation_arguments_pass_through(self, folder: Path) -> None:
        evaluator = opened(lm_section(folder, {"task": "write", "gen_kwargs": {"max_gen_toks": 1}}))
        evaluator.evaluate(candidate_at([0.1], text_llama(3)), "search")
        instances = evaluator._scorer.frozen["search"].tasks[0].instances
        assert all(len(one.resps[0].split()) <= 1 for group in instances for one in group)


class TestFrozenRequests:
    def test_requests_are_built_once_in_a_worker(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lm_eval.api.task import ConfigurableTask

        calls: list[str] = []
        build = ConfigurableTask.build_all_requests

        def counted(self: Any, **options: Any) -> None:
            calls.append(self.task_name)
            build(self, **options)

        monkeypatch.setattr(ConfigurableTask, "build_all_requests", counted)
        evaluator = opened(
            lm_section(folder, "choose", "read", objectives=[{"domains": ["choose"]}])
        )
        for seed in range(4):
            evaluator.evaluate(
                candidate_at([0.1], text_llama(seed)), "search", 6 if seed % 2 else None
            )
        assert calls == ["choose", "read"]

    def test_a_part_is_scored_as_the_whole(self, folder: Path) -> None:
        model = text_llama(3)
        whole = measured(folder, model, "choose", "continue", objectives=[{"metric": "acc"}])
        part = measured(
            folder, model, "choose", "continue", objectives=[{"metric": "acc"}], items=8
        )
        np.testing.assert_array_equal(
            part.items["acc"], whole.items["acc"][part.item_indices["acc"]]
        )
        assert part.values["acc"] == pytest.approx(part.weights["acc"] @ part.items["acc"])

    def test_more_items_of_one_candidate_are_not_scored_again(
        self, folder: Path, monkeypatch: Any
    ) -> None:
        from mergesearch.evaluators.harness import frozen

        sizes: list[int] = []
        score = frozen.score_requests

        def counted(model: Any, requests: Any, *others: Any) -> Any:
            sizes.append(len(requests))
            return score(model, requests, *others)

        monkeypatch.setattr(frozen, "score_requests", counted)
        evaluator = opened(lm_section(folder, "choose", packed=False))
        candidate = candidate_at([0.1], text_llama(3))
        for items in (3, 7, None):
            evaluator.evaluate(candidate, "search", items)
        assert sizes == [12, 16, 20]


class TestScoring:
    requests = tuple(
        Request(tuple(range(3, 3 + context)), tuple(range(20 + first, 20 + first + length)))
        for context in (1, 4, 9)
        for first, length in ((0, 1), (5, 3), (5, 4), (9, 2), (0, 1))
    )

    def naive(self, model: Any) -> list[tuple[float, bool]]:
        import torch

        answers = []
        for request in self.requests:
            ids = torch.tensor([[*request.context, *request.continuation]])
            with torch.inference_mode():
                chances = (
                    model(ids).logits[0, :-1].log_softmax(dim=-1)[-len(request.continuation) :]
                )
            wanted = torch.tensor(request.continuation)
            answers.append(
                (
                    float(chances.gather(1, wanted[:, None]).sum()),
                    bool((chances.argmax(1) == wanted).all()),
                )
            )
        return answers

    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_agrees_with_one_forward_pass_for_each(
        self, padding: Any, packed: bool, batch_size: int
    ) -> None:
        model = text_llama(1)
        result = score_requests(model, self.requests, Options(batch_size, 64, packed, padding))
        for (ours, right), (theirs, wanted) in zip(result, self.naive(model), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
            assert right == wanted

    @pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2", "Gemma2", "Mistral"])
    def test_packs_where_the_model_allows_and_scores_right_everywhere(self, family: str) -> None:
        model = small_model(family)
        options = Options(4, 64)
        packed = can_pack(model, self.requests, options)
        assert packed or family == "Gemma2"
        result = score_requests(model, self.requests, Options(4, 64, packed))
        for (ours, _), (theirs, _) in zip(result, self.naive(model), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
            (KeyError("a fault of ours"), True),
            (RuntimeError("The size of tensor a (3) must match that of b (4)"), False),
            (TypeError("forward() got an unexpected keyword argument"), False),
        ],
    )
    def test_only_a_refusal_of_masks_says_that_a_model_cannot_pack(
        self, error: Exception, raised: bool
    ) -> None:
        model = text_llama(1)
        refuse_masks(model, error)
        if not raised:
            assert not can_pack(model, self.requests, Options(4, 64))
            return
        with pytest.raises(type(error)) as caught:
            can_pack(model, self.requests, Options(4, 64))
        assert caught.value is error

    def test_the_beginning_of_long_contexts_goes(self) -> None:
        model = text_llama(1)
        long = Request(tuple(3 + n % 250 for n in range(90)), (5, 6))
        kept = Request(long.context[-(64 - 1) :], (5, 6))
        one, two = (
            score_requests(model, [request], Options(2, 64))[0][0] for request in (long, kept)
        )
        assert one == pytest.approx(two, abs=1e-6)

    def test_continuations_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(InputError, match="at most 4 tokens, received one of 5"):
            score_requests(text_llama(1), [Request((3,), (4, 5, 6, 7, 8))], Options(2, 4))


def refuse_masks(model: Any, error: Exception, rows: int = 0) -> None:
    """Let a model raise an error at masks of ours, which have four dimensions, of more rows."""

    def check(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        if mask is not None and mask.ndim == 4 and len(mask) > rows:
            raise error

    model.model.register_forward_pre_hook(check, with_kwargs=True)


def test_memory_that_runs_out_while_packing_is_tried_halves_the_batch(folder: Path) -> None:
    """Packing is tried again with the smaller batch, and found to fit."""
    model = text_llama(1)
    evaluator = opened(lm_section(folder, "choose", batch_size=4))
    refuse_masks(model, torch.OutOfMemoryError("CUDA out of memory"), rows=2)
    candidate = candidate_at([0.1], model)
    with pytest.raises(torch.OutOfMemoryError):
        evaluator.evaluate(candidate, "search")
    assert evaluator.halve_batch() == 2
    scores = evaluator.evaluate(candidate, "search").values
    plain = measured(folder, text_llama(1), "choose", batch_size=4).values
    assert dict(scores) == pytest.approx(dict(plain), abs=1e-5)


def small_model(family: str) -> Any:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")
    sizes: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "GPT2":
        sizes = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
    else:
        sizes |= {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "initializer_range": 0.5,
        }
        sizes |= {"head_dim": 8} if family == "Gemma2" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(**sizes)).eval()


class TestSplits:
    def test_documents_are_divided_by_what_they_say(self, folder: Path) -> None:
        section = lm_section(folder, {"task": "choose", "splits": None, "divide": [0.4, 0.3, 0.3]})
        evaluator = opened(section)
        sizes = [evaluator.size(split) for split in ("search", "validation", "test")]
        assert sum(sizes) == 12
        assert all(sizes)

    def test_listed_documents_and_limits(self, folder: Path) -> None:
        samples = {"search": [5, 1], "validation": [0], "test": [2, 3, 4]}
        evaluator = opened(
            lm_section(folder, {"task": "choose", "splits": None, "samples": samples})
        )
        assert [evaluator.size(split) for split in ("search", "validation", "test")] == [2, 1, 3]
        limited = opened(
            lm_section(folder, {"task": "choose", "limit": {"search": 7}}), folder=folder
        )
        assert [limited.size(split) for split in ("search", "validation", "test")] == [7, 12, 12]

    def test_groups_are_their_tasks(self, folder: Path) -> None:
        result = measured(
            folder, text_llama(3), "both", objectives=[{"name": "all"}, {"domains": ["choose"]}]
        )
        assert set(result.values) == {"all", "acc[choose]"}
        assert set(result.means) == {"score/choose", "score/write", "acc/choose"}

    def test_directions_are_the_tasks_own(self, folder: Path) -> None:
        evaluator = opened(
            lm_section(
                folder, "choose", "read", objectives=[{"domains": [n]} for n in ("choose", "read")]
            )
        )
        assert [(o.name, o.direction) for o in evaluator.objectives] == [
            ("acc[choose]", "maximize"),
            ("word_perplexity[read]", "minimize"),
        ]
        assert evaluator.additive == ("acc[choose]",)


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "unknown task": (
        lambda f: lm_section(f, "chose"),
        r"expected a task .* received 'chose'; did you mean .*'choose'",
    ),
    "no such metric": (
        lambda f: lm_section(f, {"task": "choose", "metric": "f1"}),
        r"metric: choose: expected one of \['acc', 'acc_norm'\], received 'f1'",
    ),
    "no such filter": (
        lambda f: lm_section(f, {"task": "choose", "filter": "strict"}),
        r"filter: choose: expected one of \['none'\], received 'strict'",
    ),
    "mixed directions": (
        lambda f: lm_section(f, "choose", "read"),
        "all maximised or all minimised",
    ),
    "unknown domain": (
        lambda f: lm_section(f, "choose", objectives=[{"domains": ["sort"]}]),
        r"domains among the tasks \['choose'\], received 'sort'",
    ),
    "shared items": (
        lambda f: lm_section(f, {"task": "choose", "splits": by_split() | {"test": "search"}}),
        "expected disjoint splits, received 12 documents in both search and test",
    ),
    "public benchmark": (
        lambda f: lm_section(f, {"task": "hellaswag"}),
        "no public benchmark as a target of the search, received 'hellaswag'",
    ),
    "no such split": (
        lambda f: lm_section(f, {"task": "choose", "splits": by_split() | {"search": "training"}}),
        "choose: expected a task that loads",
    ),
    "no documents": (
        lambda f: lm_section(
            f,
            {
                "task": "choose",
                "splits": None,
                "samples": {"search": [], "validation": [1], "test": [2]},
            },
        ),
        "expected documents in the search split, received none of 12",
    ),
    "no tokenizer": (lambda f: lm_section(f, "choose", tokenizer=str(f / "tasks")), "tokenizer"),
    "no tasks there": (lambda f: lm_section(f, "choose", include_path=str(f / "none")), "found no"),
}


class TestBadInput:
    @pytest.mark.parametrize(
        "case",
        [  # an unknown task is looked for among all that the harness has
            pytest.param(case, marks=pytest.mark.slow if case == "unknown task" else [])
            for case in BAD
        ],
    )
    def test_is_refused_in_one_line(self, folder: Path, case: str) -> None:
        make, message = BAD[case]
        with pytest.raises(InputError, match=message) as raised:
            opened(make(folder))
        assert "\n" not in str(raised.value)

    def test_broken_task_files_are_named(self, folder: Path, tmp_path: Path) -> None:
        tasks = make_tasks(tmp_path)
        (tasks / "bad.yaml").write_text("task: [unclosed\n")
        with pytest.raises(InputError, match=re.escape(f"{tasks / 'bad.yaml'}: expected YAML")):
            opened(lm_section(tmp_path, "choose", tokenizer=str(folder / "tokenizer")))

    def test_templates_reach_no_code(self, folder: Path, tmp_path: Path) -> None:
        """The harness's own environment renders this one, and writes the file."""
        tasks = make_tasks(tmp_path)
        written = tmp_path / "written"
        template = (
            "{{ lipsum.__globals__['os'].__dict__['mknod']('" + str(written) + "') }}{{prompt}}:"
        )
        task = yaml.safe_load((tasks / "choose.yaml").read_text())
        (tasks / "choose.yaml").write_text(yaml.safe_dump(task | {"doc_to_text": template}))
        section = lm_section(tmp_path, "choose", tokenizer=str(folder / "tokenizer"))
        with pytest.raises(InputError, match="choose: expected"):
            opened(section)
        assert not written.exists()

    def test_documents_that_cannot_be_scored_are_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evaluator = opened(lm_section(folder, "choose"))

        def fails(doc: Any, results: Any) -> Any:
            raise ZeroDivisionError("no")

        task = load_split(evaluator._tasks.options[0], str(folder / "tasks"), "search", "x")[0].task
        monkeypatch.setattr(task, "process_results", fails)
        for source in evaluator._tasks.by_split["search"]:
            monkeypatch.setattr(source.task, "process_results", fails)
        with pytest.raises(
            MergesearchError,
            match=r"choose: expected scores of document [0-9a-f]{16}, .*ZeroDivision",
        ):
            evaluator.evaluate(Candidate(candidate_at([0.1]).recipe, text_llama(3)), "search")
