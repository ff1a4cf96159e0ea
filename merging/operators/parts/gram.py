"""Gram matrices of the inputs of linear layers, and the regression that RegMean solves with them.

For inputs x of a layer, G = mean of x xᵀ. Experts W_k are merged into the W whose outputs are
nearest to those of all experts, W = (Σ_k W_k G_k)(Σ_k G_k)⁻¹ (Jin 2023, "Dataless knowledge fusion
by merging weights of language models", Eq. 3); in task vectors, each expert contributes
τ_k G_k (Σ_j G_j)⁻¹.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.models.expert_runner import unpadded
from mergesearch.merging.operators.parts.decomposition import is_large
from mergesearch.merging.tensors.memo import Tensors
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.parameter_views import ParameterView

#: Added to the diagonals of all Gram matrices together, relative to the mean diagonal of their sum.
RIDGE = 1e-6

#: Gram matrices of so many inputs are worked out by half, so many rows at a time: 0.67 of the time
#: for 3072 inputs.
HALVED_FROM = 768
HALVED_STEP = 256

#: The hyperparameter of operators that solve with Gram matrices.
Reduce = Annotated[
    float, Field(ge=0, le=1, description="Factor on off-diagonal elements of Gram matrices.")
]


@dataclass(frozen=True)
class LinearWeight:
    """A stored tensor that is the weight of a linear layer, or some of its outputs.

    Attributes:
        module: Name of the layer in the model.
        inputs: Dimension of the tensor that runs over the layer's inputs.
    """

    module: str
    inputs: int


def linear_weights(model: nn.Module, views: Mapping[str, ParameterView]) -> dict[str, LinearWeight]:
    """Stored name -> its linear layer, for every tensor that is a weight of one.

    Linear layers are ``nn.Linear`` and ``Conv1D`` of transformers, which is stored transposed. A
    weight that other modules share (a head tied to the embedding) is no regression of one layer,
    and left out.
    """
    layers = _linear_layers(model)
    weights = {}
    for stored, view in views.items():
        if view.parameter in layers:
            layer, weight = layers[view.parameter]
            if _has_all_inputs(view, weight, layer.inputs):
                weights[stored] = layer
    return weights


def _linear_layers(model: nn.Module) -> dict[str, tuple[LinearWeight, torch.Tensor]]:
    """Name of a parameter -> the linear layer that alone owns it, and its weight."""
    from torch import nn

    owners: dict[int, int] = {}
    layers: dict[str, tuple[LinearWeight, torch.Tensor]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        inputs = (
            1 if isinstance(module, nn.Linear) else 0 if type(module).__name__ == "Conv1D" else None
        )
        weight = getattr(module, "weight", None)
        if inputs is not None and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            layers[f"{name}.weight" if name else "weight"] = (LinearWeight(name, inputs), weight)
    return {
        parameter: (layer, weight)
        for parameter, (layer, weight) in layers.items()
        if owners[id(weight)] == 1
    }


def _has_all_inputs(view: ParameterView, weight: torch.Tensor, inputs: int) -> bool:
    return (
        len(view.shape) == 2
        and view.shape[inputs] == weight.shape[inputs]
        and view.stride == tuple(weight.stride())
    )


class Grams:
    """Gram matrices of layers, collected over batches.

    Attributes:
        sums: Layer -> Σ x xᵀ ``(inputs, inputs)``.
        counts: Layer -> number of inputs summed.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def collecting(
        self, layers: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """Add the inputs of the layers while the context is open.

        Args:
            layers: Name -> layer.
            inputs: Inputs of the model, which tell what is padding.
        """
        last = _LastInput()

        def add(
            name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> None:
            given = args[0] if args else kwargs["input"]
            gram = last.remembered(given)
            if gram is None:
                gram = SummedGram.of(unpadded(given.detach(), inputs))
                last.remember(given, gram)
            self.add_gram(name, gram)

        with ExitStack() as hooks:
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(partial(add, name), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def mean(self, weight: LinearWeight) -> Tensors:
        """The Gram matrix of a layer's inputs, in main memory; nothing for a layer that never ran.

        Raises:
            CheckpointError: If an input was not finite.
        """
        if not self.counts.get(weight.module):
            return {}
        mean = self.sums[weight.module] / self.counts[weight.module]
        if not bool(mean.isfinite().all()):
            raise CheckpointError(
                f"calibration: expected finite inputs of layer {weight.module!r}, received NaN or "
                "infinity; check the experts and the calibration items"
            )
        return {_kind(weight.inputs): mean.cpu()}

    def add(self, name: str, vectors: torch.Tensor) -> None:
        """Add inputs ``(vectors, inputs)`` of a layer."""
        self.add_gram(name, SummedGram.of(vectors))

    def add_gram(self, name: str, gram: SummedGram) -> None:
        """Add what was made of some inputs of a layer."""
        if name in self.sums:
            self.sums[name] += gram.products
        else:
            self.sums[name] = gram.products.clone()
        self.counts[name] = self.counts.get(name, 0) + gram.count


@dataclass(frozen=True, eq=False)
class SummedGram:
    """Σ x xᵀ over some inputs.

    Attributes:
        products: ``(inputs, inputs)``, in fp32 or wider.
        count: Number of inputs.
    """

    products: torch.Tensor
    count: int

    @classmethod
    def of(cls, vectors: torch.Tensor) -> SummedGram:
        """That of ``(vectors, inputs)``."""
        import torch

        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return cls(squared(wide), len(vectors))


def squared(wide: torch.Tensor) -> torch.Tensor:
    """``Xᵀ X`` of ``(vectors, inputs)``, of which large ones are worked out by half.

    The other half is the mirror image. In main memory that has the bits of the whole product:
    blocks are all of one size, so that the library sums the elements of each in the same order.
    """
    size = wide.shape[1]
    if wide.device.type != "cpu" or size < HALVED_FROM or size % HALVED_STEP:
        return wide.T @ wide
    result = wide.new_empty((size, size))
    for first in range(0, size, HALVED_STEP):
        stop = first + HALVED_STEP
        lower = wide[:, first:stop].T @ wide[:, :stop]
        result[first:stop, :stop] = lower
        result[:first, first:stop] = lower[:, :first].T
    return result


class _LastInput:
    """The last input of a layer with its Gram matrix: query, key and value layers share one."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, int, SummedGram] | None = None

    def remembered(self, given: torch.Tensor) -> SummedGram | None:
        """The Gram matrix, if this is the last input and was not written to since."""
        if self._last is None:
            return None
        tensor, version, gram = self._last
        return gram if tensor is given and version == _version(given) else None

    def remember(self, given: torch.Tensor, gram: SummedGram) -> None:
        """Keep the Gram matrix of an input."""
        version = _version(given)
        self._last = None if version is None else (given, version, gram)


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to, None where that is not counted."""
    return None if tensor.is_inference() else int(tensor._version)


def _kind(inputs: int) -> str:
    """Name under which the Gram matrix of the inputs in that dimension is kept."""
    return f"gram_of_dim_{inputs}"


def regressed(
    deltas: Sequence[torch.Tensor],
    grams: Sequence[Tensors],
    reduce: float,
    place: Place = HOST,
) -> list[torch.Tensor]:
    """``τ_k G_k (Σ_j G_j)⁻¹`` for each expert, or ``τ_k / K`` where none has a Gram matrix.

    A large matrix is solved at ``place`` if it fits; rows are where the task vectors are.

    Args:
        deltas: Task vectors of one tensor.
        grams: For each expert the Gram matrix as :meth:`Grams.mean` gives it; an expert without one
            weighs nothing.
        reduce: Factor on the off-diagonal elements.
        place: Where large matrices are worked on.
    """
    kinds = {kind for tensors in grams for kind in tensors}
    if not kinds:
        return [delta / len(deltas) for delta in deltas]
    (kind,) = kinds
    if kind == _kind(0):
        return [
            row.T.contiguous()
            for row in _solved([delta.T for delta in deltas], kind, grams, reduce, place)
        ]
    return _solved(deltas, kind, grams, reduce, place)


def _solved(
    deltas: Sequence[torch.Tensor],
    kind: str,
    grams: Sequence[Tensors],
    reduce: float,
    place: Place,
) -> list[torch.Tensor]:
    """Rows for matrices ``(outputs, inputs)``."""
    # Four matrices of Gram matrices' size, one task vector and its products, all in fp64.
    needed = 8 * (4 * deltas[0].shape[1] ** 2 + 4 * deltas[0].numel())
    if not is_large(deltas[0]) or not place.fits(needed):
        return _solved_on(deltas[0].device, deltas, kind, grams, reduce)
    with place.turn:
        return _solved_on(place.device_of(deltas[0]), deltas, kind, grams, reduce)


def _solved_on(
    device: torch.device,
    deltas: Sequence[torch.Tensor],
    kind: str,
    grams: Sequence[Tensors],
    reduce: float,
) -> list[torch.Tensor]:
    """Rows for matrices ``(outputs, inputs)``, worked out on a device.

    In fp64, because Gram matrices are often close to singular.
    """
    import torch

    size = deltas[0].shape[1]
    total = torch.zeros(size, size, dtype=torch.float64, device=device)
    for tensors in grams:
        if kind in tensors:
            total += _reduced(tensors[kind].to(device), reduce)
    factor, ridge = _factor(total, len(deltas))
    rows = []
    for delta, tensors in zip(deltas, grams, strict=True):
        wide = delta.to(device, torch.float64)
        right = ridge * wide  # τ_k (G_k + ridge · I)
        if kind in tensors:
            right += wide @ _reduced(tensors[kind].to(device), reduce)
        # X Σ_j (G_j + ridge · I) = τ_k (G_k + ridge · I)
        row = torch.cholesky_solve(right.T, factor).T.to(delta.device, delta.dtype)
        rows.append(row.contiguous())
    return rows


def _reduced(gram: torch.Tensor, reduce: float) -> torch.Tensor:
    """The Gram matrix in fp64, its off-diagonal elements times ``reduce``."""
    wide = gram.double() * reduce
    wide.diagonal().copy_(gram.diagonal())
    return wide


def _factor(total: torch.Tensor, experts: int) -> tuple[torch.Tensor, float]:
    """Cholesky factor of ``total`` + ``experts`` · ridge · I, and the ridge.

    The ridge belongs to each expert's own Gram matrix: inputs that no item reaches are averaged,
    instead of falling back to the base, and copies of one expert still give that expert.
    """
    import torch

    mean = float(total.diagonal().mean())
    ridge = (RIDGE * mean if mean > 0 else 1.0) / experts
    identity = torch.eye(len(total), dtype=total.dtype, device=total.device)
    while True:
        factor, info = torch.linalg.cholesky_ex(total + experts * ridge * identity)
        if not int(info):
            return factor, ridge
        # rounding of fp32 sums can leave negative eigenvalues; they are far below the diagonal
        ridge *= 10
