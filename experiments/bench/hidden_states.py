"""What a trial costs while only upper blocks move, with and without hidden states that are kept.

``python -m experiments.bench.hidden_states`` prints a table and, as its last line, the same figures
as JSON: a language model and a ViT of twelve blocks with random weights, two experts, and one
coefficient for each block and expert. Two workers run the same trials, one keeps hidden states;
they take turns, every ratio is of two CPU times of one round, and the median counts. Their scores
must be the same.

With ``--studies`` it compares whole studies instead, on the zoo of digits: one objective, 300
trials, ``quadratic`` and ``block_coordinate``, which begins with the same trials.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.strategies.block_coordinate import coordinate_depths
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker

BLOCKS = 12
ITEMS = 64
ROUNDS = 5
SIDE = 32
#: Lowest block that moves, of twelve: the last quarter, the last half, all but the first quarter.
LOWEST = (9, 6, 3)
#: Memory for hidden states, more than enough.
LIMIT = 10**9
#: The studies that are compared, and after how many trials.
DIGITS = Path(__file__).parents[1] / "0001-digits" / "study.yaml"
STUDY = (
    "budget.trials=300",
    "workers.count=null",
    "workers.backend=inline",
    'evaluators.0.objectives=[{"metric":"cross_entropy","name":"nats"}]',
)
SEEDS = (0, 1)
SO_FAR = (75, 150, 200, 250, 300)


@dataclass(frozen=True)
class Figures:
    """Trials of one model that move its blocks from some block on; medians over the rounds.

    Attributes:
        model: Which.
        lowest: Lowest block that moves.
        seconds: CPU seconds of a trial that keeps nothing.
        ratio: CPU time of a trial that skips the blocks below over that time.
        recording: The same of the trial that records.
        expected: Share of the blocks that run.
        megabytes: Of hidden states.
    """

    model: str
    lowest: int
    seconds: float
    ratio: float
    recording: float
    expected: float
    megabytes: float


def main(arguments: Sequence[str] = ()) -> None:
    """Print the table, then the figures as JSON; or compare studies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", action="store_true", help="compare whole studies")
    if parser.parse_args(arguments).studies:
        compare_studies()
        return
    print("hidden states: CPU time of a trial that moves upper blocks, over that of a whole one\n")
    print("model  moves from block  s a trial  skipping  recording  blocks that run  MB kept")
    figures = []
    for name, write in (("text", _write_texts), ("vit", _write_pictures)):
        with tempfile.TemporaryDirectory() as scratch:
            for row in measured(name, write, Path(scratch)):
                figures.append(asdict(row))
                print(
                    f"{row.model:<6} {row.lowest:>16} {row.seconds:>10.2f} {row.ratio:>9.2f} "
                    f"{row.recording:>10.2f} {row.expected:>16.2f} {row.megabytes:>8.1f}",
                    flush=True,
                )
    print(json.dumps(figures))


def measured(name: str, write: Callable[[Path], dict[str, Any]], folder: Path) -> Iterator[Figures]:
    """The figures of one model.

    Args:
        name: Of the model.
        write: Writes base, experts and items, and returns the evaluator's section.
        folder: Where they go.
    """
    data = {
        "name": name,
        "base": str(folder / "base"),
        "experts": {expert: str(folder / expert) for expert in ("left", "right")},
        "space": {"granularity": "block"},
        "evaluators": [write(folder)],
        "budget": {"trials": 10},
    }
    plan = plan_study(resolve(validate(data, "study.yaml"), folder))
    evaluators = tuple(one.model_dump(mode="json") for one in plan.spec.evaluators)
    spec = WorkerSpec(plan.template, evaluators, str(folder / "arenas"))
    plain = Worker(spec)
    keeping = Worker(replace(spec, hidden_states=LIMIT))
    rng = np.random.default_rng(0)
    _run(plain, _tasks(plan, LOWEST[0], 1, rng)[0])
    for lowest in LOWEST:
        yield _figures(name, plan, (plain, keeping), lowest, rng)


def _figures(
    name: str, plan: Plan, workers: tuple[Worker, Worker], lowest: int, rng: np.random.Generator
) -> Figures:
    plain, keeping = workers
    assert keeping._lower is not None
    keeping._lower.store.clear()
    first, second, *others = _tasks(plan, lowest, ROUNDS + 2, rng)
    _run(keeping, first)
    recording = _run(keeping, second)[0] / _run(plain, second)[0]
    rounds = []
    for task in others:
        whole, expected = _run(plain, task)
        skipping, received = _run(keeping, task)
        assert expected.measurement is not None, expected.failure
        assert received.measurement is not None, received.failure
        for objective, items in expected.measurement.items.items():
            assert np.array_equal(items, received.measurement.items[objective])
        rounds.append((whole, skipping / whole))
    return Figures(
        name,
        lowest,
        statistics.median(whole for whole, _ in rounds),
        statistics.median(ratio for _, ratio in rounds),
        recording,
        (BLOCKS - lowest) / BLOCKS,
        keeping._lower.store.size / 1e6,
    )


def _tasks(plan: Plan, lowest: int, count: int, rng: np.random.Generator) -> list[Task]:
    """Trials with random coefficients from a block on, and the same ones below it."""
    depths = coordinate_depths(plan.space, plan.space.lower.size)
    moves = depths >= lowest / (BLOCKS - 1) - 1e-9
    below = rng.uniform(0.1, 0.9, moves.size)
    points = [np.where(moves, rng.uniform(0.1, 0.9, moves.size), below) for _ in range(count)]
    return [Task(str(n), plan.space.decode(point), "search") for n, point in enumerate(points)]


def _run(worker: Worker, task: Task) -> tuple[float, Outcome]:
    """CPU seconds of a trial, and its outcome."""
    began = time.process_time()
    outcome = worker.run(task)
    return time.process_time() - began, outcome


def _write_models(folder: Path, build: Callable[[], Any]) -> None:
    """A base and two experts near it, without the bars of the libraries that write them."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(folder / "base")
        for name in ("left", "right"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape))
            model.save_pretrained(folder / name)


def _write_texts(folder: Path) -> dict[str, Any]:
    """A Llama of twelve blocks, and texts of some 60 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.evaluators.items import save
    from tests.evaluators.language import make_tokenizer, sentence

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    _write_models(folder, lambda: LlamaForCausalLM(config))
    for name in ("base", "left", "right"):
        make_tokenizer(folder / name)
    splits = {}
    for seed, split in enumerate(("search", "validation", "test")):
        rng = np.random.default_rng(seed)
        texts = [" ".join([*sentence(rng, 60), f"{seed}-{n}"]) for n in range(ITEMS)]
        splits[split] = {"text": texts}
    save(folder / "texts", splits)
    return {"kind": "perplexity", "data": str(folder / "texts"), "batch_size": 16}


def _write_pictures(folder: Path) -> dict[str, Any]:
    """A ViT of twelve blocks, and pictures of 64 patches."""
    from datasets import Dataset, DatasetDict
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=BLOCKS,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    _write_models(folder, lambda: ViTForImageClassification(config))
    rng = np.random.default_rng(0)
    splits = {split: _pictures(rng, split) for split in ("search", "validation", "test")}
    made = {split: Dataset.from_dict(columns) for split, columns in splits.items()}
    DatasetDict(made).save_to_disk(folder / "pictures")
    return {
        "kind": "classification",
        "data": str(folder / "pictures"),
        "id": "id",
        "batch_size": 16,
    }


def _pictures(rng: np.random.Generator, split: str) -> dict[str, Sequence[Any]]:
    return {
        "pixels": rng.random((ITEMS, SIDE, SIDE)).astype("float32").tolist(),
        "label": rng.integers(0, 4, ITEMS).tolist(),
        "id": [f"{split}-{n}" for n in range(ITEMS)],
    }


def compare_studies() -> None:
    """Print the lowest loss so far of studies of either strategy, and their CPU time."""
    print("digits, nats per item, 36 coefficients, one worker in one process\n")
    print("seed strategy          CPU s   best after " + " ".join(f"{n:>6}" for n in SO_FAR))
    for seed in SEEDS:
        for strategy in ("quadratic", "block_coordinate"):
            settings = (*STUDY, f"strategy.name={strategy}", f"seed={seed}")
            began = time.process_time()
            with tempfile.TemporaryDirectory() as scratch:
                run = run_study(load_study(DIGITS, settings), Path(scratch) / "run")
            seconds = time.process_time() - began
            losses = [r.values["nats"] for r in run.log.records if r.state == "complete"]
            best = " ".join(f"{min(losses[:count]):.4f}" for count in SO_FAR)
            print(f"{seed:>4} {strategy:<17} {seconds:>5.1f}              {best}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
