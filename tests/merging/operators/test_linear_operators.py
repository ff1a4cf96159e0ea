"""Model Stock, LiNeS, layer swapping and SLERP against their formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, Layout, RecipeError, merge
from mergesearch.merging.in_memory import (
    MappingSource,
    merge_tensor,
    merge_wide,
    prepared_merge,
)
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators.parts.inner_products import dot, products
from mergesearch.merging.operators.slerp import STRAIGHT
from mergesearch.merging.tensors.memo import Memo

State = dict[str, torch.Tensor]

#: Six blocks of text, two of vision, and what lies outside; `mlp.experts.9.` is no block.
NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{block}.mlp.experts.9.up_proj.weight" for block in range(6)),
    *(f"vision_model.encoder.layers.{block}.self_attn.q_proj.bias" for block in range(2)),
    "model.norm.weight",
)


def state(seed: int, names: tuple[str, ...] = NAMES, shape: tuple[int, ...] = (4, 3)) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name in names}


def scales(operator: str, experts: int, **hyperparameters: float) -> dict[str, float]:
    """What each tensor of the only non-zero task vector is scaled by at coefficient 1."""
    base = state(0)
    tuned = state(1)
    result = merge(base, [tuned] + [base] * (experts - 1), operator=operator, **hyperparameters)
    ratios = {n: (result[n] - base[n]) / (tuned[n] - base[n]) for n in base}
    for ratio in ratios.values():
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-4)
    return {name: round(float(ratio.mean()), 4) for name, ratio in ratios.items()}


class TestModelStock:
    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_is_the_average_pulled_to_the_base_by_the_mean_cosine(self, count: int) -> None:
        base = {"w": torch.zeros(20)}
        common = state(99, ("w",), (20,))["w"]
        experts = [{"w": common + state(seed, ("w",), (20,))["w"]} for seed in range(count)]
        deltas = [expert["w"].numpy().astype(np.float64) for expert in experts]
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(deltas, 2)
        ]
        share = count * np.mean(cosines) / (1 + (count - 1) * np.mean(cosines))
        assert 0 < share < 1
        np.testing.assert_allclose(
            merge(base, experts, operator="model_stock")["w"],
            share * np.mean(deltas, axis=0),
            atol=1e-6,
        )

    def test_the_more_the_experts_agree_the_closer_to_the_average(self) -> None:
        base = {"w": torch.zeros(2)}

        def length(angle: float) -> float:
            pair = [
                {"w": torch.tensor([math.cos(a), math.sin(a)])} for a in (-angle / 2, angle / 2)
            ]
            average = math.cos(angle / 2)
            return float(merge(base, pair, operator="model_stock")["w"].norm()) / average

        assert length(0.0) == pytest.approx(1)
        # Two experts: t = 2 cos θ / (1 + cos θ).
        assert length(math.pi / 3) == pytest.approx(2 / 3, abs=1e-6)
        assert length(math.pi / 2) == pytest.approx(0, abs=1e-6)

    def test_opposed_and_zero_task_vectors_give_the_base(self) -> None:
        base = state(0)
        expert = state(1)
        mirrored = {name: 2 * base[name] - expert[name] for name in base}
        for experts in ([expert, mirrored], [expert, base]):
            result = merge(base, experts, operator="model_stock")
            assert all(torch.equal(result[name], base[name]) for name in base)


class TestLines:
    def test_scales_with_the_depth_within_each_tower(self) -> None:
        result = scales("lines", 1, alpha=0.25, beta=0.5)
        expected = dict.fromkeys(NAMES, 0.25)
        expected |= {
            f"model.layers.{block}.mlp.experts.9.up_proj.weight": 0.25 + 0.1 * block
            for block in range(6)
        }
        expected["vision_model.encoder.layers.1.self_attn.q_proj.bias"] = 0.75
        assert result == pytest.approx(expected, abs=1e-4)

    def test_starts_at_one_over_the_number_of_experts(self) -> None:
        assert set(scales("lines", 4, beta=0.0).values()) == {0.25}

    def test_without_slope_it_is_task_arithmetic(self) -> None:
        base = state(0)
        experts = [state(1), state(2)]
        lines = merge(base, experts, operator="lines", alpha=1.0, beta=0.0, coefficients=[0.3, 0.4])
        arithmetic = merge(base, experts, operator="task_arithmetic", coefficients=[0.3, 0.4])
        assert all(torch.equal(lines[name], arithmetic[name]) for name in base)

    def test_one_block_has_depth_zero(self) -> None:
        base, expert = ({"h.4.attn.weight": state(seed)["model.norm.weight"]} for seed in (0, 1))
        result = merge(base, [expert], operator="lines", alpha=1.0, beta=1.0)
        np.testing.assert_allclose(result["h.4.attn.weight"], expert["h.4.attn.weight"], atol=1e-6)

    def test_refuses_a_negative_scale(self) -> None:
        with pytest.raises(
            RecipeError, match=r"operator lines: hyperparameter 'alpha.*greater than or equal to 0"
        ):
            merge(state(0), [state(1)], operator="lines", alpha=-0.1)


class TestLayerSwap:
    NAMES = (*(f"h.{block}.mlp.weight" for block in range(7)), "wte.weight")

    def swap(self, **hyperparameters: int | str) -> tuple[str, list[State]]:
        base, first, second = states = [state(seed, self.NAMES) for seed in range(3)]
        result = merge(base, [first, second], operator="layer_swap", **hyperparameters)
        average = {name: (first[name].double() + second[name].double()) / 2 for name in base}
        letters = ""
        for name in self.NAMES:
            exact = [
                letter
                for letter, s in zip("0AB", states, strict=True)
                if torch.equal(result[name], s[name])
            ]
            close = torch.allclose(result[name].double(), average[name], rtol=0, atol=1e-6)
            letters += exact[0] if exact else "m" if close else "?"
        return letters, states

    @pytest.mark.parametrize(
        ("bottom", "top", "transition", "expected"),
        [
            (2, 1, 0, "AABBBBAA"),
            (2, 1, 1, "AAmBBmAA"),
            (1, 1, 2, "AmmBmmAA"),
            (0, 0, 0, "BBBBBBBA"),
            (0, 3, 2, "mmmmAAAA"),
            (7, 0, 0, "AAAAAAAA"),
        ],
    )
    def test_takes_each_block_whole(
        self, bottom: int, top: int, transition: int, expected: str
    ) -> None:
        assert self.swap(bottom=bottom, top=top, transition=transition)[0] == expected

    @pytest.mark.parametrize(
        ("outside", "letter"), [("first", "A"), ("second", "B"), ("base", "0")]
    )
    def test_tensors_outside_the_blocks_come_whence_asked(self, outside: str, letter: str) -> None:
        assert self.swap(bottom=3, top=3, outside=outside)[0] == f"AAABAAA{letter}"

    def test_each_tower_has_its_own_depth(self) -> None:
        base, first, second = (state(seed) for seed in range(3))
        result = merge(base, [first, second], operator="layer_swap", bottom=1, top=0)
        taken = {name for name in base if torch.equal(result[name], second[name])}
        assert taken == {name for name in NAMES if "layers." in name and "layers.0." not in name}

    def test_refuses_more_blocks_than_there_are(self) -> None:
        message = (
            "operator layer_swap: .* at most 7, the number of blocks, received 8; lower one of them"
        )
        with pytest.raises(RecipeError, match=message):
            self.swap(bottom=2, top=2, transition=2)
        layout = Layout.build(dict.fromkeys(NAMES, ((4, 3), "float32")))
        with pytest.raises(
            RecipeError, match="at most 2, the number of blocks of the vision tower, received 3"
        ):
            get_operator("layer_swap").check(layout, 2, {"bottom": 2, "top": 1})

    def test_refuses_models_without_blocks_and_other_than_two_experts(self) -> None:
        flat = {"w": torch.ones(2)}
        with pytest.raises(
            RecipeError, match="operator layer_swap: expected tensors of numbered blocks"
        ):
            merge(flat, [flat, flat], operator="layer_swap", bottom=0, top=0)
        with pytest.raises(
            RecipeError, match="operator layer_swap: expected 2 experts beside the base, received 3"
        ):
            merge(state(0), [state(0)] * 3, operator="layer_swap", bottom=1, top=1)


def arc(one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    a = one.astype(np.float64).reshape(-1)
    b = other.astype(np.float64).reshape(-1)
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    weights = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (weights[0] * a + weights[1] * b).reshape(one.shape)


class TestSlerp:
    @pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
    def test_follows_the_arc_of_each_tensor(self, t: float) -> None:
        base = state(0)
        expert = state(1)
        result = merge(base, [expert], operator="slerp", coefficients=t)
        for name in base:
            np.testing.assert_allclose(
                result[name], arc(base[name].numpy(), expert[name].numpy(), t), atol=1e-6
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4])
    def test_merging_what_is_stored_gives_the_bits_of_the_rows(
        self, t: float, dtype: torch.dtype
    ) -> None:
        shapes = {"wide": (40, 60), "same": (7, 3), "one": (1,), "none": (0, 3)}
        states = [
            {name: state(seed, (name,), shape)[name].to(dtype) for name, shape in shapes.items()}
            for seed in (0, 1)
        ]
        states[1]["same"] = states[0]["same"]  # no arc
        stored = str(dtype).removeprefix("torch.")
        layout = Layout.build({name: (shape, stored) for name, shape in shapes.items()})
        sources = [MappingSource(n, s, list(s)) for n, s in zip("be", states, strict=True)]
        field = Field.constant(layout.size, [t])
        merged = prepared_merge(sources[0], sources[1:], "slerp", {}, field, layout)
        merged = replace(merged, basis=replace(merged.basis, rows=None))  # type: ignore[arg-type]
        rows = prepared_merge(sources[0], sources[1:], "slerp", {}, field, layout)
        for spec in layout.tensors:
            if spec.size:  # without rows: only stored numbers are left to merge
                direct, _ = merge_tensor(merged, spec, spec.dtype)
                assert torch.equal(direct, merge_wide(rows, spec).to(dtype)), spec.name

    def test_products_of_one_read_are_those_of_three(self) -> None:
        generator = torch.Generator().manual_seed(0)
        one, other = (torch.randn(70_001, generator=generator).bfloat16() for _ in range(2))
        assert products(one, other) == (dot(one, one), dot(one, other), dot(other, other))

    def test_keeps_the_length_of_tensors_of_equal_length(self) -> None:
        base, expert = ({name: t / t.norm() for name, t in state(seed).items()} for seed in (0, 1))
        result = merge(base, [expert], operator="slerp", coefficients=0.3)
        assert [float(tensor.norm()) for tensor in result.values()] == pytest.approx(
            [1] * len(base), abs=1e-6
        )

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([1.0, 2.0], [1.0, 2.01]),
            ([1.0, 2.0], [-2.0, -4.0]),
            ([0.0, 0.0], [1.0, 2.0]),
            ([1.0, 2.0], [0.0, 0.0]),
        ],
        ids=["nearly parallel", "opposed", "zero base", "zero expert"],
    )
    def test_goes_straight_where_there_is_no_arc(
        self, one: list[float], other: list[float]
    ) -> None:
        base = {"w": torch.tensor(one)}
        expert = {"w": torch.tensor(other)}
        result = merge(base, [expert], operator="slerp", coefficients=0.25)
        np.testing.assert_allclose(result["w"], 0.75 * base["w"] + 0.25 * expert["w"], atol=1e-7)

    def test_the_arc_begins_where_the_cosine_falls_below_the_threshold(self) -> None:
        base = {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}
        for cosine, straight in ((STRAIGHT + 1e-6, True), (STRAIGHT - 1e-6, False)):
            other = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
            middle = merge(base, [{"w": other}], operator="slerp")["w"]
            # On the arc the length stays 1; on the line between two unit vectors it shrinks.
            assert (float(middle.norm()) < 1 - 1e-6) == straight

    def test_angles_are_read_from_the_memo(self, tmp_path: Path) -> None:
        @dataclass
        class Source:
            name: str
            tensors: State
            identity: str
            memo: Memo
            reads: int = 0

            @property
            def names(self) -> list[str]:
                return list(self.tensors)

            def shape(self, name: str) -> tuple[int, ...]:
                return tuple(self.tensors[name].shape)

            def read(self, name: str) -> torch.Tensor:
                self.reads += 1
                return self.tensors[name]

        base = Source("base", state(0), "0", Memo(tmp_path))
        expert = Source("tuned", state(1), "1", Memo(tmp_path))
        results = []
        for _ in range(2):
            angles = get_operator("slerp").prepare(base, [expert]).angles
            assert angles is not None
            results.append([angles(name) for name in NAMES])
        assert results[0] == results[1]
        assert base.reads == expert.reads == len(NAMES)

    def test_refuses_more_than_one_expert(self) -> None:
        with pytest.raises(
            RecipeError, match="operator slerp: expected 1 expert beside the base, received 2"
        ):
            merge(state(0), [state(1), state(2)], operator="slerp")
