"""Operators against what other packages make of the same weights; differences have a reason.

The other packages are never imported: ``make peers`` writes what they give as golden files. Either
ours and theirs agree (:data:`AGREEMENTS`), or a test pins the difference: theirs is not ours, and
ours is a formula written out here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergesearch.evaluators import Batch
from mergesearch.merging import Field, Layout, Recipe, RecipeError, Source, merge
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.search.workers.gradient_steps import (
    GradientSteps,
    OptimizerConfig,
    init_state,
    take_gradient_steps,
)
from tests.peers.inputs import SHAPES, Kind, Weights, digest, weights
from tests.peers.tiny import Tiny, inputs_of

FOLDER = Path(__file__).parents[1] / "golden" / "peers"
Floats = npt.NDArray[np.float64]

#: Closed forms in fp32, relative to the largest weight; singular vectors and iterations, to the
#: largest change.
CLOSED = 1e-6
SPECTRAL = 1e-4
ITERATIVE = 1e-3
UNEQUAL = (1.0, 0.4, 1.7)
SUM = sum(UNEQUAL)


@dataclass(frozen=True)
class Golden:
    """What a peer made of the generated weights: ``merged`` is flat, float64."""

    merged: Floats
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Flat weights, float64: base ``(n,)`` and task vectors ``(K, n)`` as float32 holds them."""

    base: Floats
    vectors: Floats

    def tensors(self) -> list[slice]:
        """Where each tensor lies."""
        ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
        return [
            slice(int(end) - int(np.prod(shape)), int(end))
            for end, shape in zip(ends, SHAPES.values(), strict=True)
        ]


@dataclass(frozen=True)
class Agreement:
    """A golden file, and how we say the same merge.

    Attributes:
        golden: Name of the file.
        operator: Ours.
        coefficients: One for all experts, or one each.
        options: Hyperparameters.
        tolerance: Largest relative difference.
    """

    golden: str
    operator: str
    coefficients: float | Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = CLOSED


@cache
def golden(name: str) -> Golden:
    with safe_open(str(FOLDER / f"{name}.safetensors"), framework="np") as file:
        return Golden(
            file.get_tensor("merged").astype(np.float64), json.loads(file.metadata()["case"])
        )


@cache
def generated(experts: int, kind: Kind) -> tuple[Weights, dict[str, Weights]]:
    return weights(experts, kind)


@cache
def family(experts: int, kind: Kind) -> Family:
    base, others = generated(experts, kind)
    vectors = [
        flat({name: state[name] - base[name] for name in SHAPES}) for state in others.values()
    ]
    return Family(flat(base), np.array(vectors))


def family_of(name: str) -> Family:
    about = golden(name).about
    return family(about["experts"], about["kind"])


def flat(state: Mapping[str, Any]) -> Floats:
    return np.concatenate(
        [np.asarray(state[name], dtype=np.float64).reshape(-1) for name in SHAPES]
    )


def ours(
    name: str, operator: str, coefficients: float | Sequence[float] | Field, **options: Any
) -> Floats:
    """Our merge of the weights that the golden file ``name`` was made from, flat."""
    about = golden(name).about
    base, experts = generated(about["experts"], about["kind"])
    merged = merge(
        tensors(base),
        {expert: tensors(state) for expert, state in experts.items()},
        operator=operator,
        coefficients=coefficients,
        **options,
    )
    return flat(merged)


def tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def calibration() -> Calibration:
    """The model and the items that the peers ran."""
    base, others = generated(3, "aligned")
    return Calibration(
        Tiny(base), {expert: [{"input_ids": inputs_of(expert)}] for expert in others}
    )


def close(found: Floats, expected: Floats, scale: float, tolerance: float = CLOSED) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * scale)


# ----------------------------------------------------------------------------
# What agrees
# ----------------------------------------------------------------------------

TENSORWISE = {"scope": "tensor"}
LIVE = {"mode": "live", "merge": "weighted_mean"}
ALL = {"matrices": "all"}

AGREEMENTS = (
    Agreement("mergekit-linear", "average", [w / SUM for w in UNEQUAL]),
    Agreement("mergekit-task-arithmetic", "task_arithmetic", (0.4, 0.3, 0.6)),
    Agreement(
        "mergekit-task-arithmetic-scaled", "task_arithmetic", [0.7 * w / SUM for w in UNEQUAL]
    ),
    Agreement("mergekit-ties", "ties", 1.0, {"density": 0.3, **TENSORWISE}),
    Agreement("mergekit-ties-weighted", "ties", UNEQUAL, {"density": 0.3, **TENSORWISE, **LIVE}),
    Agreement(
        "mergekit-ties-sum",
        "ties",
        UNEQUAL,
        {"density": 0.3, **TENSORWISE, "mode": "live", "merge": "sum"},
    ),
    Agreement("mergekit-dare-linear-all", "dare", (0.4, 0.3, 0.6), {"drop": 0.0}),
    Agreement("mergekit-dare-ties-all", "dare_ties", UNEQUAL, {"drop": 0.0, **LIVE}),
    Agreement("mergekit-della-all", "della", UNEQUAL, {"density": 1.0, "epsilon": 0.0, **LIVE}),
    Agreement(
        "mergekit-della-linear-all",
        "della_linear",
        (0.4, 0.3, 0.6),
        {"density": 1.0, "epsilon": 0.0},
    ),
    Agreement(
        "mergekit-breadcrumbs",
        "breadcrumbs",
        (0.4, 0.3, 0.6),
        {"density": 0.5, "gamma": 0.1, **TENSORWISE, "vectors": "trim"},
    ),
    # Fewer than one outlier: older versions emptied such tensors.
    Agreement(
        "mergekit-breadcrumbs-small",
        "breadcrumbs",
        1.0,
        {"density": 0.5, "gamma": 0.01, **TENSORWISE, "vectors": "trim"},
    ),
    Agreement(
        "mergekit-breadcrumbs-ties",
        "breadcrumbs",
        1.0,
        {"density": 0.5, "gamma": 0.1, "elect": True, **TENSORWISE, "vectors": "trim"},
    ),
    Agreement("mergekit-sce", "sce", 1.0, {"topk": 1.0}),
    Agreement("mergekit-sce-selected", "sce", 1.0, {"topk": 0.3, "select_applies_to": "deltas"}),
    Agreement("mergekit-sce-alone", "sce", 1.0, {"topk": 0.5, "select_applies_to": "deltas"}),
    Agreement("mergekit-model-stock", "model_stock", 1.0),
    Agreement("mergekit-slerp", "slerp", 0.3),
    Agreement("mergekit-gradient", "lines", 1.0, {"alpha": 0.2, "beta": 0.4}),
    Agreement("mergekit-swapped-layers", "layer_swap", 1.0, {"bottom": 1, "top": 1}),
    Agreement(
        "mergekit-swapped-layers-transition",
        "layer_swap",
        1.0,
        {"bottom": 1, "top": 0, "transition": 1},
    ),
    Agreement("fusion-bench-average", "average", 1 / 3),
    Agreement("fusion-bench-task-arithmetic", "task_arithmetic", 0.3),
    Agreement("fusion-bench-expo", "task_arithmetic", 1.5),
    Agreement("fusion-bench-ties-mean", "ties", 1.0, {"density": 0.197}),
    Agreement("fusion-bench-ties-sum", "ties", 0.3, {"density": 0.197, "merge": "sum"}),
    Agreement("fusion-bench-ties-max", "ties", 1.0, {"density": 0.197, "merge": "max"}),
    # 1.5 there is a percentage, 1 is everything.
    Agreement("fusion-bench-ties-one-percent", "ties", 1.0, {"density": 0.015}),
    Agreement("fusion-bench-dare-all", "dare", 0.3, {"drop": 0.0}),
    # Its DARE-TIES trims what DARE left; that it can keep everything fails there.
    Agreement("fusion-bench-dare-ties-all", "ties", 0.3, {"density": 0.197, "merge": "sum"}),
    Agreement(
        "fusion-bench-dare-ties-all",
        "dare_ties",
        0.3,
        {"drop": 0.0, "density": 0.197, "merge": "sum", "vectors": "drop"},
    ),
    Agreement("fusion-bench-slerp", "slerp", 0.3),
    Agreement("fusion-bench-model-stock-two", "model_stock", 1.0),
    Agreement("fusion-bench-emr", "emr", 1.0),
    Agreement("fusion-bench-tsv", "tsv", 1.0, ALL, SPECTRAL),
    Agreement("fusion-bench-tsv-four", "tsv", 0.8, ALL, SPECTRAL),
    Agreement("fusion-bench-iso-c", "iso_c", 1.5, ALL, SPECTRAL),
    Agreement("fusion-bench-iso-cts", "iso_cts", 1.5, {"common": 0.8, **ALL}, SPECTRAL),
    Agreement(
        "fusion-bench-knots", "knots", 0.6, {"inner": "ties", "density": 0.197, **ALL}, SPECTRAL
    ),
    Agreement("fusion-bench-magmax", "magmax", 0.5),
    Agreement("fusion-bench-svc", "svc", 1.0, {"alpha": 0.1}, SPECTRAL),
    Agreement(
        "fusion-bench-dop",
        "dop",
        1.0,
        {
            "order": ["one", "two", "three"],
            "decay": 0.95,
            "energy": 0.9,
            "steps": 25,
        },
        ITERATIVE,
    ),
    Agreement(
        "fusion-bench-opcm", "opcm", 1.0, {"alpha": 0.5, "order": ["one", "two", "three"]}, SPECTRAL
    ),
    # Until the optimiser stands still: the closed form of the same flow, without end and with every
    # eigenvector.
    Agreement("fusion-bench-wudi", "wudi", 1.0, {"time": 1e9, "keep": 1.0, **ALL}, ITERATIVE),
    Agreement("fusion-bench-doge", "doge", 1.0, {}, ITERATIVE),
)


@pytest.mark.parametrize(
    "case", AGREEMENTS, ids=[f"{case.golden} {case.operator}" for case in AGREEMENTS]
)
def test_agrees_with(case: Agreement) -> None:
    theirs = golden(case.golden).merged
    base = family_of(case.golden).base
    scale = np.abs(theirs).max() if case.tolerance == CLOSED else np.abs(theirs - base).max()
    found = ours(case.golden, case.operator, case.coefficients, **case.options)
    np.testing.assert_allclose(found, theirs, rtol=0, atol=case.tolerance * scale)


def test_a_table_of_coefficients_is_that_of_adamerging() -> None:
    layout = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})
    places = [list(SHAPES).index(spec.name) for spec in layout.tensors]
    table = [[first + 0.03 * place for place in places] for first in (0.1, 0.5, -0.2)]
    coefficients = Field(np.array([*layout.segment_starts(), layout.size]), np.array(table))
    theirs = golden("fusion-bench-layer-wise").merged
    assert close(
        ours("fusion-bench-layer-wise", "task_arithmetic", coefficients),
        theirs,
        np.abs(theirs).max(),
    )


def test_consensus_keeps_what_two_masks_claim() -> None:
    claims = golden("fusion-bench-tall-masks").merged
    weights_ = family_of("fusion-bench-tall-masks")
    assert 0.05 < np.mean(claims >= 2) < 0.95
    for agreement in (1, 2, 3):
        expected = weights_.base + 0.4 * (claims >= agreement) * weights_.vectors.sum(0)
        found = ours(
            "fusion-bench-tall-masks", "consensus", 0.4, agreement=agreement, threshold=0.4
        )
        assert close(found, expected, np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "operator", "options"),
    [
        ("fusion-bench-regmean", "regmean", {"reduce": 0.9}),
        ("fusion-bench-regmean-plus-plus", "regmean_pp", {"reduce": 0.9}),
        ("fusion-bench-fisher", "fisher", {"labels": "exact", "floor": 1e-6}),
        (
            "fusion-bench-fisher-normalised",
            "fisher",
            {"labels": "exact", "floor": 1e-6, "normalise": True},
        ),
    ],
)
def test_data_operators_agree_on_the_same_items(
    name: str, operator: str, options: Mapping[str, Any]
) -> None:
    theirs = golden(name).merged
    base = family_of(name).base
    found = ours(name, operator, 1.0, calibration=calibration(), **options)
    np.testing.assert_allclose(found, theirs, rtol=0, atol=SPECTRAL * np.abs(theirs - base).max())


def test_a_learned_mask_is_applied_as_by_concrete_task_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Learning is random there and counter-based here: known logits take its place, on both sides.
    base = tensors(generated(3, "aligned")[0])
    known = [(name, {"logits": 2.0 * tensor}) for name, tensor in base.items()]
    monkeypatch.setattr("mergesearch.merging.operators.concrete._learned", lambda *_: iter(known))
    theirs = golden("fusion-bench-shared-mask").merged
    found = ours("fusion-bench-shared-mask", "concrete", 0.3, calibration=calibration())
    assert close(found, theirs, np.abs(theirs).max())


# ----------------------------------------------------------------------------
# What differs, and what ours is
# ----------------------------------------------------------------------------


def trimmed(vector: Floats, count: int) -> Floats:
    """The ``count`` largest magnitudes, 0 elsewhere."""
    return np.where(np.abs(vector) >= np.sort(np.abs(vector))[-count], vector, 0.0)


def elected_mean(vectors: Floats, coefficients: Sequence[float]) -> Floats:
    """Σ_k c_k τ_k over the experts of the elected sign, divided by their number."""
    agrees = vectors * np.sign(vectors.sum(0)) > 0
    return (np.array(coefficients)[:, None] * vectors * agrees).sum(0) / np.maximum(
        agrees.sum(0), 1
    )


def assert_parts(name: str, found: Floats, expected: Floats, tolerance: float = CLOSED) -> None:
    """Ours is the formula; theirs is another merge, far beyond rounding."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)
    assert not close(golden(name).merged, expected, scale, 1e3 * CLOSED)


def test_unnormalised_averages_keep_the_base() -> None:
    # Weights that do not add up to 1 stretch every weight of the model there; here the base takes
    # what is left of 1.
    name = "mergekit-linear-plain"
    found = family_of(name)
    expected = found.base + np.array([0.5, 0.3, 0.4]) @ found.vectors
    assert_parts(name, ours(name, "average", (0.5, 0.3, 0.4)), expected)


def test_ties_elects_before_coefficients() -> None:
    # Coefficients that take part in the election make the merge jump where a sign changes; the
    # paper's do not.
    name = "mergekit-ties-weighted"
    found = family_of(name)
    trims = np.zeros_like(found.vectors)
    for part in found.tensors():
        for vector, out in zip(found.vectors, trims, strict=True):
            out[part] = trimmed(vector[part], round(0.3 * vector[part].size))
    expected = found.base + elected_mean(trims, UNEQUAL)
    assert_parts(name, ours(name, "ties", UNEQUAL, density=0.3, scope="tensor"), expected)


def test_ties_ranks_the_whole_model() -> None:
    # As in the paper's code; ranks within tensors keep changes in tensors that hardly changed.
    name = "mergekit-ties"
    found = family_of(name)
    trims = np.array([trimmed(vector, round(0.3 * vector.size)) for vector in found.vectors])
    expected = found.base + elected_mean(trims, (1.0, 1.0, 1.0))
    assert_parts(name, ours(name, "ties", 1.0, density=0.3), expected)


def test_densities_round_up() -> None:
    # ⌊0.27 · 10⌋ = 2 of 10 elements are a density of 0.2; ⌈2.7⌉ = 3 keeps at least what was asked
    # for.
    name = "mergekit-ties-fraction"
    found = family_of(name)
    trims = np.zeros_like(found.vectors)
    for part in found.tensors():
        for vector, out in zip(found.vectors, trims, strict=True):
            out[part] = trimmed(vector[part], int(np.ceil(0.27 * vector[part].size)))
    expected = found.base + elected_mean(trims, (1.0, 1.0, 1.0))
    assert_parts(name, ours(name, "ties", 1.0, density=0.27, scope="tensor"), expected)


def test_a_density_of_a_fifth_keeps_a_fifth() -> None:
    # Its threshold is the value below the ones to keep, so that it keeps one more: 397 of 1980.
    name = "fusion-bench-ties-whole"
    found = family_of(name)
    expected = [
        found.base + elected_mean(np.array([trimmed(v, count) for v in found.vectors]), (1, 1, 1))
        for count in (396, 397)
    ]
    assert_parts(name, ours(name, "ties", 1.0, density=0.2), expected[0])
    assert close(golden(name).merged, expected[1], np.abs(expected[1]).max())


@pytest.mark.parametrize("density", [1.5, 20, 100])
def test_percentages_are_refused(density: float) -> None:
    # There 1 is everything and 1.5 is 1.5 %; here a density is a fraction, and nothing else.
    with pytest.raises(RecipeError, match="density"):
        ours("fusion-bench-ties-one-percent", "ties", 1.0, density=float(density))


def test_exact_cancellation_elects_no_sign() -> None:
    # Two experts that cancel: one peer takes all that is positive, the other all that is negative.
    # Nothing is as odd as a sign must be: swapping every sign of the task vectors must swap those
    # of the merge.
    found = family_of("mergekit-ties-mirrored")
    size = np.abs(found.vectors[0])
    assert np.array_equal(golden("mergekit-ties-mirrored").merged, found.base + size)
    assert np.mean(golden("fusion-bench-ties-mirrored").merged == found.base - size) > 0.99
    for options in ({"density": 1.0}, {"density": 1.0, "mode": "live"}):
        assert np.array_equal(ours("mergekit-ties-mirrored", "ties", 1.0, **options), found.base)


def test_outliers_are_left_out_before_anything_is_kept() -> None:
    # Density 0.9 leaves no room for a fifth of outliers: there a tenth goes instead without a word,
    # here it is refused.
    name = "mergekit-breadcrumbs-crowded"
    found = family_of(name)
    kept = np.zeros_like(found.vectors)
    for part in found.tensors():
        for vector, out in zip(found.vectors, kept, strict=True):
            out[part] = vector[part] - trimmed(vector[part], vector[part].size // 10)
    theirs = golden(name).merged
    assert close(theirs, found.base + kept.sum(0), np.abs(theirs).max())
    with pytest.raises(RecipeError, match=r"density \+ gamma"):
        ours(name, "breadcrumbs", 1.0, density=0.9, gamma=0.2)


def test_sce_selects_for_its_weights() -> None:
    # In the authors' code the selected positions only weigh the experts; masked deltas lose most of
    # what was learned, and of a single expert everything.
    name = "mergekit-sce-selected"
    found = family_of(name)
    expected = family_of(name).base.copy()
    for part in found.tensors():
        vectors = found.vectors[:, part]
        variance = vectors.var(0)
        chosen = variance >= np.sort(variance)[-round(0.3 * variance.size)]
        energy = (vectors**2 * chosen).sum(1)
        terms = (energy / energy.sum())[:, None] * (vectors * np.sign(vectors.sum(0)) > 0)
        expected[part] += (terms * vectors).sum(0) / terms.sum(0)
    assert_parts(name, ours(name, "sce", 1.0, topk=0.3), expected)
    alone = family_of("mergekit-sce-alone")
    assert np.array_equal(golden("mergekit-sce-alone").merged, alone.base)
    whole = alone.base + alone.vectors[0]
    assert_parts("mergekit-sce-alone", ours("mergekit-sce-alone", "sce", 1.0, topk=0.5), whole)


def stock_ratio(angles_or_cosines: Floats, angles: bool, experts: int) -> float:
    cosine = float(
        np.cos(np.arccos(angles_or_cosines).mean()) if angles else angles_or_cosines.mean()
    )
    return experts * cosine / (1 + (experts - 1) * cosine)


def pairwise_cosines(vectors: Floats) -> Floats:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(vectors), 1)]


def test_model_stock_does_not_extrapolate() -> None:
    # Experts that pull apart have a ratio outside [0, 1] there: beyond the average, or away from
    # it. Here the base.
    name = "mergekit-model-stock-rivals"
    found = family_of(name)
    expected = family_of(name).base.copy()
    for part in found.tensors():
        ratio = stock_ratio(pairwise_cosines(found.vectors[:, part]), False, 3)
        expected[part] += min(max(ratio, 0.0), 1.0) * found.vectors[:, part].mean(0)
    assert_parts(name, ours(name, "model_stock", 1.0), expected)


def test_model_stock_averages_cosines() -> None:
    # The paper's estimate is the mean of the cosines of all pairs; fusion-bench takes the mean of
    # the angles.
    name = "fusion-bench-model-stock"
    found = family_of(name)
    by_cosine = found.base.copy()
    by_angle = found.base.copy()
    for part in found.tensors():
        cosines = pairwise_cosines(found.vectors[:, part])
        mean = found.vectors[:, part].mean(0)
        by_cosine[part] += stock_ratio(cosines, False, 3) * mean
        by_angle[part] += stock_ratio(cosines, True, 3) * mean
    assert_parts(name, ours(name, "model_stock", 1.0), by_cosine)
    assert close(golden(name).merged, by_angle, np.abs(by_angle).max())


def test_iso_c_stays_within_the_directions_that_changed() -> None:
    # Three experts of rank 1 change three directions. Flattened over all ten there, most of the
    # change lies in directions that nobody learned, and that another version of LAPACK would choose
    # otherwise.
    name = "fusion-bench-iso-c-adapters"
    found = family_of(name)
    theirs = golden(name).merged
    expected = found.base + found.vectors.mean(0)
    ranks = []
    for part, shape in zip(found.tensors(), SHAPES.values(), strict=True):
        if len(shape) == 2:
            left, values, right = np.linalg.svd(
                found.vectors[:, part].sum(0).reshape(shape), full_matrices=False
            )
            flat_values = np.full(3, values[:3].mean())
            expected[part] = found.base[part] + ((left[:, :3] * flat_values) @ right[:3]).reshape(
                -1
            )
            change = np.linalg.svd((theirs - found.base)[part].reshape(shape), compute_uv=False)
            ranks.append((change > 0.5 * change[0]).sum())
    assert min(ranks) == min(SHAPES["head.weight"])
    assert_parts(name, ours(name, "iso_c", 1.0, matrices="all"), expected, SPECTRAL)


def test_wudi_does_not_depend_on_the_scale_of_task_vectors() -> None:
    # 300 steps of 1e-5 hardly move task vectors of 0.1, and go all the way for those of 0.001: the
    # same experts, other merges. The flow that the steps follow has no such scale.
    name = "fusion-bench-wudi-short"
    found = family_of(name)
    theirs = golden(name).merged
    matrices = np.concatenate([np.full(int(np.prod(s)), len(s) == 2) for s in SHAPES.values()])
    assert np.abs(theirs - found.base - found.vectors.sum(0))[matrices].max() < 1.1 * 300 * 1e-5
    flow = ours(name, "wudi", 1.0, time=1e9, keep=1.0, matrices="all")
    converged = golden("fusion-bench-wudi").merged
    assert_parts(name, flow, converged, ITERATIVE)


def test_fisher_information_has_no_cross_terms() -> None:
    # The square of a sum over classes is not the sum of squares that the definition asks for.
    name = "fusion-bench-fisher-summed"
    found = ours(name, "fisher", 1.0, calibration=calibration(), labels="exact")
    assert_parts(name, found, golden("fusion-bench-fisher").merged, SPECTRAL)


# ----------------------------------------------------------------------------
# What is random: facts about masks, on both sides
# ----------------------------------------------------------------------------


def survivors(name: str, merged: Floats) -> Floats:
    """Change over task vector of a single expert: 0 where it was dropped."""
    found = family_of(name)
    return np.round((merged - found.base) / found.vectors[0], 3)


@pytest.mark.parametrize(
    ("name", "operator", "options"),
    [
        ("mergekit-dare-linear-half", "dare", {"drop": 0.5, "vectors": "drop"}),
        ("mergekit-dare-ties-half", "dare_ties", {"drop": 0.5, "vectors": "drop"}),
        ("fusion-bench-dare-half", "dare", {"drop": 0.5, "vectors": "drop"}),
    ],
)
def test_dare_keeps_half(name: str, operator: str, options: Mapping[str, Any]) -> None:
    for merged in (golden(name).merged, ours(name, operator, 1.0, **options)):
        kept = survivors(name, merged) != 0
        assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(kept.size)  # four standard deviations


def test_dare_divides_by_the_probability() -> None:
    # As the paper does, so that the expectation is the task vector. mergekit restores the L1 norm
    # of the whole instead: a factor that the draw decides, another one for every tensor.
    assert set(survivors("fusion-bench-dare-half", golden("fusion-bench-dare-half").merged)) == {
        0.0,
        2.0,
    }
    for operator in ("dare", "dare_ties"):
        found = ours("mergekit-dare-linear-half", operator, 1.0, drop=0.5, vectors="drop")
        assert set(survivors("mergekit-dare-linear-half", found)) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("name", "operator", "options"),
    [
        ("mergekit-dare-linear-half", "dare", {"drop": 0.5}),
        ("mergekit-dare-ties-half", "dare_ties", {"drop": 0.5}),
        ("mergekit-della-linear-half", "della_linear", {"density": 0.5, "epsilon": 0.4}),
    ],
)
def test_rescaling_to_the_norm_is_that_of_mergekit(
    name: str, operator: str, options: Mapping[str, Any]
) -> None:
    found = family_of(name)
    for merged in (
        golden(name).merged,
        ours(name, operator, 1.0, rescale="l1", vectors="drop", **options),
    ):
        change = merged - found.base
        factors = []
        for part in found.tensors():
            kept = np.abs(change[part]) > 1e-6
            ratio = (change[part] / found.vectors[0, part])[
                kept & (np.abs(found.vectors[0, part]) > 0.01)
            ]
            assert np.ptp(ratio) < 1e-4  # one factor for the tensor
            assert np.abs(change[part]).sum() == pytest.approx(
                np.abs(found.vectors[0, part]).sum(), rel=1e-5
            )
            factors.append(float(ratio[0]))
        assert np.ptp(factors) > 0.1


def test_della_keeps_large_changes_more_often() -> None:
    # Ranks are those of a row; probabilities run from 0.1 to 0.9, so that its halves keep 0.3 and
    # 0.7 on average.
    name = "mergekit-della-linear-half"
    merged = [
        golden(name).merged,
        ours(name, "della_linear", 1.0, density=0.5, epsilon=0.4, vectors="drop"),
    ]
    for change in merged:
        kept = survivors(name, change) != 0
        upper = upper_half(family_of(name).vectors[0])
        assert kept[upper].mean() == pytest.approx(0.7, abs=0.06)
        assert kept[~upper].mean() == pytest.approx(0.3, abs=0.06)


def upper_half(vector: Floats) -> npt.NDArray[np.bool_]:
    """Where a magnitude is in the larger half of its row."""
    found = []
    for part, shape in zip(Family(vector, vector[None]).tensors(), SHAPES.values(), strict=True):
        rows = np.abs(vector[part]).reshape(-1, shape[-1])
        found.append((rows >= np.median(rows, axis=1, keepdims=True)).reshape(-1))
    return np.concatenate(found)


def test_della_divides_by_each_probability() -> None:
    # Rank r of n is kept with probability p_r, and then divided by it: unbiased, which one factor
    # for all cannot be.
    name = "mergekit-della-linear-half"
    found = ours(name, "della_linear", 1.0, density=0.5, epsilon=0.4, vectors="drop")
    ranks = np.concatenate(
        [_row_ranks(family_of(name).vectors[0, part], shape) for part, shape in _parts(name)]
    )
    factors = survivors(name, found)
    expected = np.round(1 / (0.1 + 0.8 * ranks), 3)
    assert np.abs(factors - expected)[factors != 0].max() < 0.01


def _parts(name: str) -> list[tuple[slice, tuple[int, ...]]]:
    return list(zip(family_of(name).tensors(), SHAPES.values(), strict=True))


def _row_ranks(vector: Floats, shape: tuple[int, ...]) -> Floats:
    """0 for the smallest magnitude of a row, 1 for the largest."""
    rows = np.abs(vector).reshape(-1, shape[-1])
    return (rows.argsort(1).argsort(1) / (shape[-1] - 1)).reshape(-1)


def test_dare_passes_norms_and_biases() -> None:
    # "Linear weights only" leaves out embeddings as well there, by the class of the layer; ours
    # goes by shape.
    name = "fusion-bench-dare-matrices"
    theirs = survivors(name, golden(name).merged)
    mine = survivors(name, ours(name, "dare", 1.0, drop=0.5))
    for (part, shape), key in zip(_parts(name), SHAPES, strict=True):
        whole = {"theirs": set(theirs[part]) == {1.0}, "ours": set(mine[part]) == {1.0}}
        assert whole == {
            "theirs": len(shape) == 1 or key == "embed_tokens.weight",
            "ours": len(shape) == 1,
        }


# ----------------------------------------------------------------------------
# The files themselves
# ----------------------------------------------------------------------------

#: Neither package has them; OPCM one expert at a time is compared with OPCM.
WITHOUT_PEER = frozenset(
    {
        "blend",
        "localize_and_stitch",
        "lora_sparse",
        "opcm_add",
        "optmerge",
        "pcb",
        "pleas",
        "stack",
        "varm",
        "widen",
    }
)


def test_adamerging_learns_what_their_loop_learns(tmp_path: Path) -> None:
    """Coefficients of every tensor after 20 steps, with our gradients, through our steps."""
    theirs = golden("fusion-bench-adamerging")
    settings = theirs.about["settings"]
    (base, experts) = generated(3, "aligned")
    for name, state in {"base": base, **experts}.items():
        save_file(tensors(state), tmp_path / f"{name}.safetensors")
    sources = tuple(
        Source(name, str(tmp_path / f"{name}.safetensors")) for name in ("base", *experts)
    )
    recipe = Recipe(sources[0], sources[1:], "task_arithmetic", Field.constant(1, [0.0] * 3))
    arenas = open_arenas(recipe, tmp_path / "arenas")
    merged = MergedModel(Tiny(base), arenas)
    merged.enable_gradient()
    starts = np.array([*(spec.start for spec in arenas.layout.tensors), arenas.layout.size])
    batches = {name: inputs_of(name).split(settings["batch"]) for name in experts}

    def loss_and_gradient_at(point: Floats, batch: Batch) -> tuple[float, Floats]:
        field = Field(starts, point.reshape(3, -1))
        total = 0.0
        merged.write(field)
        merged.clear_gradient()
        for parts in batches.values():  # they sum the tasks' losses
            log_p = merged.model(parts[batch.number % len(parts)]).log_softmax(-1)
            loss = -(log_p.exp() * log_p).sum(-1).mean()
            loss.backward()
            total += float(loss.detach())
        return total, merged.gradient(field).ravel()

    start = np.full(3 * len(SHAPES), settings["init"])
    wide = np.full(start.size, 9.0)
    rule = OptimizerConfig(-wide, wide, start, {}, learning_rate=settings["lr"])
    found = take_gradient_steps(
        GradientSteps(rule, init_state(rule, start), settings["steps"]), start, loss_and_gradient_at
    )
    assert found.state is not None
    order = [list(SHAPES).index(name) for name in arenas.layout.names]
    learned = np.empty((len(SHAPES), 3))
    learned[order] = found.state.raw.reshape(3, -1).T
    expected = theirs.merged.reshape(len(SHAPES), 3)
    assert np.abs(expected - settings["init"]).max() > 0.1
    assert np.abs(learned - expected).max() <= 1e-5


def test_every_operator_is_compared_or_has_no_peer() -> None:
    text = Path(__file__).read_text()
    assert [name for name in OPERATORS if f'"{name}"' not in text] == []
    assert set(OPERATORS) >= WITHOUT_PEER


def test_every_golden_file_is_compared_and_was_made_from_these_weights() -> None:
    text = Path(__file__).read_text()
    files = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    made_from = digest()
    assert [name for name in files if f'"{name}"' not in text] == []
    for name in files:
        about = golden(name).about
        assert about["inputs"] == made_from, "the generated weights changed: run `make peers`"
        assert {"peer", "version", "function", "settings"} <= set(about)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 600_000
