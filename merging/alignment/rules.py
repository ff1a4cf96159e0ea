"""What each operation of a model does to the axes of its tensors: one rule for each of ATen's.

An operation without a rule fixes everything that goes into it, so that what is not understood is
never permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.merging.alignment.axes import Dimension, fix, fresh, reshaped, size_of, tie

if TYPE_CHECKING:
    import torch

Dimensions = list[Dimension]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation.

    Attributes:
        args: Its arguments, as ATen got them.
        known: The dimensions of a tensor.
        shape: Shape of the first result.
    """

    args: Sequence[Any]
    known: Callable[[torch.Tensor], Dimensions]
    shape: tuple[int, ...]

    def dims(self, place: int) -> Dimensions:
        """Dimensions of the tensor among the arguments at a place."""
        return self.known(self.args[place])

    def given(self) -> list[torch.Tensor]:
        """All tensors among the arguments."""
        import torch

        flat = [
            each for arg in self.args for each in (arg if isinstance(arg, list | tuple) else (arg,))
        ]
        return [each for each in flat if isinstance(each, torch.Tensor)]

    def tensors(self) -> list[Dimensions]:
        """Dimensions of all tensors among the arguments."""
        return [self.known(each) for each in self.given()]

    def option(self, place: int, default: Any = None) -> Any:
        """A positional argument that may be left out."""
        return self.args[place] if len(self.args) > place else default


Rule = Callable[[Call], Dimensions]


def unknown(call: Call) -> Dimensions:
    """Fix all that goes in and all that comes out."""
    for dims in call.tensors():
        fix(dims)
    return unrelated(call.shape)


def unrelated(shape: Sequence[int]) -> Dimensions:
    """Fixed dimensions that nothing is tied to."""
    return [fresh(size, fixed=True) for size in shape]


def uniform(call: Call) -> Dimensions:
    """A new tensor whose elements are all alike."""
    return [fresh(size) for size in call.shape]


def elementwise(call: Call) -> Dimensions:
    """Tie the dimensions that broadcasting lays over each other."""
    found: Dimensions = [()] * len(call.shape)
    for dims in call.tensors():
        for place, dim in enumerate(dims, len(call.shape) - len(dims)):
            if size_of(dim) == 1:
                continue
            if found[place]:
                tie(found[place], dim)
            found[place] = dim
    return found


def _transpose(call: Call) -> Dimensions:
    dims = list(call.dims(0))
    first, second = call.args[1:3]
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _view(call: Call) -> Dimensions:
    return reshaped(call.dims(0), call.shape)


def _unsqueeze(call: Call) -> Dimensions:
    dims = list(call.dims(0))
    place = call.args[1]
    dims.insert(place if place >= 0 else len(dims) + 1 + place, ())
    return dims


def _expand(call: Call) -> Dimensions:
    """Repeated units are alike, so that any order of them is as good."""
    dims = call.dims(0)
    padded = [*[()] * (len(call.shape) - len(dims)), *dims]
    return [
        dim if size_of(dim) == size else fresh(size)
        for dim, size in zip(padded, call.shape, strict=True)
    ]


def _partly(*places: int) -> Rule:
    """A rule that fixes one dimension, named by the first of these arguments that is given."""

    def rule(call: Call) -> Dimensions:
        dims = list(call.dims(0))
        place = call.option(places[0], 0)
        if call.shape == tuple(size_of(dim) for dim in dims):
            return dims
        fix([dims[place]])
        dims[place] = fresh(call.shape[place], fixed=True)
        return dims

    return rule


def _select(call: Call) -> Dimensions:
    dims = list(call.dims(0))
    fix([dims.pop(call.option(1, 0))])
    return dims


def _index(call: Call) -> Dimensions:
    """Indexed dimensions that stand together are replaced by those of their indices."""
    dims = list(call.dims(0))
    indices = list(call.args[1])
    given = [place for place, index in enumerate(indices) if index is not None]
    if given != [*range(given[0], given[-1] + 1)]:
        return unknown(call)
    fix(dims[place] for place in given)
    rest = len(dims) - len(given)
    taken = unrelated(call.shape[given[0] : len(call.shape) - rest + given[0]])
    return [*dims[: given[0]], *taken, *dims[given[-1] + 1 :]]


def _split(call: Call) -> Dimensions:
    """Equal parts have units in one order: those of a fused matrix of queries, keys and values."""
    dims = list(call.dims(0))
    place = call.option(2, 0)
    size = call.shape[place]
    whole = size_of(dims[place])
    if whole == size:
        return dims
    if whole % size:
        return unknown(call)
    outer, dims[place] = reshaped([dims[place]], [whole // size, size])
    fix([outer])
    return dims


def _cat(call: Call) -> Dimensions:
    parts = [dims for dims in call.tensors() if len(dims) == len(call.shape)]
    place = call.option(1, 0) % len(call.shape)
    found = list(parts[0])
    for dims in parts:
        fix([dims[place]])
        for index, dim in enumerate(dims):
            if index != place:
                tie(found[index], dim)
    found[place] = fresh(call.shape[place], fixed=True)
    return found


def _reduced(call: Call) -> Dimensions:
    """Sums and means do not depend on the order of what they go over."""
    dims = call.dims(0)
    places = call.option(1)
    if places is None or places == []:
        over = {*range(len(dims))}
    else:
        over = {p % len(dims) for p in ([places] if isinstance(places, int) else places)}
    if len(call.shape) == len(dims):
        return [() if place in over else dim for place, dim in enumerate(dims)]
    return [dim for place, dim in enumerate(dims) if place not in over]


def _product(first: int, second: int, bias: int | None = None) -> Rule:
    """The rule of a product of matrices: what is contracted has one order."""

    def rule(call: Call) -> Dimensions:
        ours = call.dims(first)
        theirs = call.dims(second)
        tie(ours[-1], theirs[-2] if len(theirs) > 1 else theirs[-1])
        if len(ours) == 3:
            tie(ours[0], theirs[0])
        found = [*ours[:-1], *theirs[-1:]] if len(theirs) > 1 else ours[:-1]
        if bias is not None:
            last = call.dims(bias)[-1]
            if size_of(last) > 1:
                tie(last, found[-1])
        return found

    return rule


def _embedding(call: Call) -> Dimensions:
    table = call.dims(0)
    fix(table[:1])
    return [*call.dims(1), *table[1:]]


def _layer_norm(call: Call) -> Dimensions:
    dims = call.dims(0)
    for place in (2, 3):
        if call.option(place) is not None:
            own = call.dims(place)
            for dim, other in zip(own, dims[-len(own) :], strict=True):
                tie(dim, other)
    return dims


def _batch_norm(call: Call) -> Dimensions:
    dims = call.dims(0)
    for place in (1, 2, 3, 4):
        if call.option(place) is not None:
            tie(call.dims(place)[0], dims[1])
    return dims


def _convolution(call: Call) -> Dimensions:
    images = call.dims(0)
    kernel = call.dims(1)
    groups = call.args[8]
    fix(images[2:])
    fix(kernel[2:])
    spatial = [fresh(size, fixed=True) for size in call.shape[2:]]
    depthwise = groups == size_of(images[1]) == size_of(kernel[0])
    if call.args[6] or (groups != 1 and not depthwise):
        return unknown(call)
    tie(images[1], kernel[0] if depthwise else kernel[1])
    if call.option(2) is not None:
        tie(call.dims(2)[0], kernel[0])
    return [images[0], kernel[0], *spatial]


def _pooled(call: Call) -> Dimensions:
    dims = call.dims(0)
    fix(dims[2:])
    return [*dims[:2], *(fresh(size, fixed=True) for size in call.shape[2:])]


def _attention(call: Call) -> Dimensions:
    """Scaled dot products of queries, keys and values ``(items, heads, tokens, channels)``."""
    queries, keys, values = (call.dims(place) for place in range(3))
    for place in (0, 1):
        tie(queries[place], keys[place])
        tie(queries[place], values[place])
    tie(queries[3], keys[3])
    tie(keys[2], values[2])
    fix([queries[2], keys[2]])
    return [*queries[:3], values[3]]


_ELEMENTWISE = (
    "abs add add_ bitwise_and bitwise_not bitwise_or clamp clamp_min clone contiguous cos detach "
    "div div_ eq erf exp ge gelu gt hardtanh hardtanh_ leaky_relu le lift_fresh log logical_and "
    "logical_not lt masked_fill masked_fill_ maximum minimum mish mul mul_ native_dropout ne neg "
    "pow reciprocal relu relu_ rsqrt rsub sigmoid silu silu_ sin softplus sqrt square sub sub_ "
    "tanh to _to_copy where hardswish hardswish_ elu alias dropout _softmax _log_softmax softmax "
    "scalar_tensor"
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(
        ["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full"], uniform
    ),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like"], uniform),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "squeeze"], _view),
    **dict.fromkeys(["max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"], _pooled),
    **dict.fromkeys(["upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d"], _pooled),
    **dict.fromkeys(["mean", "sum"], _reduced),
    **dict.fromkeys(["native_batch_norm", "_native_batch_norm_legit_no_training"], _batch_norm),
    **dict.fromkeys(["cudnn_batch_norm", "_batch_norm_no_update"], _batch_norm),
    "t": lambda call: call.dims(0)[::-1],
    "transpose": _transpose,
    "permute": lambda call: [call.dims(0)[place] for place in call.args[1]],
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "slice": _partly(1),
    "select": _select,
    "split": _split,
    "index": _index,
    "cat": _cat,
    "mm": _product(0, 1),
    "bmm": _product(0, 1),
    "mv": _product(0, 1),
    "addmm": _product(1, 2, bias=0),
    "baddbmm": _product(1, 2, bias=0),
    "embedding": _embedding,
    "native_layer_norm": _layer_norm,
    "convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
}
#: Operations whose results are all alike.
ALIKE = frozenset({"split"})
#: Operation -> places of the arguments whose units are read: where activations are compared.
READS: Mapping[str, tuple[int, ...]] = {
    "mm": (0,),
    "addmm": (1,),
    "bmm": (0, 1),
    "convolution": (0,),
    "native_layer_norm": (0,),
}
