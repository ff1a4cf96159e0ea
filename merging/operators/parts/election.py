"""What the sparse operators share: options of thinning, and the election of signs.

Each member thins task vectors in its own way (by magnitude, by chance, by both). What is left is
added up, or a sign is elected at every position and only the terms of that sign are merged: steps 2
and 3 of Yadav 2023, "TIES-Merging: resolving interference when merging models". So a member is a
function from a tensor's name to thinned vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from mergesearch.merging.kernels.forms import MADE, Form, Patches, Thinning
from mergesearch.merging.kernels.host import host_fp32, stored_numbers
from mergesearch.merging.operators.base import Basis, Direct, DirectMerge
from mergesearch.merging.operators.parts.task_vectors import is_stored_whole
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.parallel import nested_parallel_map
from mergesearch.merging.tensors.source import Options, TensorSource, remembered

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.thinned_numba import Outcome

    #: Tensor name -> one vector per expert, new tensors of the base's shape.
    Vectors = Callable[[str], list[torch.Tensor]]

#: Tensor name -> for every expert the magnitude from which on its elements are kept.
Limits = Callable[[str], list[float]]

#: Tensor name -> what becomes of every expert's task vector, as compiled kernels read it.
Thinnings = Callable[[str], list[Thinning]]


def _fraction(value: Any) -> Any:
    # Other tools read 20 as 20 %, and 1 as 100 % or as 1 %: no number above 1 is unambiguous.
    if isinstance(value, int | float) and value > 1:
        raise ValueError("expected a fraction in (0, 1], 0.2 for 20 percent")
    return value


#: A fraction in (0, 1]; percentages are refused by name.
Fractional = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]

Merge = Annotated[
    Literal["mean", "sum", "max", "weighted_mean"],
    Field(
        description="what becomes of the terms that have the elected sign: their mean, sum, the "
        "largest, or (live mode only) their mean weighted by the coefficients"
    ),
]
Mode = Annotated[
    Literal["frozen", "live"],
    Field(
        description="elect signs once, before coefficients (frozen), or again in every trial, "
        "after them (live)"
    ),
]
Seed = Annotated[int, Field(ge=0, description="chooses the random masks")]

#: What holds for every member at every setting in frozen mode: thinning looks at one task vector,
#: elections at all of them alike, and 0 has no sign.
SHARED_IDENTITIES = frozenset(
    {
        "base_at_zero",
        "permutation",
        "linearity",
        "homogeneity",
        "zero_vector",
        "default_ignores_zero_vector",
    }
)

#: Positions elected at a time: what it takes besides the vectors stays small.
BLOCK = 1 << 18

_LIVE_FORMS: dict[str, Form] = {
    "mean": "elect_mean",
    "sum": "elect_sum",
    "max": "elect_max",
    "weighted_mean": "elect_weighted",
}


def is_exempt(shape: Sequence[int], vectors: str) -> bool:
    """Whether a tensor is merged unthinned.

    A scalar always is, a vector (norm, bias) where ``vectors`` is ``pass``.
    """
    return len(shape) == 0 or (len(shape) == 1 and vectors == "pass")


def one_minus(fraction: float) -> float:
    """``1 − fraction`` in decimals: 1 − 0.7 is 0.3, not the number above it."""
    return float(1 - Fraction(repr(float(fraction))))


@dataclass(frozen=True)
class _Thinned:
    """Thinned task vectors of a whole model, among which signs are elected.

    Attributes:
        base: The base.
        experts: The experts.
        vectors: Tensor name -> thinned task vectors, new tensors each time.
        thinnings: What thinning does, where kernels can do it to stored numbers; else None.
    """

    base: TensorSource
    experts: Sequence[TensorSource]
    vectors: Vectors
    thinnings: Thinnings | None


class MajoritySign:
    """The sign that most positions of a model elect, counted when it is first asked for.

    Counting reads what has not been counted while it was merged, at worst the whole model, so one
    thread counts while the others wait.
    """

    def __init__(self, count: Callable[[Mapping[str, int]], int]) -> None:
        self._count = count
        self._lock = Lock()
        self._counted: dict[str, int] = {}
        #: 1, −1, 0 (as many positions of either sign), or None before it is counted.
        self.known: int | None = None

    def __call__(self) -> int:
        """The sign: 1, −1, or 0."""
        with self._lock:
            if self.known is None:
                self.known = self._count(self._counted)
            return self.known

    def add(self, name: str, balance: int) -> None:
        """Positions of a tensor that elect a positive sign, minus those that elect a negative."""
        self._counted[name] = balance

    @property
    def likely(self) -> int:
        """The sign if it is known, else that of the tensors counted so far: 1 or −1."""
        if self.known is not None:
            return self.known
        return 1 if sum([*self._counted.values()]) >= 0 else -1


def elected_basis(
    base: TensorSource,
    experts: Sequence[TensorSource],
    vectors: Vectors,
    merge: str,
    mode: str,
    key: Sequence[Any],
    thinnings: Thinnings | None = None,
) -> Basis:
    """The basis that elects signs among ``vectors``, in one of its two modes.

    Args:
        base: The base.
        experts: The experts.
        vectors: Tensor name -> thinned task vectors, new tensors each time.
        merge: ``mean``, ``sum``, ``max`` or, live only, ``weighted_mean``.
        mode: ``frozen`` elects among the vectors as they are, ``live`` among the vectors times
            their coefficients.
        key: All that ``vectors`` depends on besides the weights, JSON-able.
        thinnings: What thinning does, where kernels can do it to stored numbers.
    """
    if mode == "live":
        return Basis(_LIVE_FORMS[merge], len(experts), vectors)
    model = _Thinned(base, experts, vectors, thinnings)
    majority = MajoritySign(partial(_count_majority, model, list(key)))
    return Basis(
        "delta",
        len(experts),
        lambda name: elect(vectors(name), merge, majority),
        direct=partial(_merge_stored, model, merge, majority),
    )


def merging_of(vectors: Vectors) -> DirectMerge:
    """What adds thinned task vectors to a tensor of the base in one pass, as ``Basis.direct``."""
    return partial(_add_vectors, vectors)


def _add_vectors(
    vectors: Vectors,
    name: str,
    numbers: Sequence[Any],
    weights: Any,
    boundaries: Any,
    out: Any,
    _later: bool,
) -> Direct | None:
    rows = _host_rows(vectors(name))
    if rows is None:
        return None
    return thinned_sum([numbers[0], *rows], [MADE] * len(rows), weights, boundaries, out)


def thinned_sum(
    numbers: Sequence[Any], thinnings: Sequence[Thinning], weights: Any, boundaries: Any, out: Any
) -> Direct | None:
    """Add thinned rows to a tensor of the base in one pass; None where a number is not finite."""
    from mergesearch.merging.kernels.thinned_numba import merge_thinned

    merged = merge_thinned(numbers, thinnings, weights, boundaries, "", 0, out)
    return Direct(merged.lost, merged.change) if merged.finite else None


def _count_majority(model: _Thinned, key: Sequence[Any], counted: Mapping[str, int]) -> int:
    """``sign(Σ_positions γ)`` over the whole model, remembered."""

    def count() -> dict[str, torch.Tensor]:
        import torch

        left = [name for name in model.base.names if name not in counted]
        balance = sum(nested_parallel_map(partial(_tensor_balance, model), left))
        balance += sum(counted[name] for name in model.base.names if name in counted)
        return {"sign": torch.tensor([_sign(balance)])}

    sources = [model.base, *model.experts]
    return int(remembered(sources, ["majority sign", *key], count)["sign"])


def _tensor_balance(model: _Thinned, name: str) -> int:
    """:func:`_balance` of one tensor, from its stored numbers where kernels can thin them."""
    numbers: list[Any] = [None]
    if model.thinnings is not None and is_stored_whole(model.experts, name):
        numbers = _stored(model, name)
    if model.thinnings is None or any(array is None for array in numbers):
        return _balance(model.vectors(name))
    from mergesearch.merging.kernels.thinned_numba import balance_thinned

    balance = balance_thinned(numbers, model.thinnings(name))
    # Vectors say which of them is not finite.
    return _balance(model.vectors(name)) if balance is None else balance


def _merge_stored(
    model: _Thinned,
    merge: str,
    majority: MajoritySign,
    name: str,
    numbers: Sequence[Any],
    weights: Any,
    boundaries: Any,
    out: Any,
    later: bool,
) -> Direct | None:
    """Thin, elect and merge a tensor from its stored numbers, as ``Basis.direct`` has it.

    Where kernels cannot thin, vectors are thinned first and then merged in the same way. Where
    terms cancel and the majority is not known yet, it is guessed. ``later`` leaves it to the end to
    set the guess right, when every tensor's balance is known from its merge.
    """
    from mergesearch.merging.kernels.thinned_numba import merge_thinned

    terms = _terms(model, name, numbers)
    if terms is None:
        return None
    numbers, thinnings = terms
    how = (thinnings, weights, boundaries, merge)
    is_open = majority.known is None
    sign = majority.likely
    first = merge_thinned(numbers, *how, sign, out, notes=is_open and later)
    if not first.finite:
        return None
    majority.add(name, first.balance)
    if first.cancelled == 0 or not is_open:
        return Direct(first.lost, first.change)
    if later:
        settle = partial(_settled, model, name, how, majority, sign, first, out.dtype)
        return Direct(first.lost, first.change, settle)
    if majority() != sign:
        first = merge_thinned(numbers, *how, majority(), out)
    return Direct(first.lost, first.change)


def _settled(
    model: _Thinned,
    name: str,
    how: tuple[Any, Any, Any, str],
    majority: MajoritySign,
    guess: int,
    first: Outcome,
    dtype: npt.DTypeLike,
) -> Patches | None:
    """What is to be written over a tensor merged with a guess; None where it was right."""
    sign = majority()
    if sign == guess:
        return None
    if sign == -guess and first.patches is not None:
        return first.patches
    from mergesearch.merging.kernels.thinned_numba import merge_thinned

    terms = _terms(model, name, _stored(model, name))
    assert terms is not None  # as when the tensor was merged
    numbers, _ = terms
    out = np.empty(numbers[0].size, dtype)
    again = merge_thinned(numbers, *how, sign, out)
    return Patches(None, out, again.lost - first.lost, again.change - first.change)


def _terms(
    model: _Thinned, name: str, numbers: Sequence[Any]
) -> tuple[Sequence[Any], list[Thinning]] | None:
    """What kernels read of a tensor: base and experts to thin, or the base and thinned vectors.

    None where the vectors are not what they read.
    """
    if model.thinnings is not None:
        return numbers, model.thinnings(name)
    rows = _host_rows(model.vectors(name))
    return None if rows is None else ([numbers[0], *rows], [MADE] * len(rows))


def _stored(model: _Thinned, name: str) -> list[Any]:
    """The stored numbers of base and experts, each None where kernels cannot read them."""
    return [stored_numbers(source.read(name).detach()) for source in (model.base, *model.experts)]


def refuse_election(_layout: Layout, _experts: int, options: Options) -> str | None:
    """Why ``merge`` and ``mode`` do not go together, or None."""
    if options["merge"] == "weighted_mean" and options["mode"] == "frozen":
        # The divisor would depend on coefficients that are not known yet.
        return (
            "merge 'weighted_mean' expects mode 'live', received 'frozen'; set mode: live, or "
            "merge: mean"
        )
    return None


def elect(
    vectors: Sequence[torch.Tensor], merge: str = "mean", majority: Callable[[], int] | None = None
) -> list[torch.Tensor]:
    """Elect a sign at every position and keep the terms that have it; their sum is the merge.

    Step 2 of TIES: γ = sign(Σ_k x_k), where an exact cancellation takes the sign of the majority of
    positions. Step 3: kept terms are divided by their number (``mean``), left as they are
    (``sum``), or only the largest is kept, shared where several are equal (``max``). A majority of
    0 keeps nothing.

    Args:
        vectors: K tensors of one shape; **overwritten** with the result.
        merge: ``mean``, ``sum`` or ``max``.
        majority: Sign of the majority, asked for only where terms cancel; None takes it from these
            vectors.
    """
    tensors = [vector.contiguous() for vector in vectors]
    majority = majority or _own_majority(tensors)
    rows = _host_rows(tensors)
    if rows is not None:
        from mergesearch.merging.kernels.sparse_numba import cancels, elect_rows

        elect_rows(rows, merge, majority() if cancels(rows) else 0)
        return tensors
    for block in _blocks(tensors):
        _elect_block(block, merge, majority)
    return tensors


def _own_majority(tensors: Sequence[torch.Tensor]) -> Callable[[], int]:
    """Sign of the majority of these positions alone, counted before they are overwritten."""
    sign = _sign(_balance(tensors))
    return lambda: sign


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _balance(tensors: Sequence[torch.Tensor]) -> int:
    """Positions that elect a positive sign, minus those that elect a negative one."""
    rows = _host_rows(tensors)
    if rows is None:
        return sum(int(_sum(block).sign().sum()) for block in _blocks(tensors))
    from mergesearch.merging.kernels.sparse_numba import balance

    return balance(rows)


def _host_rows(tensors: Sequence[torch.Tensor]) -> list[npt.NDArray[np.float32]] | None:
    """The tensors as the compiled kernels read them, or None if they cannot."""
    rows = [host_fp32(tensor) for tensor in tensors]
    return None if any(row is None for row in rows) else [row for row in rows if row is not None]


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same stretch of every tensor at a time, as views."""
    flat = [tensor.contiguous().view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield [tensor[start : start + BLOCK] for tensor in flat]


def _elect_block(vectors: Sequence[torch.Tensor], merge: str, majority: Callable[[], int]) -> None:
    """:func:`elect` on K vectors ``(n,)``, overwriting them."""
    import torch

    # Step 2: γ = sign(Σ_k x_k), the majority's where the terms cancel
    sign = _sum(vectors).sign().to(vectors[0].dtype)
    silent = sign == 0
    if any(bool(vector[silent].any()) for vector in vectors):
        sign[silent] = float(majority())
    # Step 3: A = {k : sign(x_k) = γ}, and for max only the largest |x_k| of A
    kept = torch.stack([(vector != 0) & (vector.sign() == sign) for vector in vectors])
    if merge == "max":
        magnitudes = torch.stack([vector.abs() for vector in vectors]).mul_(kept)
        kept &= magnitudes == magnitudes.amax(dim=0)
    count = kept.sum(dim=0).clamp_(min=1)
    for vector, mask in zip(vectors, kept, strict=True):
        vector.masked_fill_(~mask, 0.0)
        if merge != "sum":
            vector.div_(count)  # mean: x_k / |A|


def _sum(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``Σ_k x_k`` in fp64.

    There the order of fp32 terms decides no sign, and only true cancellations give 0.
    """
    import torch

    total = vectors[0].to(torch.float64, copy=True)
    for vector in vectors[1:]:
        total.add_(vector)
    return total
