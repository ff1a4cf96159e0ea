"""How long 124M parameters with four experts prepare, in CPU seconds of one thread.

``python -m experiments.bench.preparation [OPERATOR ...]`` times spectral operators with precise and
with fast decompositions, tensor by tensor in turns, and data operators beside the passes of the
model that they make; all of it takes seven minutes. Tensors are those of GPT-2, of whose twelve
blocks one is measured. "products" are the matrix products that the precise formula counts, at the
rate of this machine's; no eigenvectors are in them. "difference" is the largest of a row, relative
to it.

Experts are tuned (noise, under twenty larger singular values) or adapted (rank 16 in blocks;
embeddings, which do not change, are left out).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergesearch.merging.family.effort import MATRIX_WORK, Work
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.base import Basis
from mergesearch.merging.operators.parts.matrices import Selection, matrices_in

EXPERTS = 4
RANK = 16
SPECTRAL = ("tsv", "iso_c", "wudi", "knots")
DATA = ("regmean", "fisher")
BLOCKS = 12

#: GPT-2's tensors with two dimensions: shape, and how many there are.
EMBEDDINGS: Mapping[str, tuple[int, int]] = {
    "wte.weight": (50257, 768),
    "wpe.weight": (1024, 768),
}
BLOCK: Mapping[str, tuple[int, int]] = {
    "h.0.attn.c_attn.weight": (768, 2304),
    "h.0.attn.c_proj.weight": (768, 768),
    "h.0.mlp.c_fc.weight": (768, 3072),
    "h.0.mlp.c_proj.weight": (3072, 768),
}


@dataclass(frozen=True)
class Row:
    """One line of the table of spectral operators, in CPU seconds of the whole model.

    Attributes:
        operator: Its name.
        experts: ``tuned`` or ``adapted``.
        precise: Seconds with precise decompositions.
        fast: Seconds with fast ones.
        products: Seconds of the precise formula's matrix products alone.
        difference: The largest of a row.
    """

    operator: str
    experts: str
    precise: float
    fast: float
    products: float
    difference: float


def tuned(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A change with twenty singular values above those of noise."""
    m, n = shape
    noise = torch.randn(shape, generator=generator) / max(shape) ** 0.5
    left = torch.randn((m, 20), generator=generator) / m**0.5
    right = torch.randn((20, n), generator=generator) / n**0.5
    strengths: torch.Tensor = 20 / torch.arange(1.0, 21.0)
    change: torch.Tensor = 1e-3 * (noise + left * strengths @ right)
    return change


def adapted(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A change of low rank."""
    left = 1e-4 * torch.randn((shape[0], RANK), generator=generator)
    return left @ torch.randn((RANK, shape[1]), generator=generator)


MAKERS: Mapping[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "tuned": tuned,
    "adapted": adapted,
}


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def product_rate(dtype: torch.dtype) -> float:
    """Operations of a matrix product in a CPU second of one thread; the median of a few."""
    matrix = torch.randn((1536, 1536), generator=torch.Generator().manual_seed(0)).to(dtype)
    times = [cpu_seconds(lambda: matrix @ matrix)[0] for _ in range(6)]
    return 2.0 * len(matrix) ** 3 / statistics.median(times[1:])


def spectral_row(operator: str, kind: str, rates: tuple[float, float]) -> Row:
    """Both ways of decomposing, on one block and the embeddings, reckoned up to the model."""
    shapes = dict(BLOCK) if kind == "adapted" else {**EMBEDDINGS, **BLOCK}
    precise = fast = products = difference = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        count = BLOCKS if name in BLOCK else 1
        generators = [torch.Generator().manual_seed(100 * k + number) for k in range(EXPERTS)]
        deltas = [MAKERS[kind](shape, generator) for generator in generators]
        bases = [prepared(operator, way, name, deltas) for way in ("precise", "fast")]
        seconds, expected = cpu_seconds(partial(bases[0].rows, name))
        less, rows = cpu_seconds(partial(bases[1].rows, name))
        precise += count * seconds
        fast += count * less
        products += count * product_seconds(operator, name, rates)
        errors = (
            float((row - one).norm() / one.norm().clamp_min(1e-30))
            for row, one in zip(rows, expected, strict=True)
        )
        difference = max(difference, *errors)
    return Row(operator, kind, precise, fast, products, difference)


def prepared(operator: str, way: str, name: str, deltas: Sequence[torch.Tensor]) -> Basis:
    """The basis of a family in which all but one tensor are only shapes.

    The names of all say how its matrices lie.
    """
    shapes = {**EMBEDDINGS, **BLOCK}
    states = [{key: torch.empty(shape, device="meta") for key, shape in shapes.items()}]
    states[0][name] = torch.zeros_like(deltas[0])
    states += [{**states[0], name: delta} for delta in deltas]
    base, *experts = [MappingSource(str(k), state, list(shapes)) for k, state in enumerate(states)]
    chosen = OPERATORS[operator]
    return chosen.prepare(base, experts, **chosen.complete({"decompositions": way}))


def product_seconds(operator: str, name: str, rates: tuple[float, float]) -> float:
    """Matrix products of the precise formula on one tensor, at rates in fp32 and fp64."""
    shapes = {**EMBEDDINGS, **BLOCK}
    options = {key: one.default for key, one in OPERATORS[operator].hyperparameters.items()}
    selection = Selection.of(shapes, matrices=options["matrices"])
    parts = matrices_in(name, shapes[name], selection)
    work = sum((MATRIX_WORK[operator](part.shape, EXPERTS, options) for part in parts), Work())
    return work.multiply / rates[0] + work.multiply_wide / rates[1]


def data_times(operator: str, repeats: int) -> float:
    """Time of one more batch in an operator, over that of the model's pass over it alone.

    The model has three blocks of GPT-2 and a quarter of its vocabulary, the batch 8 x 128 tokens.
    RegMean is compared with forward passes, Fisher with forward and backward passes item by item.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    size = 50257 // 4
    config = GPT2Config(n_layer=3, vocab_size=size, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, size, (8, 128))}
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    base, expert = (MappingSource(name, state, list(state)) for name in ("base", "expert"))
    options = {"labels": "sampled"} if operator == "fisher" else {}

    def prepare(batches: int) -> Basis:
        calibration = Calibration(model, {"expert": [batch] * batches})
        return OPERATORS[operator].prepare(base, [expert], calibration=calibration, **options)

    def both_ways() -> None:
        for item in batch["input_ids"]:
            scores = model(input_ids=item[None]).logits.log_softmax(-1)
            torch.autograd.grad(scores.sum(), list(model.parameters()))

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    alone = both_ways if operator == "fisher" else forward
    alone()
    times = []
    for _ in range(repeats):
        once, _ = cpu_seconds(lambda: prepare(1))
        thrice, _ = cpu_seconds(lambda: prepare(3))
        passes = [cpu_seconds(alone)[0] for _ in range(2)]
        times.append((thrice - once) / sum(passes))
    return statistics.median(times)


def main(operators: Sequence[str] = (*SPECTRAL, *DATA)) -> None:
    """Print both tables, and their figures as JSON."""
    torch.set_num_threads(1)
    rates = product_rate(torch.float32), product_rate(torch.float64)
    print(f"products: {rates[0] / 1e9:.0f} GFLOP/s in fp32, {rates[1] / 1e9:.0f} in fp64")
    print("operator experts   precise s   fast s   times   products s   difference")
    figures: dict[str, float] = {}
    for operator in (name for name in operators if name in SPECTRAL):
        for kind in MAKERS:
            row = spectral_row(operator, kind, rates)
            figures[f"{operator} {kind}"] = row.precise / row.fast
            print(
                f"{operator:<8} {kind:<9} {row.precise:9.1f} {row.fast:8.1f} "
                f"{row.precise / row.fast:7.1f} {row.products:12.1f}   {row.difference:10.1e}",
                flush=True,
            )
    for operator in (name for name in operators if name in DATA):
        figures[operator] = data_times(operator, 3 if operator == "regmean" else 1)
        against = "forward and backward" if operator == "fisher" else "forward"
        print(f"{operator:<8} {figures[operator]:.2f} times its {against} passes", flush=True)
    print(json.dumps({"preparation": {name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main(sys.argv[1:] or (*SPECTRAL, *DATA))
