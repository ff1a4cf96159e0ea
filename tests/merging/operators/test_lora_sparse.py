"""Sparsified LoRA pools against B · prune(A) written out with numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging import Field, Layout, RecipeError, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.in_memory import MappingSource, merge_stream
from mergesearch.merging.operators import OPERATORS, TensorSource
from tests.merging.operators.adapted import Adapted

State = dict[str, torch.Tensor]
Array = npt.NDArray[np.float64]

LINEAR = "h.0.fc.weight"
TURNED = "h.0.c_attn.weight"
NORM = "h.0.norm.weight"
SHAPES = {LINEAR: (30, 20), TURNED: (20, 30), NORM: (8,)}
RANK = 4


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def source(tensors: State, name: str = "base") -> MappingSource:
    return MappingSource(name, tensors, tuple(tensors))


def adapter(seed: int, model: TensorSource) -> Adapted:
    """Changes both matrices; the second is stored as (in, out), with A on the left."""
    generator = torch.Generator().manual_seed(100 + seed)
    a = (torch.randn(RANK, 20, generator=generator) for _ in range(2))
    b = torch.randn(30, RANK, generator=generator)
    straight, turned = a
    pairs = {LINEAR: (b, straight), TURNED: (turned.T.contiguous(), b.T.contiguous())}
    return Adapted(model, pairs, frozenset({TURNED}), name=f"adapter {seed}")


def merged(
    base: State,
    experts: Sequence[TensorSource],
    coefficients: Sequence[float],
    sparsity: float | list[float],
) -> State:
    layout = Layout.build({name: (tuple(t.shape), "float32") for name, t in base.items()})
    field = Field.constant(layout.size, coefficients)
    return dict(
        merge_stream(source(base), experts, "lora_sparse", {"sparsity": sparsity}, field, layout)
    )


def pruned(a: torch.Tensor, count: int) -> Array:
    """A without its ``count`` smallest entries."""
    flat = a.double().numpy().reshape(-1).copy()
    flat[np.argsort(np.abs(flat))[:count]] = 0
    return flat.reshape(a.shape)


def assert_close(tensor: torch.Tensor, expected: Array) -> None:
    np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shares", [[0.5, 0.5, 0.5], [0.0, 0.7, 0.95]])
def test_prunes_the_factor_that_faces_the_input(shares: list[float]) -> None:
    base = state(0)
    coefficients = [0.7, -1.3, 0.2]
    pool = [adapter(seed, source(base)) for seed in range(3)]
    result = merged(base, pool, coefficients, shares if len(set(shares)) > 1 else shares[0])
    straight = base[LINEAR].double().numpy().copy()
    turned = base[TURNED].double().numpy().copy()
    for coefficient, expert, share in zip(coefficients, pool, shares, strict=True):
        count = round(share * RANK * 20)
        (b, a) = expert.pairs[LINEAR]
        (turned_a, turned_b) = expert.pairs[TURNED]
        straight += coefficient * b.double().numpy() @ pruned(a, count)
        turned += coefficient * pruned(turned_a, count) @ turned_b.double().numpy()
    assert_close(result[LINEAR], straight)
    assert_close(result[TURNED], turned)
    assert torch.equal(result[NORM], base[NORM])


def test_without_pruning_it_is_task_arithmetic() -> None:
    base = state(0)
    pool = [adapter(seed, source(base)) for seed in range(2)]
    plain = merge(
        base,
        [{n: e.read(n) for n in base} for e in pool],
        operator="task_arithmetic",
        coefficients=[1, -0.5],
    )
    result = merged(base, pool, [1, -0.5], 0.0)
    for name in base:
        assert_close(result[name], plain[name].double().numpy())


def test_what_is_stored_whole_and_what_the_models_differ_in_come_in_unpruned() -> None:
    base = state(0)
    other = state(1)
    expert = adapter(0, source(other))
    result = merged(base, [expert], [0.5], 0.6)
    b, a = expert.pairs[LINEAR]
    change = (
        other[LINEAR].double().numpy()
        - base[LINEAR].double().numpy()
        + b.double().numpy() @ pruned(a, 48)
    )
    assert_close(result[LINEAR], base[LINEAR].double().numpy() + 0.5 * change)
    assert_close(result[NORM], (base[NORM] + 0.5 * (other[NORM] - base[NORM])).double().numpy())


def test_factors_multiply_to_the_rows() -> None:
    base = state(0)
    pool = [adapter(seed, source(base)) for seed in range(3)]
    basis = OPERATORS["lora_sparse"].prepare(source(base), pool, sparsity=0.4)
    assert basis.factors is not None
    factors = basis.factors(TURNED)
    assert factors is not None
    assert factors.owner == (0,) * RANK + (1,) * RANK + (2,) * RANK
    for k, row in enumerate(basis.rows(TURNED)):
        mine = torch.tensor(factors.owner) == k
        torch.testing.assert_close(
            factors.left[:, mine] @ factors.right[mine], row, rtol=0, atol=1e-5
        )
    foreign = OPERATORS["lora_sparse"].prepare(source(state(1)), pool, sparsity=0.4)
    assert foreign.factors is not None
    assert foreign.factors(LINEAR) is None


def test_adapters_as_peft_stores_them(pico: Callable[[str], Any], tmp_path: Path) -> None:
    # GPT-2 stores linear layers as (in, out): A is the left factor.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(RANK, 16, generator=generator)
    b = torch.randn(48, RANK, generator=generator)
    prefix = "base_model.model.transformer.h.1.attn.c_attn.lora_"
    save_file(
        {f"{prefix}A.weight": a, f"{prefix}B.weight": b}, tmp_path / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "fan_in_fan_out": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = pico("gpt2").base
    base = open_checkpoint(str(model))
    expert = open_checkpoint(f"{model}+{tmp_path}")
    name = "transformer.h.1.attn.c_attn.weight"
    [row] = OPERATORS["lora_sparse"].prepare(base, [expert], sparsity=0.5).rows(name)
    assert_close(row, (2 * b.double().numpy() @ pruned(a, 32)).T)


def test_refuses_full_checkpoints_by_name() -> None:
    base = state(0)
    with pytest.raises(
        RecipeError,
        match=r"operator lora_sparse: expected LoRA adapters .* received 'math', a full",
    ):
        merge(base, {"math": state(1)}, operator="lora_sparse")


def test_refuses_sparsities_that_do_not_fit() -> None:
    base = state(0)
    pool = [adapter(seed, source(base)) for seed in range(2)]
    with pytest.raises(
        RecipeError, match="sparsity: expected one number or 2, one per adapter, received 3"
    ):
        merged(base, pool, [1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(RecipeError, match=r"'sparsity': expected number \(≥ 0, ≤ 0\.95\) or list"):
        merged(base, pool, [1, 1], 0.99)
