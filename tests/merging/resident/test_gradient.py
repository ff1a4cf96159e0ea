"""Gradients of coefficients are those of finite differences, and of autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from experiments.zoo.digits_adapters import write_adapter
from mergesearch.merging import Field, InputError, MergesearchError, Recipe, RecipeError, Source
from mergesearch.merging.kernels.forms import ELECTIONS
from mergesearch.merging.kernels.products import factor_products, products
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.models.parameter_views import parameter_views
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.resident.arena import Arenas, open_arenas
from mergesearch.merging.resident.gradient import coefficient_gradient
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.segment_gram import arena_reader
from mergesearch.merging.resident.terms import Terms
from tests.merging.operators.calibrated import images, save_items

VISION = "AutoModelForImageClassification"
LANGUAGE = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., Any]
) -> dict[str, list[Path]]:
    """Base and two experts of each family, in fp64 but for one.

    Items and adapters lie beside the ViT.
    """
    root = tmp_path_factory.mktemp("gradient")
    result = {}
    for name in ("vit", "gpt2", "llama_tied", "llama_bf16"):
        model = build_model(name) if name == "llama_bf16" else build_model(name).double()
        folders = [root / name / part for part in ("base", "one", "two")]
        model.save_pretrained(folders[0])
        for seed, folder in enumerate(folders[1:]):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(
                        parameter.dtype
                    )
            model.save_pretrained(folder)
        result[name] = folders
    save_items(root / "items", images(12, 0))
    return result


def options_of(operator: str, families: dict[str, list[Path]]) -> tuple[tuple[str, Any], ...]:
    base = families["vit"][0]
    inputs = {
        "data": str(base.parents[1] / "items"),
        "model_class": VISION,
        "inputs": {"pixel_values": "pixels"},
    }
    needs = OPERATORS[operator].needs
    options: dict[str, Any] = {
        "layer_swap": {"bottom": 1, "top": 0},
        "dop": {"order": ["one", "two"]},
        "opcm": {"order": ["one", "two"]},
    }.get(operator, {})
    if needs:
        options = {
            **options,
            "calibration": {**inputs, **({"label": "label"} if "labeled" in needs else {})},
        }
    return tuple(sorted({**options, **({"steps": 2} if operator == "concrete" else {})}.items()))


def arenas_of(
    folders: list[Path],
    operator: str,
    folder: Path,
    options: tuple[tuple[str, Any], ...] = (),
    **changes: Any,
) -> Arenas:
    count = 1 if operator == "slerp" else 2
    experts = tuple(Source(path.name, str(path)) for path in folders[1 : 1 + count])
    if operator == "lora_sparse":
        paths = [
            write_adapter(folders[0], path, folder / path.name, rank=2) or folder / path.name
            for path in folders[1:]
        ]
        experts = tuple(Source(path.name, f"{folders[0]}+{path}") for path in paths)
    recipe = Recipe(
        Source("base", str(folders[0])),
        experts,
        operator,
        Field.constant(1, [0.0]),
        options,
        **changes,
    )
    return open_arenas(recipe, folder / "arenas")


def bind(folders: list[Path], arenas: Arenas, **options: Any) -> MergedModel:
    kind = VISION if "vit" in str(folders[0]) else LANGUAGE
    merged = MergedModel(load_model(str(folders[0]), kind), arenas, **options)
    merged.enable_gradient()
    return merged


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn((2, 1, 8, 8), generator=generator).to(model.dtype)}
    return {"input_ids": torch.randint(0, 96, (2, 7), generator=generator)}


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return (
        -(logits.double().softmax(-1) * logits.double().log_softmax(-1)).sum(-1).mean()
        + logits.square().mean()
    )


def halves(arenas: Arenas, seed: int = 0) -> Field:
    """Three segments, of which two cut a tensor."""
    specs = [spec for spec in arenas.layout.tensors if spec.size > 1]
    cuts = [0, specs[3].start + specs[3].size // 2, specs[-2].start + 3, arenas.layout.size]
    return Field(
        np.array(cuts),
        np.random.default_rng(seed).uniform(0.2, 0.6, (arenas.packing.directions, 3)),
    )


def by_backward(merged: MergedModel, field: Field) -> np.ndarray:
    merged.write(field)
    merged.clear_gradient()
    loss_of(merged.model(**inputs_of(merged.model)).logits).backward()
    return merged.gradient(field)


def by_differences(merged: MergedModel, field: Field, step: float = 1e-5) -> np.ndarray:
    result = np.zeros(field.values.shape)
    for index in np.ndindex(*result.shape):
        losses = []
        for sign in (1, -1):
            values = field.values.copy()
            values[index] += sign * step
            merged.write(Field(field.boundaries, values))
            with torch.no_grad():
                losses.append(float(loss_of(merged.model(**inputs_of(merged.model)).logits)))
        result[index] = (losses[0] - losses[1]) / (2 * step)
    return result


def by_autograd(merged: MergedModel, arenas: Arenas, field: Field) -> np.ndarray:
    """Through a merge that is written out, from base and rows."""
    wide = torch.from_numpy(arena_reader(arenas)(0, arenas.layout.size))
    base = wide[0]
    rows = wide[1:]
    values = torch.tensor(field.values, requires_grad=True)
    spread = values.repeat_interleave(torch.from_numpy(np.diff(field.boundaries)), dim=1)
    if arenas.form == "slerp":
        angles = torch.from_numpy(arenas.angles.at(np.arange(arenas.layout.size))[0])
        bent = angles > 0
        sine = torch.where(bent, angles, 1.0).sin()
        first = torch.where(bent, ((1 - spread[0]) * angles).sin() / sine, 1 - spread[0])
        second = torch.where(bent, (spread[0] * angles).sin() / sine, spread[0])
        weights = first * base + second * (base + rows[0])
    else:
        weights = base + (spread * rows).sum(0)
    specs = {name: merged.layout.by_name[own] for name, (_, own) in merged._binding.bound.items()}
    named = {name: weights[spec.start : spec.stop].view(spec.shape) for name, spec in specs.items()}
    loss_of(functional_call(merged.model, named, kwargs=inputs_of(merged.model)).logits).backward()
    return values.grad.numpy()


def assert_close(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-6) -> None:
    assert np.abs(other).max() > 0
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_is_that_of_differences_and_of_autograd(
    families: dict[str, list[Path]], tmp_path: Path, operator: str
) -> None:
    folders = families["vit"]
    arenas = arenas_of(folders, operator, tmp_path, options_of(operator, families))
    if arenas.form in ELECTIONS:
        with pytest.raises(InputError, match="elects signs in every trial and jumps"):
            bind(folders, arenas)
        return
    merged = bind(folders, arenas)
    field = halves(arenas)
    result = by_backward(merged, field)
    assert_close(result, by_differences(merged, field))
    assert_close(result, by_autograd(merged, arenas, field))


@pytest.mark.parametrize("operator", ["average", "task_arithmetic", "tsv", "slerp"])
@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_tied_weights_count_once(
    families: dict[str, list[Path]], tmp_path: Path, name: str, operator: str
) -> None:
    arenas = arenas_of(families[name], operator, tmp_path)
    merged = bind(families[name], arenas)
    field = halves(arenas)
    result = by_backward(merged, field)
    assert_close(result, by_autograd(merged, arenas, field))
    if name == "gpt2":  # Llama normalises in fp32 whatever its dtype, which differences cannot bear
        assert_close(result, by_differences(merged, field))


@pytest.mark.parametrize("t", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("angle", [0.0, 1.2])
def test_slerp_is_exact_at_its_ends_and_on_a_line(
    families: dict[str, list[Path]], tmp_path: Path, t: float, angle: float
) -> None:
    arenas = arenas_of(families["vit"], "slerp", tmp_path)
    arenas = replace(arenas, angles=Field.constant(arenas.layout.size, [angle]))
    merged = bind(families["vit"], arenas)
    field = Field.constant(arenas.layout.size, [t])
    result = by_backward(merged, field)
    assert_close(result, by_autograd(merged, arenas, field), 1e-10)


def test_scalars_summed_as_logarithms_follow_the_chain_rule(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    arenas = arenas_of(families["vit"], "task_arithmetic", tmp_path)
    bias = next(spec for spec in arenas.layout.tensors if spec.name == "classifier.bias")
    memory = np.array(arenas.memory)
    at = arenas.packing.parts[bias.name].base
    memory[at : at + 24].view(np.float64)[:] = [0.7, 1.1, 0.4]  # logarithms need numbers above 0
    special = replace(arenas.special, logs=frozenset({bias.name}))
    arenas = replace(arenas, memory=memory, special=special)
    merged = bind(families["vit"], arenas)
    assert bias.start == 0
    field = Field(np.array([0, 2, bias.stop, arenas.layout.size]), np.full((2, 3), 0.4))
    result = by_backward(merged, field)
    kept = merged._gradient.buffers[0].clone()
    assert_close(result, by_differences(merged, field))
    assert np.array_equal(merged.gradient(field), merged.gradient(field))
    assert torch.equal(merged._gradient.buffers[0], kept)


def test_passes_straight_through_the_rounding_of_bf16(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    folders = families["llama_bf16"]
    arenas = arenas_of(folders, "task_arithmetic", tmp_path)
    merged = bind(folders, arenas)
    field = halves(arenas)
    result = by_backward(merged, field)
    assert merged._gradient.buffers[0].dtype == torch.bfloat16
    flat = merged._gradient.buffers[0].double().numpy()
    rows = arena_reader(arenas)(0, arenas.layout.size)[1:]
    assert_close(result, np.add.reduceat(flat * rows, field.boundaries[:-1], axis=1), 1e-12)


def test_accumulates_over_backward_passes_in_place(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    arenas = arenas_of(families["vit"], "average", tmp_path)
    merged = bind(families["vit"], arenas)
    field = halves(arenas)
    once = by_backward(merged, field)
    merged.enable_gradient()  # a second time changes nothing
    loss_of(merged.model(**inputs_of(merged.model)).logits).backward()
    assert_close(merged.gradient(field), 2 * once, 1e-12)
    buffer = merged._gradient.buffers[0]
    first = buffer.data_ptr()
    last = buffer.data_ptr() + buffer.nbytes
    assert all(first <= parameter.grad.data_ptr() < last for parameter in merged.model.parameters())
    merged.clear_gradient()
    assert not merged.gradient(field).any()
    merged.model.zero_grad()
    with pytest.raises(MergesearchError, match=r"use clear_gradient\(\) instead of zero_grad"):
        merged.gradient(field)


def test_gathers_parts_of_fused_parameters(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    folders = [tmp_path / part for part in ("base", "one", "two")]
    for seed, folder in enumerate(folders):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            MixtralForCausalLM(
                MixtralConfig(**sizes, **heads, experts_implementation="eager")
            ).double().save_pretrained(folder)
    arenas = arenas_of(folders, "task_arithmetic", tmp_path)
    merged = bind(folders, arenas)
    merged.model.set_experts_implementation("eager")  # the others do not compute in fp64
    assert merged._binding.copied
    starts = [spec.start for spec in arenas.layout.tensors]
    cuts = np.array([*starts[:: len(starts) // 3], arenas.layout.size])
    field = Field(cuts, np.full((2, len(cuts) - 1), 0.3))
    result = by_backward(merged, field)
    # Norms and router compute in fp32 whatever the dtype: differences are rough, but a lost part
    # would show.
    assert_close(result, by_differences(merged, field, 1e-3), 2e-2)
    names = dict(merged.model.named_parameters())
    held = parameter_views(merged.model)
    rows = arena_reader(arenas)(0, arenas.layout.size)[1:]
    want = np.zeros(result.shape)
    for spec in arenas.layout.tensors:
        slope = held[spec.name].of(names[held[spec.name].parameter].grad).numpy().ravel()
        segment = int(np.searchsorted(cuts, spec.start, side="right")) - 1
        want[:, segment] += rows[:, spec.start : spec.stop] @ slope
    assert_close(result, want, 1e-12)
    merged.clear_gradient()
    assert not merged.gradient(field).any()


def test_refuses_what_no_gradient_reaches(families: dict[str, list[Path]], tmp_path: Path) -> None:
    arenas = arenas_of(families["vit"], "average", tmp_path)
    model = load_model(str(families["vit"][0]), VISION)
    plain = MergedModel(model, arenas)
    with pytest.raises(MergesearchError, match="expected enable_gradient"):
        plain.gradient(halves(arenas))
    statistics = replace(arenas.special, statistics=frozenset({"running_mean"}))
    with pytest.raises(InputError, match="no backward pass reaches"):
        bind(families["vit"], replace(arenas, special=statistics))
    with pytest.raises(InputError, match="elects signs"):
        bind(families["vit"], replace(arenas, form="elect_mean"))
    with pytest.raises(RecipeError, match="expected a field of 2 directions"):
        bind(families["vit"], arenas).gradient(Field.constant(arenas.layout.size, [1.0]))


@pytest.mark.parametrize("operator", ["average", "task_arithmetic", "slerp"])
def test_cosines_are_those_of_every_part_of_a_tensor(
    families: dict[str, list[Path]], tmp_path: Path, operator: str
) -> None:
    arenas = arenas_of(families["vit"], operator, tmp_path)
    merged = bind(families["vit"], arenas)
    field = halves(arenas)
    by_backward(merged, field)
    wide = arena_reader(arenas)(0, arenas.layout.size)
    gradient = merged._gradient.buffers[0].numpy()
    want = np.zeros(field.values.shape)
    for spec in arenas.layout.tensors:
        for segment, (low, high) in enumerate(
            zip(field.boundaries, field.boundaries[1:], strict=False)
        ):
            part = slice(max(spec.start, low), min(spec.stop, high))
            if part.start < part.stop:
                for k in range(len(want)):
                    g = gradient[part]
                    expert = (wide[0] + wide[1 + k])[part]
                    scale = np.linalg.norm(g) * np.linalg.norm(expert)
                    want[k, segment] += g @ expert / scale if scale else 0.0
    assert_close(merged.cosines(field), want, 1e-9)
    assert np.array_equal(merged.cosines(field), merged.cosines(field))


class TestProducts:
    """Of plain arrays."""

    def arrays(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(size)
        one = generator.standard_normal((5, size), dtype=np.float32)
        return one[0], one[1], one[2:]

    @pytest.mark.parametrize("size", [1, 63, 129, 70_001, 300_000])
    @pytest.mark.parametrize("from_base", [None, False, True])
    def test_kernels_agree_with_fp64_and_ignore_threads(
        self, size: int, from_base: bool | None
    ) -> None:
        vector, base, rows = self.arrays(size)
        cuts = np.unique([0, size // 3, size // 2, min(size, 5), size])
        options = {} if from_base is None else {"base": base, "from_base": from_base}
        others = rows if from_base is None else np.vstack([base, rows])
        wide = others.astype(np.float64)
        if from_base:
            wide[1:] -= wide[0]
        terms = vector.astype(np.float64) * wide
        want = np.add.reduceat(terms, cuts[:-1], axis=1)
        scale = np.add.reduceat(np.abs(terms), cuts[:-1], axis=1)
        for kernel in ("numba", "torch"):
            result = [
                products(vector, rows, cuts, kernel=kernel, threads=n, **options) for n in (1, 2)
            ]
            assert np.array_equal(result[0], result[1])
            assert np.all(np.abs(result[0] - want) <= 1e-12 * scale)

    def test_factors_are_their_rows(self) -> None:
        generator = np.random.default_rng(0)
        left = generator.standard_normal((6, 3))
        right = generator.standard_normal((3, 5))
        vector = generator.standard_normal(30)
        owner = (0, 2, 2)
        rows = np.stack([(left[:, mine] @ right[mine]).ravel() for mine in ([0], [], [1, 2])])
        cuts = np.array([0, 3, 17, 25, 30])
        result = [factor_products(vector, left, right, owner, 3, cuts, threads=n) for n in (1, 2)]
        assert np.array_equal(result[0], result[1])
        assert np.allclose(
            result[0], np.add.reduceat(vector * rows, cuts[:-1], axis=1), rtol=0, atol=1e-13
        )

    def test_refuses_arrays_of_other_lengths_and_kernels_that_cannot_read_them(self) -> None:
        vector, _, rows = self.arrays(10)
        with pytest.raises(InputError, match="expected arrays of shape"):
            products(vector, rows, np.array([0, 9]))
        with pytest.raises(InputError, match="kernel 'numba' expects"):
            products(vector.astype(np.float64), rows, np.array([0, 10]), kernel="numba")


def test_a_linear_loss_has_one_gradient_and_coarse_segments_sum_fine_ones(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    for operator in ("average", "task_arithmetic", "tsv"):
        arenas = arenas_of(families["vit"], operator, tmp_path / operator)
        vector = np.random.default_rng(0).standard_normal(arenas.layout.size)
        terms = Terms.of(arenas)
        field = halves(arenas)
        result = coefficient_gradient(terms, vector, field)
        assert np.array_equal(result, coefficient_gradient(terms, vector, halves(arenas, seed=1)))
        fine = field.refine([spec.start for spec in arenas.layout.tensors])
        finer = coefficient_gradient(terms, vector, fine)
        at = np.searchsorted(fine.boundaries, field.boundaries[:-1])
        assert_close(np.add.reduceat(finer, at, axis=1), result, 1e-12)
