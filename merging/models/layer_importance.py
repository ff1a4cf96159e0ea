"""How much layers matter, measured without labels.

The two measures of Dumitru 2024, "Layer-Wise Quantization: A Pragmatic and Effective Method for
Quantizing LLMs Beyond Integer Bit-Levels" (sec. 3), and two of Csordas 2025, "Do Language Models
Use Depth Efficiently?" (sec. 3): what a block adds to the residual stream, and what the model loses
without it. Greater numbers mean layers that matter more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.models.blocks import Chain, block_chains
from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec
from mergesearch.merging.models.layer_bits import BitLayer
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.expert_runner import ExpertRunner

Floats = npt.NDArray[np.float64]


def mean_importance(
    base: TensorSource,
    experts: Sequence[TensorSource],
    layers: Sequence[BitLayer],
    calibration: CalibrationSpec | None,
) -> Floats:
    """How much each layer matters in the mean over the experts: LIM with items, ZD without.

    Kept in the memo of the base, if it has one.

    Args:
        base: The base.
        experts: The experts; each runs on its own items.
        layers: Their layers.
        calibration: Items, for LIM.

    Returns:
        fp64 ``(layers,)``.
    """
    import torch

    from mergesearch.merging.models.expert_runner import ExpertRunner

    names = [expert.name for expert in experts]
    key: list[Any] | None = ["z-score importance"]
    measure = partial(z_score_importance, layers=layers)
    if calibration is not None:
        runner = ExpertRunner(cast("CalibrationSpec", {**DEFAULTS, **calibration}), base, experts)
        key = runner.key(["input modification", names], names)
        measure = partial(input_modification, runner, layers=layers)
    assert key is not None

    def compute() -> dict[str, torch.Tensor]:
        measured = [measure(expert) for expert in experts]
        return {"importance": torch.from_numpy(np.mean(measured, axis=0))}

    return remembered((base, *experts), key, compute)["importance"].numpy()


def z_score_importance(source: TensorSource, layers: Sequence[BitLayer]) -> Floats:
    """ZD, the share of a layer's weights that lie far above their mean, negated: ``(layers,)``.

    A weight counts if its z-score, (w − mean) / std over the layer, is above 1; layers in which
    few do matter more.
    """
    return np.array([-_far_above(source, layer.tensors) for layer in layers])


def _far_above(source: TensorSource, names: Iterable[str]) -> float:
    import torch

    flat = torch.cat([source.read(name).detach().reshape(-1).double() for name in names])
    deviation = flat.std(correction=0)
    if not float(deviation) > 0:
        return 0.0
    return float(((flat - flat.mean()) / deviation > 1).double().mean())


@dataclass(frozen=True)
class Passing:
    """What one block did to the vectors that passed through it, summed over them.

    Attributes:
        cosine: Cosines between its input and its output.
        relative: Norms of what it added, as shares of the norm of its input.
        count: Number of vectors.
    """

    cosine: float = 0.0
    relative: float = 0.0
    count: int = 0


def input_modification(
    runner: ExpertRunner, expert: TensorSource, layers: Sequence[BitLayer]
) -> Floats:
    """LIM, how much each layer of an expert changes the hidden states: ``(layers,)``.

    It is minus the cosine of a block's input and output, in the mean over tokens of an expert's
    items (eq. 1).

    Raises:
        CheckpointError: If a layer is no residual block of the model.
    """
    runner.load_all(expert)
    blocks = blocks_of(runner, layers)
    passed = run_through(
        runner.model, blocks, lambda: [runner.run(items) for items in runner.items(expert.name)]
    )
    return np.array([-each.cosine / max(each.count, 1) for each in passed])


def blocks_of(runner: ExpertRunner, layers: Sequence[BitLayer]) -> tuple[str, ...]:
    """Names of the modules that layers are.

    Raises:
        CheckpointError: If one is none.
    """
    blocks = [name for chain in block_chains(runner.model) for name in chain.blocks]
    found = []
    for layer in layers:
        inside = runner.views[layer.tensors[0]].parameter
        block = next((name for name in blocks if inside.startswith(f"{name}.")), None)
        if block is None:
            raise CheckpointError(
                f"space.bits.prior: expected {layer.name} to be a residual block of "
                f"{type(runner.model).__name__}, found none around {inside!r}; choose prior zd"
            )
        found.append(block)
    return tuple(found)


def run_through(
    model: nn.Module, blocks: Sequence[str], run: Callable[[], Any]
) -> tuple[Passing, ...]:
    """What each block does in ``run``.

    Raises:
        CheckpointError: If a block's output has another shape than its input.
    """
    import torch

    passed = dict.fromkeys(blocks, Passing())

    def after(
        name: str, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        hidden = output[0] if isinstance(output, tuple | list) else output
        passed[name] = _added(passed[name], name, before, hidden)

    with ExitStack() as hooks, torch.no_grad():
        for name in blocks:
            hook = model.get_submodule(name).register_forward_hook(
                partial(after, name), with_kwargs=True
            )
            hooks.callback(hook.remove)
        run()
    return tuple(passed[name] for name in blocks)


def _added(sums: Passing, name: str, before: torch.Tensor, after: torch.Tensor) -> Passing:
    """Sums with the vectors of one more batch ``(..., n)``."""
    from torch.nn.functional import cosine_similarity

    if before.shape != after.shape:
        raise CheckpointError(
            f"space.bits.prior: expected block {name} to keep the shape of its input "
            f"{list(before.shape)}, received {list(after.shape)}; choose prior zd"
        )
    old = before.detach().double().reshape(-1, before.shape[-1])
    new = after.detach().double().reshape(-1, after.shape[-1])
    relative = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)
    return Passing(
        sums.cosine + float(cosine_similarity(old, new, dim=-1).sum()),
        sums.relative + float(relative.sum()),
        sums.count + len(old),
    )


def skip_changes(model: nn.Module, chain: Chain, answer: Callable[[], torch.Tensor]) -> Floats:
    """How much the answers change without each block, as shares of their own size: ``(blocks,)``.

    Args:
        model: The model.
        chain: Its blocks, which keep the shape of what passes.
        answer: Runs the model; gives its logits.
    """
    import torch

    def passed_by(_block: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    with torch.no_grad():
        whole = answer().double()
        changes = []
        for name in chain.blocks:
            hook = model.get_submodule(name).register_forward_hook(passed_by, with_kwargs=True)
            try:
                changes.append(float((answer().double() - whole).norm() / whole.norm()))
            finally:
                hook.remove()
    return np.array(changes)
