"""Rows kept as factors give the merge of whole rows, and the same bits everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergesearch.merging import Field, InputError, Recipe, RecipeError, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.in_memory import merge_stream
from mergesearch.merging.kernels import lowrank, lowrank_numba
from mergesearch.merging.kernels.forms import Kernel
from mergesearch.merging.kernels.lowrank import combine_factors, product
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident import factor_choice
from mergesearch.merging.resident.arena import Arenas, open_arenas
from mergesearch.merging.resident.encodings.packing import Packing, StoredColumn, StoredTensor
from mergesearch.merging.resident.factor_choice import worth_keeping
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.terms import Terms
from mergesearch.merging.tensors.layout import Layout

IMAGES = "AutoModelForImageClassification"
WORDS = "AutoModelForCausalLM"
GOLDEN = Path(__file__).parents[2] / "golden" / "peft"
KERNELS: tuple[Kernel, ...] = ("numba", "torch")
COEFFICIENT = st.one_of(st.just(0.0), st.floats(-2, 2, width=32))

Pico = Callable[[str], Any]
#: Base, left, right, owner, field.
Problem = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...], Field]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Matrices that fill no tile, and some that do; fields that cut them anywhere."""
    m = draw(st.integers(1, 40))
    n = draw(st.sampled_from([1, 3, 16, 33, 64, 530]))
    directions = draw(st.integers(1, 4))
    rank = draw(st.integers(0, 9))
    cuts = sorted(
        {0, m * n, *(cut % (m * n) for cut in draw(st.lists(st.integers(0, 2**20), max_size=4)))}
    )
    count = directions * (len(cuts) - 1)
    values = draw(st.lists(COEFFICIENT, min_size=count, max_size=count))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base, left, right = (
        generator.standard_normal(shape, np.float32) for shape in (m * n, (m, rank), (rank, n))
    )
    owner = tuple(sorted(generator.integers(0, directions, rank).tolist()))
    return base, left, right, owner, Field(np.array(cuts), np.array(values).reshape(directions, -1))


def random_problem(m: int, n: int, rank: int, values: Sequence[float] = (0.3, -0.7)) -> Problem:
    generator = np.random.default_rng(0)
    base, left, right = (
        generator.standard_normal(shape, np.float32) for shape in (m * n, (m, rank), (rank, n))
    )
    owner = tuple(np.arange(rank) * len(values) // max(rank, 1))
    return base, left, right, owner, Field.constant(m * n, values)


def combined(problem: Problem, **options: Any) -> np.ndarray:
    base, left, right, owner, field = problem
    out = np.full(base.shape, 9.0, np.float32)
    combine_factors(base, left, right, owner, field, out, **options)
    return out


def definition(problem: Problem, dtype: type = np.float32) -> np.ndarray:
    """Term by term, over all positions at once."""
    base, left, right, owner, field = problem
    positions = np.arange(base.size)
    row = positions // right.shape[1]
    column = positions % right.shape[1]
    total = base.astype(dtype)
    for r, k in enumerate(owner):
        weight = field.at(positions)[k].astype(dtype)
        term = (weight * left[row, r].astype(dtype)) * right[r, column].astype(dtype)
        total = np.where(weight == 0, total, total + term)
    return total


class TestKernels:
    @given(problem=problems())
    @settings(max_examples=60, deadline=None)
    def test_both_give_the_bits_of_the_definition(self, problem: Problem) -> None:
        expected = definition(problem)
        for kernel in KERNELS:
            assert combined(problem, kernel=kernel).tobytes() == expected.tobytes()
        np.testing.assert_allclose(expected, definition(problem, np.float64), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_threads_and_blocks_change_no_bit(
        self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problem = random_problem(90, 50, 5)
        whole = combined(problem, kernel=kernel, threads=1)
        monkeypatch.setattr(lowrank_numba, "SHORTEST_TASK", 64)
        monkeypatch.setattr(lowrank, "CPU_BLOCK", 333)
        assert len(lowrank_numba._tasks(0, 4500, 50, 3)) > 3
        assert combined(problem, kernel=kernel, threads=3).tobytes() == whole.tobytes()

    @pytest.mark.parametrize("size", [1, 799, 2000])
    def test_stretches_cover_everything_once(
        self, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lowrank_numba, "SHORTEST_TASK", 10)
        tasks = lowrank_numba._tasks(7, 7 + size, 3, 4)
        assert [start for start, _ in tasks[1:]] == [stop for _, stop in tasks[:-1]]
        assert (tasks[0][0], tasks[-1][1]) == (7, 7 + size)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_coarse_results_are_rounded_once(
        self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lowrank, "CPU_BLOCK", 100)  # several blocks
        monkeypatch.setattr(lowrank, "HOST_BLOCK", 100)
        base, left, right, owner, field = problem = random_problem(50, 17, 4)
        out = torch.zeros(base.size, dtype=torch.bfloat16)
        combine_factors(base, left, right, owner, field, out, kernel=kernel)
        assert torch.equal(out, torch.from_numpy(definition(problem)).bfloat16())

    def test_double_precision_throughout(self) -> None:
        base, left, right, owner, field = problem = random_problem(9, 7, 4)
        out = np.zeros(base.size)
        combine_factors(base.astype(np.float64), left, right, owner, field, out)
        np.testing.assert_allclose(out, definition(problem, np.float64), rtol=1e-14)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_base_at_zero_and_in_place(self, kernel: Kernel) -> None:
        base, left, right, owner, _ = problem = random_problem(20, 20, 4)
        still = Field.constant(400, [0.0, 0.0])
        assert (
            combined((base, left, right, owner, still), kernel=kernel).tobytes() == base.tobytes()
        )
        expected = combined(problem)
        combine_factors(base, left, right, owner, problem[4], base, kernel=kernel)
        assert base.tobytes() == expected.tobytes()

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_coefficients_that_are_no_numbers_give_nan(self, kernel: Kernel, bad: float) -> None:
        # Also where no expert changes anything, as whole rows of zeros would.
        for rank in (0, 2):
            base, left, right, owner, _ = random_problem(4, 5, rank)
            field = Field(np.array([0, 7, 20]), np.array([[0.5, bad], [0.5, 0.5]]))
            out = combined((base, left, right, owner, field), kernel=kernel)
            assert np.isfinite(out[:7]).all()
            assert np.isnan(out[7:]).all()

    def test_products_do_not_depend_on_a_library(self) -> None:
        _, left, right, _, _ = random_problem(50, 70, 6)
        result = product(torch.from_numpy(left), torch.from_numpy(right))
        expected = np.zeros((50, 70), np.float32)
        for r in range(6):
            expected += left[:, r : r + 1] * right[r]
        assert result.numpy().tobytes() == expected.tobytes()
        assert product(torch.zeros(3, 0), torch.zeros(0, 2)).tolist() == [[0, 0]] * 3
        assert product(torch.zeros(0, 2), torch.zeros(2, 5)).shape == (0, 5)

    def test_refuses_what_does_not_fit(self) -> None:
        base, left, right, owner, field = random_problem(4, 5, 2)
        out = np.zeros(20, np.float32)
        for wrong in (
            (base[:9], left, right, owner),
            (base, left[:, :1], right, owner),
            (base, left, right, (0,)),
        ):
            with pytest.raises(InputError, match="combine_factors: expected"):
                combine_factors(*wrong, field, out)
        for bad in (Field.constant(20, [0.1]), Field.constant(19, [0.1, 0.2])):
            with pytest.raises(RecipeError, match="expected a field over 20 positions"):
                combine_factors(base, left, right, owner, bad, out)
        with pytest.raises(InputError, match="use kernel='auto'"):
            combine_factors(base.astype(np.float64), left, right, owner, field, out, kernel="numba")


class TestRule:
    @pytest.mark.parametrize(
        ("shape", "rank", "directions", "kept"),
        [
            ((4096, 4096), 8 * 16, 8, True),
            ((4096, 4096), 8 * 64, 8, True),
            ((4096, 4096), 8 * 256, 8, False),  # as slow as 28 rows each
            ((768, 768), 8 * 16, 8, True),
            ((768, 768), 8 * 64, 8, False),
            ((16, 16), 2 * 9, 2, False),  # more numbers than the rows themselves
            ((16,), 2, 2, False),
            ((5, 0), 0, 2, True),
            ((), 0, 1, True),
        ],
    )
    def test_examples(self, shape: tuple[int, ...], rank: int, directions: int, kept: bool) -> None:
        assert worth_keeping(shape, rank, directions) == kept

    @given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12), st.integers(1, 300))
    def test_never_larger_than_whole_rows_and_never_much_slower(
        self, m: int, n: int, directions: int, rank: int
    ) -> None:
        if worth_keeping((m, n), rank, directions):
            assert rank * (m + n) < directions * m * n
            assert rank <= factor_choice.SLOWEST * factor_choice.TERMS_PER_ROW * directions


class TestPacking:
    def test_parts_do_not_overlap_and_leave_nothing_out(self) -> None:
        shapes = {"a": (3, 5), "b": (70,), "c": (8, 8), "d": (), "e": (0,), "f": (9, 2)}
        layout = Layout.build({name: (shape, "float32") for name, shape in shapes.items()})
        masked = StoredColumn("bfloat16", minus_base=True, masked=True)
        stored = {
            "a": StoredTensor("float32", ranks=(1, 2)),
            "b": StoredTensor("bfloat16", (masked, masked), shared=True),
            "c": StoredTensor("float32", ranks=(0, 0)),
            "d": StoredTensor("float32", ranks=(0, 0)),
            "f": StoredTensor("float16", (StoredColumn("int8"), replace(masked, packed=5))),
        }
        packing = Packing(layout, 2, "float32", stored)
        assert [(s.start, s.stop) for s in packing.stretches] == [(64, 192), (320, 384)]
        assert [spec.name for spec in packing.factored] == ["a", "c", "d"]
        memory = np.zeros(packing.size, np.uint8)
        factors = Terms(packing, "delta", memory).factors
        assert [(f.left.shape, f.right.shape, f.owner) for f in factors] == [
            ((3, 3), (3, 5), (0, 1, 1)),
            ((8, 0), (0, 8), ()),
            ((1, 0), (0, 1), ()),
        ]
        a, b, c, d, f = (packing.parts[name] for name in "abcdf")
        taken = [
            (a.base, 60), (a.factors[0], 36), (a.factors[1], 60),
            (b.base, 140), *((at, 140) for at in b.numbers), *((at, 9) for at in b.masks),
            (c.base, 256), (d.base, 4),
            (f.base, 36), (f.numbers[0], 18), (f.scales[0], 4),
            (f.numbers[1], 10), (f.masks[1], 8), (f.starts[1], 4),
        ]  # fmt: skip
        for offset, size in taken:
            assert offset % 128 == 0
            assert not memory[offset : offset + size].any()
            memory[offset : offset + size] = 1
        assert packing.size - memory.sum() < 128 * len(taken)
        assert StoredTensor.from_dict(stored["b"].to_dict()) == stored["b"]


@pytest.fixture
def adapters(pico: Pico, tmp_path: Path) -> Callable[..., list[str]]:
    """``adapters(family, modules, whole=())``: paths of the base with two adapters on it.

    Their ranks are 1 and 2.
    """

    def write(
        family: str, modules: dict[str, tuple[int, int]], whole: Sequence[str] = ()
    ) -> list[str]:
        base = pico(family).base
        shapes = {name: tuple(t.shape) for name, t in load_file(base / "model.safetensors").items()}
        paths = []
        for rank in (1, 2):
            generator = torch.Generator().manual_seed(rank)
            tensors = {}
            for module, (out, into) in modules.items():
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(
                    rank, into, generator=generator
                )
                tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(
                    out, rank, generator=generator
                )
            for name in whole:
                tensors[f"base_model.model.{name}"] = torch.randn(shapes[name], generator=generator)
            folder = tmp_path / f"lora{rank}"
            folder.mkdir()
            save_file(tensors, folder / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2}
            (folder / "adapter_config.json").write_text(json.dumps(settings))
            paths.append(f"{base}+{folder}")
        return paths

    return write


LLAMA = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.mlp.down_proj": (16, 32),
    "model.layers.1.mlp.up_proj": (32, 16),
}
NORM = "model.norm.weight"


def recipe_of(
    base: Path, experts: Sequence[str], field: Field, operator: str = "task_arithmetic"
) -> Recipe:
    sources = tuple(Source(Path(path).name, path) for path in experts)
    return Recipe(Source("base", str(base)), sources, operator, field)


def field_over(layout: Layout) -> Field:
    """Boundaries that cut tensors, and rows of them; a zero."""
    cuts = sorted({0, layout.size, *(layout.size * part // 23 for part in range(1, 23))})
    values = np.random.default_rng(3).uniform(-1, 1, (2, len(cuts) - 1))
    values[0, 4] = 0.0
    return Field(np.array(cuts), values)


def opened(base: Path, experts: Sequence[str], folder: Path) -> Arenas:
    return open_arenas(recipe_of(base, experts, Field.constant(1, [0.0] * len(experts))), folder)


class TestArena:
    def test_keeps_factors_and_only_the_rows_of_whole_tensors(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        arenas = opened(pico("llama").base, adapters("llama", LLAMA, [NORM]), tmp_path / "arenas")
        norm = arenas.layout.by_name[NORM]
        assert [span.start for span in arenas.packing.spans] == [norm.start]
        factors = Terms.of(arenas).factors
        ranks = {stored.spec.name: len(stored.owner) for stored in factors}
        assert set(ranks) == set(arenas.layout.names) - {NORM}
        assert {name for name, rank in ranks.items() if rank} == {
            f"{module}.weight" for module in LLAMA
        }
        assert set(ranks.values()) == {0, 3}
        (file,) = (tmp_path / "arenas").glob("*.arena")
        assert file.stat().st_size < 1.2 * 4 * arenas.layout.size

    def test_is_found_again_and_verified(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        experts = adapters("llama", LLAMA, [NORM])
        first = opened(pico("llama").base, experts, tmp_path / "arenas")
        (file,) = (tmp_path / "arenas").glob("*.arena")
        made = file.stat().st_mtime_ns
        again = opened(pico("llama").base, experts, tmp_path / "arenas")
        assert file.stat().st_mtime_ns == made
        assert all(
            np.array_equal(a.left, b.left)
            for a, b in zip(Terms.of(first).factors, Terms.of(again).factors, strict=True)
        )
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1  # in the last factor
        file.write_bytes(damaged)
        opened(pico("llama").base, experts, tmp_path / "arenas")
        assert file.stat().st_mtime_ns != made
        assert file.read_bytes() != bytes(damaged)

    def test_other_operators_and_full_experts_keep_whole_rows(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        base = pico("llama").base
        paths = adapters("llama", LLAMA)
        average = open_arenas(
            recipe_of(base, paths, Field.constant(1, [0.0, 0.0]), "average"), tmp_path / "a"
        )
        mixed = opened(base, [paths[0], str(pico("llama").experts[0])], tmp_path / "b")
        for arenas in (average, mixed):
            assert arenas.packing.factored == ()
            assert len(arenas.packing.spans) == len(arenas.layout.tensors)

    def test_changed_adapters_are_prepared_again(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        experts = adapters("llama", LLAMA)
        before = opened(pico("llama").base, experts, tmp_path / "arenas")
        config = tmp_path / "lora2" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 8'))
        after = opened(pico("llama").base, experts, tmp_path / "arenas")
        pairs = [
            (a, b)
            for a, b in zip(Terms.of(before).factors, Terms.of(after).factors, strict=True)
            if a.owner
        ]
        assert len(pairs) == len(LLAMA)
        for one, other in pairs:
            assert np.array_equal(4 * one.left[:, 1:], other.left[:, 1:])
            assert np.array_equal(one.left[:, :1], other.left[:, :1])


class TestEndToEnd:
    @pytest.mark.parametrize("family", ["llama", "llama_bf16"])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_model_that_is_evaluated_is_the_one_that_is_exported(
        self,
        pico: Pico,
        adapters: Callable[..., list[str]],
        tmp_path: Path,
        family: str,
        threads: int,
    ) -> None:
        base = pico(family).base
        experts = adapters(family, LLAMA, [NORM])
        arenas = opened(base, experts, tmp_path / "arenas")
        assert sum(bool(stored.owner) for stored in Terms.of(arenas).factors) == len(LLAMA)
        model = MergedModel(load_model(str(base), WORDS), arenas, threads=threads)
        field = field_over(arenas.layout)
        model.write(field)
        export_model(recipe_of(base, experts, field), tmp_path / "out")
        exported = load_file(tmp_path / "out" / "model.safetensors")
        state = model.model.state_dict()
        assert set(exported) == set(arenas.layout.names)
        for name, tensor in exported.items():
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor, state[name])
        original = load_file(base / "model.safetensors")
        changed = {
            name for name, tensor in exported.items() if not torch.equal(tensor, original[name])
        }
        assert changed == {*(f"{module}.weight" for module in LLAMA), NORM}

    @pytest.mark.parametrize(
        ("name", "auto"),
        [
            ("vit", "AutoModelForImageClassification"),
            ("llama", WORDS),
            ("gpt2", WORDS),
        ],
    )
    def test_one_adapter_at_full_strength_is_peft_s_merge(
        self, tmp_path: Path, name: str, auto: str
    ) -> None:
        base = GOLDEN / name
        experts = [f"{base}+{base / 'adapter'}"]
        arenas = opened(base, experts, tmp_path / "arenas")
        assert any(stored.owner for stored in Terms.of(arenas).factors)
        model = MergedModel(load_model(str(base), auto), arenas)
        field = Field.constant(arenas.layout.size, [1.0])
        model.write(field)
        export_model(recipe_of(base, experts, field), tmp_path / "out")
        evaluated = model.model.state_dict()
        exported = load_model(str(tmp_path / "out"), auto).state_dict()
        assert all(torch.equal(tensor, exported[key]) for key, tensor in evaluated.items())
        stored = load_file(tmp_path / "out" / "model.safetensors")
        for key, tensor in load_file(base / "merged.safetensors").items():
            torch.testing.assert_close(stored[key], tensor, rtol=0, atol=1e-6)

    def test_agrees_with_whole_rows_within_rounding(
        self, pico: Pico, adapters: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = pico("llama")
        base = open_checkpoint(str(family.base))
        experts = [open_checkpoint(path) for path in adapters("llama", LLAMA, [NORM])]
        layout = Layout.build(base.merged)
        field = field_over(layout)
        factored = dict(merge_stream(base, experts, "task_arithmetic", {}, field, layout))
        monkeypatch.setattr(factor_choice, "worth_keeping", lambda *_: False)
        whole = dict(merge_stream(base, experts, "task_arithmetic", {}, field, layout))
        assert any(not torch.equal(factored[name], whole[name]) for name in layout.names)
        for name in layout.names:
            torch.testing.assert_close(factored[name], whole[name], rtol=0, atol=1e-6)

    def test_zero_coefficients_give_the_base(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        base = pico("llama").base
        experts = adapters("llama", LLAMA, [NORM])
        model = MergedModel(
            load_model(str(base), WORDS), opened(base, experts, tmp_path / "arenas")
        )
        model.write(Field.constant(model.layout.size, [0.4, 0.4]))
        model.write(Field.constant(model.layout.size, [0.0, 0.0]))
        original = load_file(base / "model.safetensors")
        assert all(
            torch.equal(tensor, original[name]) for name, tensor in model.model.state_dict().items()
        )

    def test_pruned_adapters_are_kept_as_factors_too(
        self, pico: Pico, adapters: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        base = pico("llama").base
        experts = adapters("llama", LLAMA)
        recipe = recipe_of(base, experts, Field.constant(1, [0.0, 0.0]), "lora_sparse")
        arenas = open_arenas(recipe, tmp_path / "arenas")
        pruned = [stored for stored in Terms.of(arenas).factors if stored.owner]
        assert len(pruned) == len(LLAMA)
        assert all((stored.right == 0).sum() == stored.right.size / 2 for stored in pruned)
