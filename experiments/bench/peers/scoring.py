"""The evaluator of every tool: the mean loss of a language model on the same made-up tokens.

Nothing but torch is imported, so that each environment runs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

SEQUENCES = 4
LENGTH = 16
VOCABULARY = 1000


def items() -> torch.Tensor:
    """Tokens ``(sequences, length)``, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


def score(model: Any) -> dict[str, float]:
    """The mean loss of the next token, in nats.

    A line of JSON goes to the file that ``BENCH_SCORES`` names: the loss, seconds since the process
    began and CPU seconds of the process, and how many of both the evaluation took.
    """
    start = time.perf_counter()
    cpu = time.process_time()
    tokens = items()
    with torch.inference_mode():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    line = {
        "loss": loss,
        "seconds": time.time() - psutil.Process().create_time(),
        "cpu": time.process_time(),
        "evaluate": time.perf_counter() - start,
        "evaluate_cpu": time.process_time() - cpu,
    }
    with open(os.environ["BENCH_SCORES"], "a", encoding="utf-8") as scores:
        scores.write(json.dumps(line) + "\n")
    return {"loss": loss}


def run_trials(setting: Mapping[str, Any], trial: Callable[[list[float]], Any]) -> None:
    """Run the trials of a peer.

    Args:
        setting: What ``experiments.bench.peers`` wrote for the program.
        trial: Makes the merged model of a point, one coefficient for each expert.
    """
    for point in setting["points"]:
        score(trial(point))


def setting_of(arguments: list[str]) -> dict[str, Any]:
    """The setting that the first argument names; torch has its number of threads."""
    setting: dict[str, Any] = json.loads(Path(arguments[1]).read_text())
    torch.set_num_threads(setting["threads"])
    return setting


def load(folder: str) -> Any:
    """A model of transformers, ready to be scored."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


if __name__ == "__main__":
    sys.exit("scoring: expected to be imported by the programs beside it")
