"""Measures a trial on lm_eval tasks, 500 documents of four choices, by harness and tiers."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.evaluators import Candidate
from mergesearch.evaluators.harness.evaluator import LmEval
from mergesearch.evaluators.harness.tasks import TaskOptions, quiet
from mergesearch.evaluators.objectives import Metric
from mergesearch.merging import Field, Recipe, Source

DOCUMENTS = 500
CHOICES = 4
CONTEXT = 48
ANSWER = 5
VOCABULARY = 2000
BATCH = 64
ROUNDS = 3
SPLITS = ("search", "validation", "test")


def measure() -> dict[str, Any]:
    """Seconds per trial on each way, and as multiples of the forward passes alone."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(folder)
        model = _model()
        rows = sorted(_token_rows(folder), key=len, reverse=True)
        seconds = best_seconds({**_ways(folder, model), "forward": lambda: _forward(model, rows)})
    own = {name: value / seconds["forward"] for name, value in seconds.items()}
    return {
        "documents": DOCUMENTS,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "of_forward": {name: round(value, 2) for name, value in own.items()},
    }


def best_seconds(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Wall seconds of the fastest call of each after one to warm up, calls taken in turn."""
    for run in ways.values():
        run()
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _ways(folder: Path, model: Any) -> dict[str, Callable[[], None]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        kept = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def simple(manager: Any = None) -> None:
        with quiet():
            manager = manager or TaskManager(include_path=str(folder / "tasks"))
            lm_eval.simple_evaluate(lm, tasks=["bench"], task_manager=manager, bootstrap_iters=0)

    def tier(name: Any, packed: bool) -> Callable[[], None]:
        evaluator = _evaluator(folder, name, packed)

        def run() -> None:
            evaluator.evaluate(_candidate(model), "test")

        return run

    return {
        "simple_evaluate": simple,
        "simple_evaluate, tasks kept": lambda: simple(kept),
        "tier two": tier("two", False),
        "tier one": tier("one", False),
        "tier one, packed": tier("one", True),
    }


def _evaluator(folder: Path, tier: Any, packed: bool) -> LmEval:
    evaluator = LmEval(
        [TaskOptions("bench", splits={split: split for split in SPLITS}, tier=tier)],  # type: ignore[misc]
        [Metric(metric="acc")],
        tokenizer=str(folder / "tokenizer"),
        include_path=folder / "tasks",
        batch_size=BATCH,
        packed=packed,
        where="bench",
    )
    evaluator.open()
    return evaluator


def _candidate(model: Any) -> Candidate:
    return Candidate(Recipe(Source("", ""), (), "task_arithmetic", Field.constant(1, [0.0])), model)


def _forward(model: Any, rows: list[list[int]]) -> None:
    """The model alone, with all logits, on the batches that the unpacked tier one makes."""
    import torch

    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            part = [torch.tensor(row) for row in rows[start : start + BATCH]]
            model(
                input_ids=torch.nn.utils.rnn.pad_sequence(part, batch_first=True), use_cache=False
            )


def _token_rows(folder: Path) -> list[list[int]]:
    rows = []
    for row in json.loads((folder / "documents.json").read_text()):
        rows += [[*row["context"], *choice[:-1]] for choice in row["choices"]]
    return rows


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _write(folder: Path) -> None:
    """Tokenizer of one token per word, documents, and a task file."""
    import yaml
    from datasets import Dataset, DatasetDict, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(0)
    disable_progress_bars()
    made = {}
    kept = []
    for split, count in zip(SPLITS, (4, 4, DOCUMENTS), strict=True):
        contexts = [
            generator.integers(2, VOCABULARY, generator.integers(CONTEXT // 2, CONTEXT))
            for _ in range(count)
        ]
        choices = [
            [generator.integers(2, VOCABULARY, ANSWER) for _ in range(CHOICES)]
            for _ in range(count)
        ]
        made[split] = Dataset.from_dict(
            {
                "question": [_text(context) for context in contexts],
                "choices": [[_text(choice) for choice in four] for four in choices],
                "answer": generator.integers(0, CHOICES, count).tolist(),
            }
        )
        kept = [
            {"context": context.tolist(), "choices": [choice.tolist() for choice in four]}
            for context, four in zip(contexts, choices, strict=True)
        ]
    DatasetDict(made).save_to_disk(str(folder / "data"))
    (folder / "documents.json").write_text(json.dumps(kept))
    files = {split: str(folder / "data" / split / "data-00000-of-00001.arrow") for split in SPLITS}
    task = {
        "task": "bench",
        "dataset_path": "arrow",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "bench.yaml").write_text(yaml.safe_dump(task))


def _text(tokens: Any) -> str:
    return " ".join(f"w{token}" for token in tokens)


def main() -> None:
    """Print seconds per trial, and their ratio to the forward passes alone."""
    figures = measure()
    print(
        f"lm_eval: {DOCUMENTS} documents x {CHOICES} choices, one thread, best of {ROUNDS}, "
        "seconds per trial"
    )
    for name, value in figures["seconds"].items():
        print(
            f"  {name:<28} {value:7.3f} s   {figures['of_forward'][name]:5.2f}x the forward passes "
            "alone"
        )
    print(json.dumps({"language": figures}))


if __name__ == "__main__":
    main()
