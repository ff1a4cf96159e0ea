"""One forward pass of a model, from which the ties between axes of its tensors are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergesearch.merging.alignment.axes import fix, fresh, is_free
from mergesearch.merging.alignment.rules import (
    ALIKE,
    READS,
    RULES,
    Call,
    Dimensions,
    unknown,
    unrelated,
)

Place = tuple[int, int]


#: Stands for the result of an operation among places, beside those of its arguments.
RESULT = -1


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor of a forward pass.

    Attributes:
        number: Which one it is.
        dims: Its dimensions.
        weight: Name in the model, if it is a parameter or buffer.
    """

    number: int
    dims: Dimensions
    weight: str | None


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a forward pass.

    Attributes:
        number: Of the operation.
        name: As ATen calls it.
        arguments: Tensors that went in.
        result: The first tensor that came out.
    """

    number: int
    name: str
    arguments: tuple[Seen, ...]
    result: Seen


@dataclass(frozen=True, eq=False)
class Trace:
    """What a forward pass told.

    Attributes:
        weights: Name of a parameter or buffer in the model -> its dimensions.
        reads: Where activations are read (number of the operation, place of the argument) -> the
            dimensions of what is read there.
        odd: Operations without a rule that weights went into.
        steps: All operations in order.
    """

    weights: Mapping[str, Dimensions]
    reads: Mapping[Place, Dimensions]
    odd: frozenset[str]
    steps: tuple[Step, ...] = ()


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the dimensions of every tensor through a forward pass."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._known: dict[int, tuple[torch.Tensor, Dimensions]] = {}
        self._step = 0
        self.weights: dict[str, Dimensions] = {}
        self.reads: dict[Place, Dimensions] = {}
        self.odd: set[str] = set()
        self.steps: list[Step] = []

    def dims(self, tensor: torch.Tensor) -> Dimensions:
        """The dimensions of a tensor; those of constants and of inputs are fixed."""
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        name = self._names.get(id(tensor))
        dims = [fresh(size, fixed=name is None) for size in tensor.shape]
        if name is not None:
            self.weights[name] = dims
        self._set(tensor, dims)
        return dims

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        self._step += 1
        first = result[0] if isinstance(result, list | tuple) and result else result
        if not isinstance(first, torch.Tensor):
            self._follow_scalar(args)
            return result
        arguments = [*args, *(kwargs or {}).values()]
        call = Call(arguments, self.dims, tuple(first.shape))
        for place in READS.get(name, ()):
            if id(args[place]) not in self._names:
                self.reads[self._step, place] = self.dims(args[place])
        if name not in RULES and any(is_free(dims) for dims in call.tensors()):
            self.odd.add(name)
        dims = RULES.get(name, unknown)(call)
        given = tuple(self._seen(tensor) for tensor in call.given())
        self._set(first, dims)
        self.steps.append(Step(self._step, name, given, self._seen(first)))
        for other in result[1:] if isinstance(result, list | tuple) else ():
            if isinstance(other, torch.Tensor):
                alike = name in ALIKE and other.shape == first.shape
                self._set(other, dims if alike else unrelated(other.shape))
        return result

    def _seen(self, tensor: torch.Tensor) -> Seen:
        known = self._known.get(id(tensor))
        return Seen(id(tensor), [] if known is None else known[1], self._names.get(id(tensor)))

    def _follow_scalar(self, args: tuple[Any, ...]) -> None:
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                fix(self.dims(tensor))

    def _set(self, tensor: torch.Tensor, dims: Dimensions) -> None:
        # Kept alive, so that no other tensor gets its number.
        self._known[id(tensor)] = (tensor, dims)


class FeatureReader(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands over the activations that are read at chosen places of a forward pass."""

    def __init__(
        self, places: Iterable[Place], take: Callable[[Place, torch.Tensor], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = {step: [p for s, p in places if s == step] for step, _ in places}
        self._take = take
        self._step = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._step += 1
        places = self._places.get(self._step, ())
        for place in places:
            if place != RESULT:
                self._take((self._step, place), args[place])
        result = func(*args, **(kwargs or {}))
        if RESULT in places:
            first = result[0] if isinstance(result, list | tuple) else result
            self._take((self._step, RESULT), first)
        return result


def trace(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Trace:
    """Follow a forward pass; what the model answers keeps its order.

    Args:
        model: In evaluation mode.
        inputs: Its keyword arguments: a few items are enough.
    """
    held: dict[int, str] = {}
    for name, each in model.state_dict(keep_vars=True).items():
        held.setdefault(id(each), name)  # tied tensors go by their first name
    tracer = _Tracer(held)
    with torch.no_grad(), tracer:
        result = model(**inputs)
    for tensor in answers(result):
        fix(tracer.dims(tensor))
    return Trace(tracer.weights, tracer.reads, frozenset(tracer.odd), tuple(tracer.steps))


def answers(result: Any) -> list[torch.Tensor]:
    """The logits that a model answers with, or all that it gives where nothing is called so."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        named = {key: value for key, value in result.items() if "logits" in str(key)}
        return [each for value in (named or result).values() for each in answers(value)]
    if not isinstance(result, list | tuple):
        return []
    return [tensor for value in result for tensor in answers(value)]
