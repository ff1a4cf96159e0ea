"""A tokenizer, small language models and lm_eval tasks in local files for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import pico_llama, save

WORDS = (
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "the",
    "a",
    "old",
    "new",
    "and",
    "under",
)
SPLITS = ("search", "validation", "test")


def make_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of some 300 tokens, saved in ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [" ".join(sentence(np.random.default_rng(n))) for n in range(50)], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=64,
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def sentence(rng: np.random.Generator, count: int = 6) -> list[str]:
    """Random words."""
    return [WORDS[index] for index in rng.integers(len(WORDS), size=count)]


def text_llama(seed: int = 0, **options: Any) -> Any:
    """A pico Llama for that tokenizer."""
    return pico_llama(seed, vocab_size=300, max_position_embeddings=64, **options)


def documents(count: int, seed: int) -> dict[str, list[Any]]:
    """Questions with four choices of different lengths, and a text."""
    rng = np.random.default_rng([seed, 7])
    rows = [sentence(rng, int(rng.integers(3, 9))) for _ in range(count)]
    return {
        "prompt": [" ".join(row) + f" {seed}{index}" for index, row in enumerate(rows)],
        "choices": [[" ".join(sentence(rng, n)) for n in (1, 2, 3, 2)] for _ in range(count)],
        "answer": rng.integers(0, 4, count).tolist(),
        "target": [" ".join(sentence(rng, 2)) for _ in range(count)],
        "text": [
            " ".join(sentence(rng, int(rng.integers(20, 60)))) + f" {seed}{n}" for n in range(count)
        ],
    }


def make_tasks(folder: Path, count: int = 12) -> Path:
    """Write data and task files of every output type below ``folder``.

    Returns:
        The folder of the task files.
    """
    import yaml

    data = save(
        folder / "documents", {name: documents(count, seed) for seed, name in enumerate(SPLITS)}
    )
    files = {name: str(data / name / "data-00000-of-00001.arrow") for name in SPLITS}
    shared = {
        "dataset_path": "arrow",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    tasks: dict[str, dict[str, Any]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
        },
        "continue": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": " {{target}}",
            "metric_list": [{"metric": name} for name in ("perplexity", "acc")],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}:",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        },
    }
    where = folder / "tasks"
    where.mkdir()
    for name, own in tasks.items():
        (where / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | shared | own))
    (where / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["choose", "write"]}))
    return where


def by_split() -> dict[str, str]:
    """Splits of the tasks' dataset by role."""
    return {name: name for name in SPLITS}


def lm_section(folder: Path, *tasks: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """An ``lm_eval`` section on tasks of :func:`make_tasks`, each with the dataset's own splits."""
    listed = [
        {"splits": by_split()} | ({"task": task} if isinstance(task, str) else task)
        for task in tasks
    ]
    paths = {"include_path": str(folder / "tasks"), "tokenizer": str(folder / "tokenizer")}
    return {"kind": "lm_eval", "tasks": listed, "batch_size": 5} | paths | options
