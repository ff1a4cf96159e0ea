"""PLeaS, second step: layers fitted to the mean features of base and experts.

Nasery 2024, "PLeaS: Merging Models with Permutations and Least Squares". The first step, which
brings experts into the coordinates of the base and keeps units apart in wider layers, is
``align: pleas`` (:mod:`mergesearch.merging.alignment.pleas`); without it, or with any other
alignment, all units are shared. The base is one of the models that are merged. Every linear layer
and convolution is the least squares solution that maps the mean of the models' inputs to the mean
of their outputs (:mod:`mergesearch.merging.operators.parts.least_squares`), each model running on
the same items, those of all experts. All other tensors are the mean of the models; running
statistics follow their policy.

Without ``calibration`` the models run on noise, which needs no data at all. The paper's data-free
variant runs them on images of other tasks: give a folder of such items for it.

Coefficient 1 for all experts is the paper's merge. The fit is a sum of what it owes to each
expert, and coefficients scale these parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import (
    DEFAULTS,
    Calibration,
    CalibrationSpec,
    ExpertItems,
    refuse_calibration,
)
from mergesearch.merging.models.expert_runner import ExpertRunner
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.features import (
    MatrixLayer,
    matrix_layers,
    read_inputs,
)
from mergesearch.merging.operators.parts.least_squares import (
    Layer,
    Moments,
    fitted,
    owners,
    shares_of,
)
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.owned import owned_units
from mergesearch.merging.tensors.per_tensor import Pieces, memoised_per_tensor
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Batches of noise, and items in each.
NOISE = (4, 32)


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    calibration: Annotated[
        ExpertItems | None,
        Field(description="Items to run base and experts on; without them they run on noise."),
    ] = None,
    ridge: Annotated[
        float,
        Field(gt=0, description="Pull towards the mean of the layers, relative to their inputs."),
    ] = 0.01,
) -> Basis:
    """Parts of the least squares fit that are owed to each expert.

    While items are run, memory holds base and experts as models, and for each layer the second
    moments of its inputs, once for each of them and once for their mean.
    """
    runner = ExpertRunner(calibration or _noise(base), base, experts)
    what = ["pleas", ridge]
    key = [*what, "noise"] if calibration is None else runner.key(what, [e.name for e in experts])
    pieces = memoised_per_tensor((base, *experts), key, partial(_fits, runner, experts, ridge))

    def rows(name: str) -> list[torch.Tensor]:
        found = pieces(name)
        if found:
            device = base.read(name).device
            return [found[str(k)].to(device, copy=True) for k in range(len(experts))]
        return [delta / (1 + len(experts)) for delta in task_vectors(base, experts, name)]

    return Basis("delta", len(experts), rows)


def _noise(base: TensorSource) -> CalibrationSpec:
    """A calibration without items, for models that run on noise."""
    from mergesearch.merging.models.model_classes import auto_classes

    config = getattr(base, "config", None)
    given = {"data": "", "model_class": auto_classes(config)[0] if config else "", "inputs": {}}
    return cast(CalibrationSpec, {**DEFAULTS, **given})


def _fits(runner: ExpertRunner, experts: Sequence[TensorSource], ridge: float) -> Pieces:
    """Rows of the weights and biases of all layers that the items run through."""
    sources = (runner.base, *experts)
    layers = matrix_layers(runner.model, runner.views)
    moments = _collected(runner, experts, layers)
    for layer in layers.values():
        if layer.weight not in moments:
            continue
        stored = [source.read(layer.weight) for source in sources]
        parts = fitted(_as_matrices(layer, sources, stored), moments.pop(layer.weight), ridge)
        kept = _row_dtype(stored)
        weights = [layer.stored(weight, stored[0].shape).to(kept) for weight, _ in parts]
        yield layer.weight, {str(k): weight for k, weight in enumerate(weights)}
        if layer.bias is not None:
            biases = [bias.to(kept) for _, bias in parts if bias is not None]
            yield layer.bias, {str(k): bias for k, bias in enumerate(biases)}


def _row_dtype(stored: Sequence[torch.Tensor]) -> torch.dtype:
    import torch

    return torch.float64 if any(t.dtype == torch.float64 for t in stored) else torch.float32


def _as_matrices(
    layer: MatrixLayer, sources: Sequence[TensorSource], stored: Sequence[torch.Tensor]
) -> Layer:
    weights = [layer.matrix(tensor.double()) for tensor in stored]
    owned = [owned_units(source, layer.weight) for source in sources]
    outputs, inputs = weights[0].shape
    return Layer(
        weights,
        None if layer.bias is None else [source.read(layer.bias).double() for source in sources],
        owners(owned, layer.inputs, inputs // layer.patch).repeat_interleave(layer.patch, 1),
        owners(owned, 1 - layer.inputs, outputs),
    )


def _collected(
    runner: ExpertRunner, experts: Sequence[TensorSource], layers: Mapping[str, MatrixLayer]
) -> dict[str, Moments]:
    """Stored name of a weight -> moments of its inputs in all models."""
    sources = (runner.base, *experts)
    models = [runner, *(ExpertRunner(runner.calibration, runner.origin, experts) for _ in experts)]
    for model, source in zip(models, sources, strict=True):
        model.load_all(source)
    moments: dict[str, Moments] = {}
    for items in _items(runner, experts):
        read = [read_inputs(model, [*layers.values()], items) for model in models]
        for name, layer in layers.items():
            given = [found[layer.module] for found in read if layer.module in found]
            # Experts of a mixture are run on the tokens that each model sends them.
            if len(given) < len(read) or len({each.shape for each in given}) > 1:
                continue
            if name not in moments:
                moments[name] = Moments(_input_shares(layer, sources))
            moments[name].add(given)
    return moments


def _input_shares(layer: MatrixLayer, sources: Sequence[TensorSource]) -> torch.Tensor:
    size = sources[0].shape(layer.weight)[layer.inputs]
    owned = [owned_units(source, layer.weight) for source in sources]
    return shares_of(owners(owned, layer.inputs, size)).repeat_interleave(layer.patch, 1)


def _items(runner: ExpertRunner, experts: Sequence[TensorSource]) -> list[Items]:
    """The items of all experts, once where they share them, or noise."""
    given: Any = runner.calibration
    if isinstance(given, Calibration):
        apart = isinstance(given.batches, Mapping)
    elif not given["data"]:
        return _noisy_items(runner)
    else:
        apart = not isinstance(given["data"], str) or "domain" in given
    return [
        items for expert in experts[: None if apart else 1] for items in runner.items(expert.name)
    ]


def _noisy_items(runner: ExpertRunner) -> list[Items]:
    from mergesearch.merging.alignment.subject import made_up

    batches, size = NOISE
    return [Items(made_up(runner.model, seed, size)) for seed in range(batches)]


def _refused(layout: Layout, experts: int, options: Options) -> str | None:
    return None if options["calibration"] is None else refuse_calibration(layout, experts, options)


PLEAS = Operator(
    name="pleas",
    prepare=prepare,
    summary="layers fitted by least squares to the mean features of base and experts",
    paper="Nasery 2024, PLeaS: Merging Models with Permutations and Least Squares",
    family="data",
    scope="S",
    identities=frozenset({"base_at_zero", "permutation", "linearity"}),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    needs=frozenset({"inputs"}),
    refuse=_refused,
    # Second moments of a layer, up to four times its weight, for each model, and the solve in fp64.
    copies=lambda experts: 10 * experts + 40,
    when="for models that share no start, after `align`: pleas, activation_matching or another; "
    "the base is one of those that are merged",
)
