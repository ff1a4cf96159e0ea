"""Matrices of a merge rounded to a number of bits for each layer.

The rounding is half-quadratic quantisation as the package hqq has it (Badri and Shaji 2023): groups
of a row share a scale and a zero, which are fitted to the weights without any items. What is kept
are the rounded values in the model's own dtype, so that evaluation and export see the same numbers;
the codes themselves are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mergesearch.merging.errors import InputError
from mergesearch.merging.tensors.layout import FLOATING, Layout
from mergesearch.merging.tensors.parallel import parallel_map
from mergesearch.merging.tensors.roles import TensorRole, block_axes, roles_of

if TYPE_CHECKING:
    import torch

#: Numbers of bits that hqq rounds to.
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
#: Elements of a row that share a scale; the first that divides the row, else the whole row.
GROUPS = (64, 32, 16)
#: Modules inside blocks whose tensors keep their dtype.
_LEFT_OUT = frozenset({"norm", "embedding", "modulation"})

#: Name of a tensor -> bits, sorted pairs, as recipes have them.
Bits = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class BitLayer:
    """Matrices of one block, which share a number of bits.

    Attributes:
        name: Label in tables, such as ``block 3``, after the tower where there are several.
        tensors: Names of the matrices.
        size: Their elements together.
    """

    name: str
    tensors: tuple[str, ...]
    size: int


def bit_layers(layout: Layout) -> tuple[BitLayer, ...]:
    """The blocks of a model with the matrices that are rounded, in the order of depth.

    These are all tensors of blocks with two axes or more but tables of embeddings; embeddings,
    heads and all else outside the blocks keep their dtype.

    Raises:
        InputError: If no block is recognised.
    """
    roles = roles_of(layout.names)
    several = len(block_axes(roles.values())) > 1
    found: dict[tuple[str, int], list[str]] = {}
    for spec in layout.tensors:
        role = roles[spec.name]
        matrix = len(spec.shape) > 1 and spec.size > 0 and spec.dtype in FLOATING
        if role.block is not None and matrix and role.module not in _LEFT_OUT:
            found.setdefault((role.tower, role.block), []).append(spec.name)
    if not found:
        raise InputError(
            "space.bits: expected numbered blocks with matrices, received "
            f"{len(layout.names)} tensors without any, such as {layout.names[0]!r}; leave bits out"
        )
    return tuple(
        BitLayer(
            _label(roles[found[key][0]], several=several),
            tuple(found[key]),
            sum(layout.by_name[name].size for name in found[key]),
        )
        for key in sorted(found)
    )


def _label(role: TensorRole, *, several: bool) -> str:
    return f"{role.tower} block {role.block_name}" if several else f"block {role.block_name}"


def check_hqq() -> None:
    """Refuse to round where hqq is missing.

    Raises:
        InputError: If it is not installed.
    """
    if find_spec("hqq") is None:
        raise InputError(
            "bits: expected the package hqq, which rounds to them, found none; install "
            "mergesearch[bits]"
        )


def at_bits(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """A tensor with the values that it has after rounding to ``bits``, in its own dtype and place.

    It is rounded in main memory, whatever its device, so that all devices agree. Values that are
    not finite stay that way.

    Args:
        tensor: With two axes or more. Rows lie along the last axis of fused experts ``(experts,
            outputs, inputs)``, else along all axes but the first.
        bits: One of :data:`WIDTHS`.
    """
    import torch
    from hqq.core.quantize import Quantizer

    rows = tensor.detach().to("cpu", torch.float32)
    columns = rows.shape[-1] if rows.ndim == 3 else rows.numel() // max(len(rows), 1)
    group = next((size for size in GROUPS if columns % size == 0), columns)
    codes, fitted = Quantizer.quantize(
        rows.reshape(-1, columns),
        nbits=bits,
        group_size=group,
        axis=1,
        bitpack=False,
        device="cpu",
    )
    fitted["compute_dtype"] = torch.float32
    values: torch.Tensor = Quantizer.dequantize(codes, fitted)
    return values.reshape(tensor.shape).to(tensor.device, tensor.dtype)


def rounded_tensors(
    bits: Bits, read: Callable[[str], torch.Tensor], threads: int = 1
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and rounded values of all tensors that bits are given for.

    hqq ends its fit when a mean over the matrix stops falling, so each matrix is rounded on one
    thread, for the same bits whatever the number of threads.

    Args:
        bits: What to round.
        read: Gives the tensor of a name.
        threads: Tensors that are rounded at once.
    """

    def rounded(pair: tuple[str, int]) -> tuple[str, torch.Tensor]:
        return pair[0], at_bits(read(pair[0]), pair[1])

    return parallel_map(rounded, bits, threads) if bits else iter(())


def mean_bits(layers: Sequence[BitLayer], widths: Mapping[str, int]) -> float:
    """Bits of an element of the matrices in the mean; scales and zeros are not counted.

    Args:
        layers: All layers.
        widths: Tensor -> its bits.
    """
    total = sum(layer.size for layer in layers)
    return sum(layer.size * widths[layer.tensors[0]] for layer in layers) / total
