"""Gram matrices of the inputs of stacked experts, which are no linear layers of their own.

transformers holds the experts of a mixture as one parameter ``(experts, out, in)``, or ``(experts,
in, out)``, and multiplies the tokens that are routed to an expert by its matrix. These products are
watched while items are run: each matrix gets the Gram matrix of its own tokens. Padding is not told
apart there, as tokens have lost their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.merging.operators.parts.gram import Grams, LinearWeight, regressed
from mergesearch.merging.tensors.memo import Tensors
from mergesearch.merging.tensors.per_tensor import Pieces
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.expert_runner import ExpertRunner
    from mergesearch.merging.models.parameter_views import ParameterView
    from mergesearch.merging.tensors.source import TensorSource

#: What names of experts' tensors have, stored and in memory.
_EXPERTS = ".experts."


@dataclass(frozen=True)
class StackWeight:
    """A stored tensor that is a stack of experts' matrices, or (part of) the matrix of one.

    Attributes:
        parameter: Name of the stack in the model.
        members: The experts that it has matrices of.
        stacked: Whether it is stored as a stack.
    """

    parameter: str
    members: range
    stacked: bool


def may_have_stacks(source: TensorSource) -> bool:
    """Whether a model of these tensors may hold experts as stacks."""
    return any(_EXPERTS in name for name in source.names)


def stack_weights(model: nn.Module, views: Mapping[str, ParameterView]) -> dict[str, StackWeight]:
    """Stored name -> its place in a stack, for every tensor that is one or lies in one."""
    held = {name: p for name, p in model.named_parameters() if p.ndim == 3 and _EXPERTS in name}
    found: dict[str, StackWeight] = {}
    for stored, view in views.items():
        if view.parameter in held:
            place = _place(view, held[view.parameter])
            found |= {} if place is None else {stored: place}
    return found


def _place(view: ParameterView, stack: torch.Tensor) -> StackWeight | None:
    """Where a stored tensor lies in a stack; None if it is no matrix of it as it is held."""
    stride = tuple(stack.stride())
    if view.shape == tuple(stack.shape) and view.stride == stride:
        return StackWeight(view.parameter, range(len(stack)), stacked=True)
    if len(view.shape) == 2 and view.stride == stride[1:]:
        member = view.offset // stride[0]
        return StackWeight(view.parameter, range(member, member + 1), stacked=False)
    return None


class StackGrams:
    """Gram matrices of the members of stacks, collected over batches.

    Attributes:
        grams: By parameter and member.
        inputs: Parameter -> dimension of its matrices that runs over their inputs.
    """

    def __init__(self) -> None:
        self.grams = Grams()
        self.inputs: dict[str, int] = {}

    @contextmanager
    def collecting(self, model: nn.Module, weights: Mapping[str, StackWeight]) -> Iterator[None]:
        """Add the inputs of the stacks while the context is open."""
        names = {weight.parameter for weight in weights.values()}
        stacks = {name: p for name, p in model.named_parameters() if name in names}
        if not stacks:
            yield
            return
        switch = getattr(model, "set_experts_implementation", None)
        if switch is not None:
            switch("eager")  # one product for each expert, with its matrix as it is held
        with _watch(stacks, self):
            yield

    def add(self, parameter: str, member: int, vectors: torch.Tensor, inputs: int) -> None:
        """Add the inputs of one product."""
        self.inputs[parameter] = inputs
        flat = vectors.detach().reshape(-1, vectors.shape[-1])
        self.grams.add(_key(parameter, member), flat)

    def mean(self, weight: StackWeight, shape: Sequence[int]) -> Tensors:
        """Member and kind -> its Gram matrix; nothing for members that no token was routed to.

        Args:
            weight: The stored tensor.
            shape: Its shape.
        """
        inputs = self.inputs.get(weight.parameter)
        found: dict[str, torch.Tensor] = {}
        for member in weight.members if inputs is not None else ():
            layer = LinearWeight(_key(weight.parameter, member), int(inputs or 0))
            for kind, gram in self.grams.mean(layer).items():
                if len(gram) == shape[-2:][layer.inputs]:  # else it has some of the inputs only
                    found[kind if not weight.stacked else f"{member} {kind}"] = gram
        return found


def collected_grams(
    runner: ExpertRunner,
    weights: Mapping[str, LinearWeight],
    stacks: Mapping[str, StackWeight],
    runs: Iterable[tuple[Mapping[str, torch.Tensor], Callable[[], object]]],
) -> Pieces:
    """Stored name -> its Gram matrices, with the weights that the model now holds.

    Args:
        runner: Holds the model.
        weights: Stored tensors that are weights of linear layers.
        stacks: Stored tensors that are stacks of matrices.
        runs: Inputs of the model, which tell what is padding, and what runs the layers on them.
    """
    import torch

    layers = {
        weight.module: runner.model.get_submodule(weight.module) for weight in weights.values()
    }
    collected = Grams()
    stacked = StackGrams()
    with torch.no_grad(), stacked.collecting(runner.model, stacks):
        for inputs, run in runs:
            with collected.collecting(layers, inputs):
                run()
    for name, weight in weights.items():
        yield name, collected.mean(weight)
    for name, stack in stacks.items():
        yield name, stacked.mean(stack, runner.base.shape(name))


def regressed_members(
    deltas: Sequence[torch.Tensor],
    grams: Sequence[Tensors],
    reduce: float,
    place: Place = HOST,
) -> list[torch.Tensor]:
    """The rows of :func:`regressed`, for each matrix of a stack ``(members, ..., ...)``."""
    rows = [delta / len(deltas) for delta in deltas]
    for member in range(len(deltas[0])):
        own = [_of_member(tensors, member) for tensors in grams]
        if any(own):
            solved = regressed([delta[member] for delta in deltas], own, reduce, place)
            for row, part in zip(rows, solved, strict=True):
                row[member] = part
    return rows


def _of_member(tensors: Tensors, member: int) -> Tensors:
    prefix = f"{member} "
    return {k.removeprefix(prefix): gram for k, gram in tensors.items() if k.startswith(prefix)}


def _key(parameter: str, member: int) -> str:
    return f"{parameter}[{member}]"


def _watch(stacks: Mapping[str, torch.Tensor], grams: StackGrams) -> Any:
    """A torch function mode that adds the inputs of products with a member of a stack."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    #: Product -> dimension of its second factor that runs over inputs.
    products = {
        functional.linear: 1,
        torch.matmul: 0,
        torch.Tensor.matmul: 0,
        torch.Tensor.__matmul__: 0,
    }

    def member_of(weight: torch.Tensor) -> tuple[str, int] | None:
        for name, stack in stacks.items():
            offset = weight.data_ptr() - stack.data_ptr()
            if weight.shape == stack.shape[1:] and 0 <= offset < stack.nbytes:
                return name, offset // (stack.stride(0) * stack.itemsize)
        return None

    class Watch(TorchFunctionMode):
        """Looks at products, and leaves all functions as they are."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in products and len(args) > 1:
                found = member_of(args[1])
                if found is not None:
                    grams.add(*found, args[0], products[func])
            return func(*args, **(kwargs or {}))

    return Watch()
