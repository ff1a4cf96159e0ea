"""The gradient of every coefficient, from the gradient of the merged weights.

A merged weight is a weighted sum whose weights depend on the coefficients of its segment alone, so
that the derivative of a loss L with respect to a coefficient is an inner product over the segment.
With merged weights w, g = dL/dw, base b and rows r_k::

    delta           w = b + Σ c_k r_k              dL/dc_k = Σ_i g_i r_ki
    interpolation   w = (1 − Σ c_k) b + Σ c_k r_k  dL/dc_k = Σ_i g_i (r_ki − b_i)
    slerp           w = u(t) b + v(t) r            dL/dt = u'(t) Σ_i g_i b_i + v'(t) Σ_i g_i r_i

No graph runs through the merge: one backward pass through the model, then one pass over gradient,
rows and, where a form needs it, base.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError, RecipeError
from mergesearch.merging.kernels.forms import ELECTIONS
from mergesearch.merging.kernels.products import CPU_BLOCK, factor_products, products, tiles
from mergesearch.merging.kernels.products_spans import span_products, within
from mergesearch.merging.resident.terms import Terms
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.kernels.forms import Array
    from mergesearch.merging.resident.terms import StoredFactors

_Wide = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]


def check_smooth(terms: Terms) -> None:
    """Refuse a merge that is not smooth in its coefficients.

    Raises:
        InputError: If it elects signs.
    """
    if terms.form in ELECTIONS:
        raise InputError(
            "gradient: expected a merge that is smooth in its coefficients, received the form "
            f"{terms.form!r}, which elects signs in every trial and jumps; freeze it, or choose a "
            "strategy without gradients"
        )


def coefficient_gradient(
    terms: Terms, gradient: Array, field: Field, *, threads: int | None = None
) -> _Wide:
    """Derivatives of a loss with respect to ``field.values``.

    Args:
        terms: Of the merge.
        gradient: ``(size,)``: derivatives with respect to the merged weights, zero in the padding.
        field: Where the weights were merged.
        threads: CPU threads; None takes ``OMP_NUM_THREADS``, or 1.

    Returns:
        fp64 ``(K, segments)``.

    Raises:
        InputError: If the merge is not smooth in its coefficients.
        RecipeError: If the field does not fit the terms.
    """
    check_smooth(terms)
    _check_field(terms, field)
    if terms.form == "delta":
        return _over_rows(terms, gradient, field.boundaries, base=False, threads=threads)
    if terms.angles is None:
        return _over_rows(terms, gradient, field.boundaries, base=True, threads=threads)[1:]
    fine = field.refine(terms.angles.boundaries)
    beside = _over_rows(terms, gradient, fine.boundaries, base=True, threads=threads)
    first, second = _arc_slopes(fine.values[0], terms.angles.at(fine.boundaries[:-1])[0])
    # u' Σ g b + v' Σ g r, where the second product is Σ g (r − b).
    slopes = (first + second) * beside[0] + second * beside[1]
    return _coarse(slopes[None, :], fine.boundaries, field.boundaries)


def expert_cosines(
    terms: Terms, gradient: Array, field: Field, norms: _Wide, *, threads: int | None = None
) -> _Wide:
    """Sums of cosines between the gradient and each whole expert, over parts of tensors.

    A segment's sum runs over the parts of tensors that lie in it: Σ_p g_p · e_kp / (‖g_p‖ ‖e_kp‖).
    It is the score by which Frank-Wolfe merging ranks experts, whatever the size of a tensor (Chen
    2025, "FW-Merging: Scaling model merging with Frank-Wolfe optimization"). A cosine with a vector
    of zeros is 0.

    Args:
        terms: Of the merge.
        gradient: ``(size,)``.
        field: Whose segments are meant.
        norms: :func:`expert_norms` over :func:`parts`, ``(K, parts)``.
        threads: CPU threads.

    Returns:
        fp64 ``(K, segments)``.
    """
    _check_field(terms, field)
    edges = parts(terms, field.boundaries)
    inner = _over_experts(terms, gradient, edges, threads)
    length = np.sqrt(products(gradient, [gradient], edges, threads=threads))
    scale = length * norms
    cosines = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)
    return _coarse(cosines, edges, field.boundaries)


def parts(terms: Terms, boundaries: _Index) -> _Index:
    """Boundaries refined where tensors start, so that no segment holds more than one."""
    starts = [spec.start for spec in terms.packing.layout.tensors if spec.size]
    return np.union1d(boundaries, np.array(starts, dtype=np.int64)).astype(np.int64)


def expert_norms(terms: Terms, edges: _Index) -> _Wide:
    """Norms of the whole experts over segments: fp64 ``(K, segments)``.

    An expert is base plus row for ``delta``, else the row.
    """
    from mergesearch.merging.kernels.torch_kernel import as_tensor

    squares = np.zeros((terms.packing.directions, len(edges) - 1))
    for stretch in terms.packing.stretches:
        cuts, first = within(edges, stretch.start, stretch.stop)
        for segment, (low, high) in enumerate(pairwise((cuts + stretch.start).tolist()), first):
            for start in range(low, high, CPU_BLOCK):
                stop = min(start + CPU_BLOCK, high)
                base, rows = (as_tensor(part).double() for part in terms.read(start, stop))
                whole = rows + base if terms.form == "delta" else rows
                squares[:, segment] += whole.square().sum(1).cpu().numpy()
    for stored in terms.factors:
        _add_factored_squares(stored, as_tensor(terms.base_of(stored.spec)), edges, squares)
    return np.sqrt(squares)


def _add_factored_squares(
    stored: StoredFactors, origin: torch.Tensor, edges: _Index, squares: _Wide
) -> None:
    from mergesearch.merging.kernels.torch_kernel import as_tensor

    start = stored.spec.start
    stop = stored.spec.stop
    cuts, offset = within(edges, start, stop)
    left = as_tensor(stored.left).double()
    right = as_tensor(stored.right).double()
    for segment, low, high, rows, columns in tiles(cuts, int(right.shape[1]), CPU_BLOCK):
        part = origin[low:high].double().view(rows.stop - rows.start, -1)
        for k in range(len(squares)):
            mine = [r for r, owner in enumerate(stored.owner) if owner == k]
            whole = part + left[rows][:, mine] @ right[mine][:, columns]
            squares[k, offset + segment] += float(whole.square().sum())


def _over_experts(terms: Terms, gradient: Array, edges: _Index, threads: int | None) -> _Wide:
    """Inner products with the whole experts ``(K, segments)``."""
    if terms.form != "delta":
        return _over_rows(terms, gradient, edges, base=False, from_base=False, threads=threads)
    inner = _over_rows(terms, gradient, edges, base=True, from_base=False, threads=threads)
    return inner[:1] + inner[1:]


def _over_rows(
    terms: Terms,
    gradient: Array,
    boundaries: _Index,
    *,
    base: bool,
    from_base: bool = True,
    threads: int | None,
) -> _Wide:
    """Inner products with the rows ``(K, segments)``.

    Args:
        terms: Of the merge.
        gradient: ``(size,)``.
        boundaries: ``(segments + 1,)``.
        base: Put the inner products with the base first: ``(1 + K, segments)``.
        from_base: With ``base``, take rows minus the base.
        threads: CPU threads.
    """
    inner = np.zeros((terms.packing.directions + base, len(boundaries) - 1))
    if terms.packing.spans:
        inner += span_products(
            terms.memory,
            terms.packing.spans,
            gradient,
            boundaries,
            base=base,
            from_base=base and from_base,
            threads=threads,
            tables=terms.tables,
        )
    for stored in terms.factors:
        start = stored.spec.start
        stop = stored.spec.stop
        cuts, first = within(boundaries, start, stop)
        here = slice(first, first + len(cuts) - 1)
        vector = gradient[start:stop]
        directions = terms.packing.directions
        low_rank = factor_products(
            vector, stored.left, stored.right, stored.owner, directions, cuts, threads=threads
        )
        inner[base:, here] += low_rank
        if base:
            origin = terms.base_of(stored.spec)
            inner[0, here] += products(vector, [origin], cuts, threads=threads)[0]
    return inner


def _coarse(values: _Wide, fine: _Index, coarse: _Index) -> _Wide:
    """Sums over the finer segments of every coarse one, ``(K, fine) -> (K, coarse)``."""
    return np.add.reduceat(values, np.searchsorted(fine, coarse[:-1]), axis=1)


def _arc_slopes(t: _Wide, angle: _Wide) -> tuple[_Wide, _Wide]:
    """Derivatives of the weights of base and row on the arc with respect to t.

    An angle of 0 stands for the straight line.
    """
    straight = angle == 0
    scale = np.where(straight, 1.0, angle / np.where(straight, 1.0, np.sin(angle)))
    # u = sin((1 − t)φ) / sin φ, so u' = −φ cos((1 − t)φ) / sin φ.
    first = np.where(straight, -1.0, -scale * np.cos((1 - t) * angle))
    # v = sin(tφ) / sin φ, so v' = φ cos(tφ) / sin φ.
    second = np.where(straight, 1.0, scale * np.cos(t * angle))
    return first, second


def _check_field(terms: Terms, field: Field) -> None:
    if field.directions != terms.packing.directions or field.size != terms.size:
        raise RecipeError(
            f"gradient: expected a field of {terms.packing.directions} directions over "
            f"{terms.size} positions, received {field.directions} over {field.size}"
        )
