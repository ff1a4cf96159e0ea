"""Where the experts of a mixture lie in a checkpoint, and the checkpoint's shape with fewer.

Two layouts are known: one tensor for each projection of each expert (what transformers writes), and
stacks of all experts with gate and up projection in one (what it holds in memory, and some
checkpoints store).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import path_shown, shown

if TYPE_CHECKING:
    import torch

#: Kinds of model whose router is one matrix, and whose blocks all have the same number of experts.
MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
#: Keys of ``config.json`` that may hold the number of experts.
COUNT_KEYS = ("num_local_experts", "num_experts")
#: Key of ``config.json`` with the number of experts that a token uses.
USED_KEY = "num_experts_per_tok"
#: What transformers assumes where ``config.json`` lacks that key.
_USED = {"mixtral": 2, "qwen2_moe": 4}
_HOME = r"(?P<block>.*)\.(?P<home>mlp|block_sparse_moe)\.experts"
_ONE = re.compile(_HOME + r"\.(?P<index>\d+)\.(?P<word>w[123]|(?:gate|up|down)_proj)\.weight")
_STACK = re.compile(_HOME + r"\.gate_up_proj")
#: Words of gate, up and down projection.
_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One expert: ``down(act(gate x) · up x)``.

    Attributes:
        gate: ``(inner, width)``.
        up: ``(inner, width)``.
        down: ``(width, inner)``.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class MoeLayer:
    """The mixture of one block.

    Attributes:
        block: Name of the block, for example ``model.layers.0``.
        home: Name of the mixture in it.
        experts: Their number.
        words: Names of gate, up and down projection; none where they are stacked.
    """

    block: str
    home: str
    experts: int
    words: tuple[str, str, str] | None

    @property
    def router(self) -> str:
        """Name of the router's matrix ``(experts, width)``."""
        return f"{self.block}.{self.home}.gate.weight"

    @property
    def stacks(self) -> tuple[str, str]:
        """Names of the stacks of gate and up projections, and of down projections."""
        home = f"{self.block}.{self.home}.experts"
        return f"{home}.gate_up_proj", f"{home}.down_proj"

    def projections(self, expert: int) -> tuple[str, ...]:
        """Names of an expert's gate, up and down projection, where they are not stacked."""
        home = f"{self.block}.{self.home}.experts.{expert}"
        return tuple(f"{home}.{word}.weight" for word in self.words or ())

    def names(self, experts: int) -> tuple[str, ...]:
        """Names of all its tensors, if it had so many experts."""
        if self.words is None:
            return (self.router, *self.stacks)
        each = (name for expert in range(experts) for name in self.projections(expert))
        return (self.router, *each)


def moe_layers(checkpoint: Checkpoint) -> tuple[MoeLayer, ...]:
    """The mixtures of a checkpoint, in the order of its blocks.

    Raises:
        CheckpointError: If it has none, or is of a kind that is not known, or lacks tensors.
    """
    where = path_shown(checkpoint.path)
    kind = checkpoint.config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: expected a mixture of experts of type {', '.join(MODEL_TYPES)}, received "
            f"{shown(kind)}; other kinds have routers that cannot be made smaller in this way"
        )
    found: dict[str, MoeLayer] = {}
    for name in checkpoint.tensors:
        match = _ONE.fullmatch(name) or _STACK.fullmatch(name)
        if match is None or match["block"] in found:
            continue
        word = match.groupdict().get("word")
        words = next((words for words in _WORDS if word in words), None)
        found[match["block"]] = MoeLayer(
            match["block"], match["home"], expert_count(checkpoint), words
        )
    if not found:
        raise CheckpointError(f"{where}: expected blocks with experts, received none")
    for layer in found.values():
        _check_layer(checkpoint, layer)
    return tuple(found.values())


def expert_count(checkpoint: Checkpoint) -> int:
    """Number of experts of a block, as ``config.json`` has it.

    Raises:
        CheckpointError: If it does not say.
    """
    counts = {checkpoint.config[key] for key in COUNT_KEYS if key in checkpoint.config}
    count = counts.pop() if len(counts) == 1 else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise CheckpointError(
            f"{path_shown(checkpoint.path)}: config.json: expected the number of experts under "
            f"{' or '.join(COUNT_KEYS)}, received {shown(count)}"
        )
    return count


def used_count(checkpoint: Checkpoint) -> int:
    """Number of experts that a token uses.

    Raises:
        CheckpointError: If ``config.json`` has no such number.
    """
    kind = str(checkpoint.config.get("model_type"))
    used = checkpoint.config.get(USED_KEY, _USED.get(kind, 8))
    if not isinstance(used, int) or isinstance(used, bool) or used < 1:
        raise CheckpointError(
            f"{path_shown(checkpoint.path)}: config.json: {USED_KEY}: expected a whole number of "
            f"at least 1, received {shown(used)}"
        )
    return used


def _check_layer(checkpoint: Checkpoint, layer: MoeLayer) -> None:
    """Refuse a block that lacks tensors of its experts, or has them in other shapes."""
    tensors = checkpoint.tensors
    lacking = next((name for name in layer.names(layer.experts) if name not in tensors), None)
    where = path_shown(checkpoint.path)
    if lacking is not None:
        raise CheckpointError(
            f"{where}: expected {layer.experts} experts in {shown(layer.block)}, as config.json "
            f"says, found no {shown(lacking)}"
        )
    router = tensors[layer.router].shape
    inner = tensors[layer.names(1)[-1]].shape[-1]
    shapes = _shapes(layer, router[-1] if len(router) == 2 else 0, inner)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {shown(name)}: expected shape {shape}, received "
                f"{tensors[name].shape}"
            )
    if layer.projections(layer.experts) and layer.projections(layer.experts)[0] in tensors:
        raise CheckpointError(
            f"{where}: expected {layer.experts} experts in {shown(layer.block)}, as config.json "
            "says, found more"
        )


def _shapes(layer: MoeLayer, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    count = layer.experts
    shapes: dict[str, tuple[int, ...]] = {layer.router: (count, width)}
    if layer.words is None:
        gate_up, down = layer.stacks
        return shapes | {gate_up: (count, 2 * inner, width), down: (count, width, inner)}
    for expert in range(count):
        gate, up, down = layer.projections(expert)
        shapes |= {gate: (inner, width), up: (inner, width), down: (width, inner)}
    return shapes


def read_experts(checkpoint: Checkpoint, layer: MoeLayer) -> list[ExpertWeights]:
    """The experts of a block, in their stored dtype."""
    if layer.words is not None:
        names = map(layer.projections, range(layer.experts))
        return [ExpertWeights(*map(checkpoint.read, each)) for each in names]
    gate_up, down = map(checkpoint.read, layer.stacks)
    inner = gate_up.shape[1] // 2
    return [
        ExpertWeights(both[:inner], both[inner:], back)
        for both, back in zip(gate_up, down, strict=True)
    ]


def stored_tensors(
    layer: MoeLayer, experts: Sequence[ExpertWeights], router: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Name -> tensor of a block that has these experts."""
    import torch

    if layer.words is None:
        gate_up, down = layer.stacks
        both = [torch.cat((expert.gate, expert.up)) for expert in experts]
        backs = [expert.down for expert in experts]
        return {layer.router: router, gate_up: torch.stack(both), down: torch.stack(backs)}
    found = {layer.router: router}
    for index, expert in enumerate(experts):
        weights = (expert.gate, expert.up, expert.down)
        found |= zip(layer.projections(index), weights, strict=True)
    return found


def smaller_tensors(
    checkpoint: Checkpoint, layers: Sequence[MoeLayer], count: int
) -> dict[str, TensorInfo]:
    """What is stored where every block has ``count`` experts: name -> shape and dtype."""
    left = {name for layer in layers for name in layer.names(layer.experts)}
    kept = {name for layer in layers for name in layer.names(count)}
    by_expert = {layer.router for layer in layers}
    by_expert |= {name for layer in layers if layer.words is None for name in layer.stacks}
    return {
        name: _resized(info, count) if name in by_expert else info
        for name, info in checkpoint.tensors.items()
        if name in kept or name not in left
    }


def _resized(info: TensorInfo, count: int) -> TensorInfo:
    size = count * ITEMSIZE[info.dtype]
    for length in info.shape[1:]:
        size *= length
    return replace(info, shape=(count, *info.shape[1:]), stop=info.start + size)


def smaller_config(config: Mapping[str, Any], count: int, used: int) -> dict[str, Any]:
    """``config.json`` with another number of experts; a token uses ``used`` at most."""
    changed = {key: count for key in COUNT_KEYS if key in config}
    return {**config, **changed, USED_KEY: min(used, count)}
