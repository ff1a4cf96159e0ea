"""What fusion-bench makes of the generated weights. Runs in the peers' environment only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.dop.dop_general import DOPMerging
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.fisher_merging.fisher_merging import (
    FisherMergingAlgorithm,
    get_param_squared_gradients,
)
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.linear.expo import ExPOAlgorithm
from fusion_bench.method.magmax import magmax_merge
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.opcm.opcm_general import OPCM
from fusion_bench.method.regmean.regmean import RegMeanAlgorithm
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.singular_value_calibration.utils import (
    subspace_consistency_spectral_calibration_accelerated,
)
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from omegaconf import OmegaConf
from torch import nn

from tests.peers.case import Case, State
from tests.peers.inputs import SHAPES
from tests.peers.tiny import Tiny, inputs_of

SEED = 7


def simple_average(base: State, experts: Mapping[str, State]) -> State:
    """fusion_bench.method.SimpleAverageAlgorithm."""
    return _state(SimpleAverageAlgorithm().run(_pool(base, experts)))


def task_arithmetic(base: State, experts: Mapping[str, State], *, scaling_factor: float) -> State:
    """fusion_bench.method.TaskArithmeticAlgorithm."""
    return _state(TaskArithmeticAlgorithm(scaling_factor=scaling_factor).run(_pool(base, experts)))


def expo(base: State, experts: Mapping[str, State], *, extrapolation_factor: float) -> State:
    """fusion_bench.method.ExPOAlgorithm."""
    return _state(
        ExPOAlgorithm(extrapolation_factor=extrapolation_factor).run(_pool(base, experts))
    )


def layer_wise(
    base: State, experts: Mapping[str, State], *, first: Sequence[float], step: float
) -> State:
    """fusion_bench.models.wrappers.LayerWiseMergedModel (AdaMerging's table of coefficients)."""
    table = torch.tensor(
        [[start + step * place for place in range(len(SHAPES))] for start in first]
    )
    model = LayerWiseMergedModel(
        table, Tiny(base), [Tiny(state) for state in experts.values()], clamp_weights=False
    )
    # The table goes by the order of the module's parameters.
    assert [name for name, _ in model.pretrained_model.named_parameters()] == list(SHAPES)
    return _state(model.merge_and_unload())


def adamerging(
    base: State, experts: Mapping[str, State], *, lr: float, steps: int, init: float, batch: int
) -> State:
    """The coefficients that LayerWiseAdaMergingAlgorithm of fusion_bench learns."""
    settings = {"optimizer": "adam", "lr": lr, "max_steps": steps}
    table = torch.full((len(experts), len(SHAPES)), init)
    model = LayerWiseMergedModel(
        table, Tiny(base), [Tiny(state) for state in experts.values()], clamp_weights=False
    )
    algorithm = _AdaMerging(OmegaConf.create(settings), list(experts), batch)
    learned = algorithm.test_time_adaptation(model).merge_weight.detach()
    return {name: learned[:, place] for place, name in enumerate(SHAPES)}


class _AdaMerging(LayerWiseAdaMergingAlgorithm):
    """Their loop on the generated items, a batch of every task in turn."""

    def __init__(self, config: Any, tasks: Sequence[str], batch: int) -> None:
        super().__init__(config)
        self.modelpool = BaseModelPool(dict.fromkeys(tasks))
        self._batches = {name: itertools.cycle(inputs_of(name).split(batch)) for name in tasks}

    def get_shuffled_test_loader_iter(self, task: str) -> Iterator[Any]:
        yield (next(self._batches[task]),)

    def compute_logits(self, module: Any, images: torch.Tensor, task: str) -> torch.Tensor:
        return module(images)


def ties(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """fusion_bench.method.TiesMergingAlgorithm."""
    return _state(TiesMergingAlgorithm(remove_keys=[], **settings).run(_pool(base, experts)))


def dare(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """fusion_bench.method.dare.DareTaskArithmetic."""
    return _drawn(lambda: DareTaskArithmetic(**settings).run(_pool(base, experts)))


def dare_ties(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """fusion_bench.method.dare.DareTiesMerging."""
    return _drawn(lambda: DareTiesMerging(remove_keys=[], **settings).run(_pool(base, experts)))


def slerp(base: State, experts: Mapping[str, State], *, t: float) -> State:
    """fusion_bench.method.SlerpMergeAlgorithm."""
    return _state(SlerpMergeAlgorithm(t=t).run(_pool(base, experts)))


def model_stock(base: State, experts: Mapping[str, State]) -> State:
    """fusion_bench.method.ModelStock."""
    return _state(ModelStock().run(_pool(base, experts)))


def tsv(base: State, experts: Mapping[str, State], *, alpha: float) -> State:
    """fusion_bench.method.TaskSingularVectorMerging (TSV-M)."""
    return _state(TaskSingularVectorMerging(alpha=alpha).run(_pool(base, experts)))


def iso_c(base: State, experts: Mapping[str, State], *, scaling_factor: float) -> State:
    """fusion_bench.method.ISO_C_Merge."""
    return _state(ISO_C_Merge(scaling_factor=scaling_factor).run(_pool(base, experts)))


def iso_cts(base: State, experts: Mapping[str, State], **settings: float) -> State:
    """fusion_bench.method.ISO_CTS_Merge."""
    return _state(ISO_CTS_Merge(**settings).run(_pool(base, experts)))


def knots(
    base: State, experts: Mapping[str, State], *, threshold: float, scaling_factor: float
) -> State:
    """fusion_bench.method.knots.subspace_alignment, then ties_merging of the aligned task vectors.

    Matrices only: the package has no driver for it. Vectors are averaged, as its spectral methods
    do.
    """
    vectors = _task_vectors(base, experts)
    merged = dict(base)
    for name, shape in SHAPES.items():
        rows = [vector[name] for vector in vectors]
        if len(shape) == 2:
            left, values, right = subspace_alignment(rows)
            aligned = torch.stack([(values[:, None] * part).reshape(-1) for part in right])
            change = left @ ties_merging(
                aligned, reset_thresh=threshold, merge_func="mean"
            ).reshape(-1, shape[1])
            merged[name] = base[name] + scaling_factor * change
        else:
            merged[name] = base[name] + scaling_factor * torch.stack(rows).mean(0)
    return merged


def wudi(base: State, experts: Mapping[str, State], *, iter_num: int, shrink: float) -> State:
    """fusion_bench.method.wudi.wudi_merging.

    Its optimiser moves no element by more than 1e-5 a step: task vectors are divided by ``shrink``,
    what comes out is multiplied by it.
    """
    vectors = [
        {name: tensor / shrink for name, tensor in vector.items()}
        for vector in _task_vectors(base, experts)
    ]
    with torch.enable_grad():
        merged = wudi_merging(vectors, accelerator="cpu", iter_num=iter_num)
    return {name: base[name] + shrink * merged[name].detach() for name in base}


class _Head(nn.Module):
    """A head that is not linear: fusion-bench models have no linear one and do not clean it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def opcm(base: State, experts: Mapping[str, State], *, alpha: float) -> State:
    """fusion_bench.method.opcm.OPCM, experts in the given order."""
    pool = _pool(base, experts)
    pool.change = lambda model: setattr(model, "head", _Head(model.head.weight.data))
    return _state(OPCM(alpha=alpha, shuffle_order=False, save_on_every_step=False).run(pool))


def doge(base: State, experts: Mapping[str, State], **settings: float) -> State:
    """fusion_bench.method.DOGE_TA_Algorithm."""
    return _state(DOGE_TA_Algorithm(**settings).run(_pool(base, experts)))


def dop(base: State, experts: Mapping[str, State], **settings: Any) -> State:
    """fusion_bench.method.dop.DOPMerging, experts in the given order."""
    return _state(DOPMerging(exclude_keys=["head"], **settings).run(_pool(base, experts)))


def magmax(base: State, experts: Mapping[str, State], *, scaling_factor: float) -> State:
    """fusion_bench.method.magmax.magmax_merge."""
    tuned = [Tiny(state) for state in experts.values()]
    return _state(magmax_merge(Tiny(base), tuned, scaling_factor))


def svc(base: State, experts: Mapping[str, State], *, scale: float, alpha: float) -> State:
    """subspace_consistency_spectral_calibration_accelerated of task arithmetic, per matrix."""
    merged = {
        name: tensor + scale * sum(state[name] - tensor for state in experts.values())
        for name, tensor in base.items()
    }
    return merged | {
        name: subspace_consistency_spectral_calibration_accelerated(
            tensor, [state[name] for state in experts.values()], merged[name], alpha
        )
        for name, tensor in base.items()
        if tensor.ndim == 2
    }


def emr(base: State, experts: Mapping[str, State]) -> State:
    """fusion_bench.method.emr_merging.utils.emr_merge, the unified vector."""
    unified, _, _ = emr_merge(_task_vectors(base, experts))
    return {name: base[name] + unified[name] for name in base}


def tall_masks(base: State, experts: Mapping[str, State], *, tall_mask_lambda: float) -> State:
    """generate_task_masks of fusion_bench: how many experts claim each position."""
    flat = {key: _flat(state) for key, state in {"base": base, **experts}.items()}
    tuned = torch.stack([flat[name] for name in experts])
    masks = generate_task_masks(
        tuned - flat["base"], tuned, flat["base"], tall_mask_lambda=tall_mask_lambda
    )
    return _unflat(masks.to(torch.float32).sum(0))


def shared_mask(
    base: State, experts: Mapping[str, State], *, scaling_factor: float, logit: float
) -> State:
    """TaskWiseMergedModel of fusion_bench with a mask, as Concrete task arithmetic applies it.

    The mask is σ(logit · base / 0.5) over its mean per tensor: learned logits are replaced by known
    numbers.
    """
    mask = {name: torch.sigmoid(logit * tensor / 0.5) for name, tensor in base.items()}
    mask = {name: m / torch.mean(m) for name, m in mask.items()}
    model = TaskWiseMergedModel(
        torch.full((len(experts),), scaling_factor),
        Tiny(base),
        [Tiny(state) for state in experts.values()],
        clamp_weights=False,
    )
    return _state(model.merge_and_unload(mask))


class _Gram:
    """Forward hooks that keep ``xᵀx / n`` of every linear layer's inputs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.handles = [
            module.register_forward_hook(self._keep(name)) for name, module in modules.items()
        ]

    def _keep(self, name: str) -> Any:
        def hook(
            _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor
        ) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self.sums[name] = x.T @ x / x.shape[0]

        return hook

    def close(self) -> dict[str, torch.Tensor]:
        for handle in self.handles:
            handle.remove()
        return self.sums


class _TinyRegMean(RegMeanAlgorithm):
    """RegMean for the tiny model: the method's user supplies the Grams."""

    def get_regmean_weights(
        self,
        model_name: str,
        model: nn.Module,
        train_dataset: Any,
        linear_modules_to_merge: Mapping[str, nn.Module],
    ) -> dict[str, torch.Tensor]:
        grams = _Gram(linear_modules_to_merge)
        model(train_dataset)
        return grams.close()


class _TinyRegMeanPlusPlus(RegMeanAlgorithmPlusPlus):
    """RegMean++ for the tiny model: the method's user supplies blocks, embeddings and Grams."""

    def merge_embedding_layer(self, models_to_merge_dict: Mapping[str, nn.Module]) -> State:
        rows = [
            model.state_dict()["embed_tokens.weight"] for model in models_to_merge_dict.values()
        ]
        return {"embed_tokens.weight": torch.stack(rows).mean(0)}

    def get_input_for_first_layer(
        self, model: Tiny, train_dataset: torch.Tensor
    ) -> list[torch.Tensor]:
        return [model.embed_tokens(train_dataset)]

    def get_layers(self, model: Tiny) -> nn.ModuleList:
        return model.encoder.layers

    def update_merged_params_dict(
        self, merged_params_dict: State, new_merged_params: State, layer_idx: int
    ) -> dict[str, torch.Tensor]:
        found = {
            f"encoder.layers.{layer_idx}.{name}": tensor
            for name, tensor in new_merged_params.items()
        }
        return {**merged_params_dict, **found}

    def layer_batches_forward(
        self, layer: nn.Module, batches_input: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return [layer(batch) for batch in batches_input]

    def get_regmean_weights(
        self,
        model_name: str,
        layer: nn.Module,
        batches_input: Sequence[torch.Tensor],
        linear_modules_to_merge: Mapping[str, nn.Module],
    ) -> dict[str, torch.Tensor]:
        grams = _Gram(linear_modules_to_merge)
        self.layer_batches_forward(layer, batches_input)
        return grams.close()


def regmean(base: State, experts: Mapping[str, State], *, reduce: float) -> State:
    """fusion_bench.method.RegMeanAlgorithm on the tiny model."""
    method = _TinyRegMean(
        num_regmean_examples=12,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=reduce,
        weight_transpose=True,
    )
    return _state(method.run(_pool(base, experts)))


def regmean_plus_plus(base: State, experts: Mapping[str, State], *, reduce: float) -> State:
    """fusion_bench.method.RegMeanAlgorithmPlusPlus on the tiny model.

    It leaves embeddings (in the result) and everything after the blocks to its user: those are
    averaged here.
    """
    method = _TinyRegMeanPlusPlus(
        num_regmean_examples=12,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=reduce,
        weight_transpose=True,
    )
    merged = _state(method.run(_pool(base, experts)))
    for name in ("embed_tokens.weight", "head.weight"):
        merged[name] = torch.stack([state[name] for state in experts.values()]).mean(0)
    return merged


class _TinyFisher(FisherMergingAlgorithm):
    """Fisher merging for the tiny model, one example at a time.

    Every user of the class supplies the Fisher weights. ``exact`` is the expectation over labels
    that the paper defines; otherwise the square of one gradient of the sum over classes of sqrt(p)
    log p, as all users in the package write it.
    """

    exact = True

    def get_fisher_weights(
        self,
        model_name: str,
        model: nn.Module,
        train_dataset: torch.Tensor,
        param_names_to_merge: Sequence[str],
    ) -> State:
        total: State = {name: torch.zeros(SHAPES[name]) for name in param_names_to_merge}
        for sample in train_dataset:
            for score in self._scores(model(sample[None])[0]):
                model.zero_grad()
                score.backward(retain_graph=True)
                for name, square in get_param_squared_gradients(
                    model, list(param_names_to_merge)
                ).items():
                    total[name] += square
        return {name: tensor / len(train_dataset) for name, tensor in total.items()}

    def _scores(self, logits: torch.Tensor) -> list[torch.Tensor]:
        log_p = torch.log_softmax(logits, -1)
        terms = torch.softmax(logits, -1).detach().sqrt() * log_p
        return list(terms) if self.exact else [terms.sum()]


def fisher(base: State, experts: Mapping[str, State], *, exact: bool, normalize: bool) -> State:
    """fusion_bench.method.FisherMergingAlgorithm on the tiny model."""
    method = _TinyFisher(
        exclude_param_names_regex=[],
        normalize_fisher_weight=normalize,
        minimal_fisher_weight=1e-6,
        num_fisher_examples=12,
    )
    method.exact = exact
    with torch.enable_grad():
        return _state(method.run(_pool(base, experts)))


class _Pool(BaseModelPool):
    """Models of the tiny shape; every load gives a new one, as loading from disk would."""

    def __init__(self, base: State, experts: Mapping[str, State]) -> None:
        super().__init__(
            {"_pretrained_": nn.Identity(), **{name: nn.Identity() for name in experts}}
        )
        self.states = {"_pretrained_": base, **experts}
        self.change: Callable[[Tiny], None] = lambda model: None

    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Tiny:
        model = Tiny(self.states[str(model_name_or_config)])
        self.change(model)
        return model

    def load_train_dataset(self, dataset_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        return inputs_of(dataset_name)


def _pool(base: State, experts: Mapping[str, State]) -> _Pool:
    return _Pool(base, experts)


def _state(model: Any) -> State:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _drawn(run: Any) -> State:
    """Masks are drawn from torch's global generator, seeded here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return _state(run())


def _task_vectors(base: State, experts: Mapping[str, State]) -> list[State]:
    return [{name: state[name] - base[name] for name in base} for state in experts.values()]


def _flat(state: State) -> torch.Tensor:
    return torch.cat([state[name].reshape(-1) for name in SHAPES])


def _unflat(flat: torch.Tensor) -> State:
    sizes = [int(torch.Size(shape).numel()) for shape in SHAPES.values()]
    parts = zip(SHAPES.items(), flat.split(sizes), strict=True)
    return {name: part.reshape(shape).clone() for (name, shape), part in parts}


# Percentages that are no whole number of elements, which the package rounds otherwise than we do.
_TIES = {"scaling_factor": 1.0, "threshold": 19.7}
_DARE = {"scaling_factor": 0.3, "only_on_linear_weights": False, "rescale": True}

CASES = (
    Case("fusion-bench-average", simple_average),
    Case("fusion-bench-task-arithmetic", task_arithmetic, {"scaling_factor": 0.3}, experts=4),
    Case("fusion-bench-expo", expo, {"extrapolation_factor": 0.5}, experts=1),
    Case("fusion-bench-layer-wise", layer_wise, {"first": (0.1, 0.5, -0.2), "step": 0.03}),
    Case("fusion-bench-adamerging", adamerging, {"lr": 0.01, "steps": 20, "init": 0.3, "batch": 4}),
    Case("fusion-bench-ties-mean", ties, {**_TIES, "merge_func": "mean"}, kind="rivals"),
    Case(
        "fusion-bench-ties-sum",
        ties,
        {**_TIES, "scaling_factor": 0.3, "merge_func": "sum"},
        kind="rivals",
    ),
    Case("fusion-bench-ties-max", ties, {**_TIES, "merge_func": "max"}, kind="rivals"),
    Case(
        "fusion-bench-ties-whole",
        ties,
        {**_TIES, "threshold": 20, "merge_func": "mean"},
        kind="rivals",
    ),
    Case(
        "fusion-bench-ties-mirrored",
        ties,
        {**_TIES, "threshold": 99.99, "merge_func": "mean"},
        experts=2,
        kind="mirrored",
    ),
    Case(
        "fusion-bench-ties-one-percent",
        ties,
        {**_TIES, "threshold": 1.5, "merge_func": "mean"},
        kind="rivals",
    ),
    Case("fusion-bench-dare-all", dare, {**_DARE, "sparsity_ratio": 0.0}),
    Case(
        "fusion-bench-dare-half",
        dare,
        {**_DARE, "scaling_factor": 1.0, "sparsity_ratio": 0.5},
        experts=1,
    ),
    Case(
        "fusion-bench-dare-matrices",
        dare,
        {**_DARE, "scaling_factor": 1.0, "sparsity_ratio": 0.5, "only_on_linear_weights": True},
        experts=1,
    ),
    Case(
        "fusion-bench-dare-ties-all",
        dare_ties,
        {**_DARE, "sparsity_ratio": 0.0, "threshold": 19.7, "merge_func": "sum"},
        kind="rivals",
    ),
    Case("fusion-bench-slerp", slerp, {"t": 0.3}, experts=1),
    Case("fusion-bench-model-stock-two", model_stock, experts=2),
    Case("fusion-bench-model-stock", model_stock),
    Case("fusion-bench-tsv", tsv, {"alpha": 1.0}),
    Case("fusion-bench-tsv-four", tsv, {"alpha": 0.8}, experts=4),
    Case("fusion-bench-iso-c", iso_c, {"scaling_factor": 1.5}),
    Case("fusion-bench-iso-c-adapters", iso_c, {"scaling_factor": 1.0}, kind="adapters"),
    Case("fusion-bench-iso-cts", iso_cts, {"scaling_factor": 1.5, "common_space_fraction": 0.8}),
    Case("fusion-bench-knots", knots, {"threshold": 19.7, "scaling_factor": 0.6}, kind="rivals"),
    Case("fusion-bench-wudi", wudi, {"iter_num": 6000, "shrink": 100.0}),
    Case("fusion-bench-wudi-short", wudi, {"iter_num": 300, "shrink": 1.0}),
    Case("fusion-bench-magmax", magmax, {"scaling_factor": 0.5}),
    Case("fusion-bench-svc", svc, {"scale": 0.3, "alpha": 0.1}),
    Case(
        "fusion-bench-dop",
        dop,
        {
            "alpha": 0.8,
            "lr": 1e-4,
            "num_steps": 25,
            "ema_beta": 0.95,
            "svd_epsilon": 0.9,
        },
    ),
    Case("fusion-bench-opcm", opcm, {"alpha": 0.5}),
    Case("fusion-bench-doge", doge, {"subspace": 6, "K": 29.97, "lamda": 0.07}),
    Case("fusion-bench-emr", emr, kind="rivals"),
    Case("fusion-bench-tall-masks", tall_masks, {"tall_mask_lambda": 0.4}),
    Case("fusion-bench-shared-mask", shared_mask, {"scaling_factor": 0.3, "logit": 2.0}),
    Case("fusion-bench-regmean", regmean, {"reduce": 0.9}),
    Case("fusion-bench-regmean-plus-plus", regmean_plus_plus, {"reduce": 0.9}),
    Case("fusion-bench-fisher", fisher, {"exact": True, "normalize": False}),
    Case("fusion-bench-fisher-normalised", fisher, {"exact": True, "normalize": True}),
    Case("fusion-bench-fisher-summed", fisher, {"exact": False, "normalize": False}),
)
