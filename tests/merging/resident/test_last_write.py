"""A write that merges only what has changed leaves the bits of one that merges everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergesearch.merging import Field, NonFiniteError, Recipe, Source
from mergesearch.merging.family.special_tensors import running_statistics
from mergesearch.merging.models.batch_norm import recalibrate
from mergesearch.merging.models.layer_bits import Bits
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident import last_write, merged_model
from mergesearch.merging.resident.arena import Arenas, open_arenas
from mergesearch.merging.resident.finite import finite_in
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.merging.resident.ranges import covered, differing, joined, touched
from tests.merging.resident.test_encodings import CASES, IDS, SHAPES, family, recipe_of

pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

GOLDEN = Path(__file__).parents[2] / "golden" / "peft"
IMAGES = "AutoModelForImageClassification"
WORDS = "AutoModelForCausalLM"
Pico = Callable[[str], Any]
Draw = np.random.Generator


class Held(nn.Module):
    """Parameters under the names of :data:`SHAPES`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.zeros(shape, dtype=dtype)))


def held(arenas: Arenas, **options: Any) -> MergedModel:
    dtypes = [getattr(torch, spec.dtype) for spec in arenas.layout.tensors]
    return MergedModel(Held(max(dtypes, key=lambda dtype: dtype.itemsize)), arenas, **options)


def next_field(draw: Draw, before: Field | None, arenas: Arenas) -> Field:
    """A field like the last in most of its coefficients, on the same segments or on others."""
    size = arenas.layout.size
    directions = arenas.packing.directions
    if before is None or draw.random() < 0.1:
        edges = np.unique([0, size, *draw.integers(1, size, 6)])
        return Field(edges, draw.uniform(-0.5, 1.0, (directions, len(edges) - 1)))
    if draw.random() < 0.3:
        before = before.refine(draw.integers(1, size, 2))
    values = before.values.copy()
    for segment in draw.integers(0, before.segments, draw.integers(0, 3)):
        values[draw.integers(directions), segment] = draw.choice([0.0, 1.0, draw.uniform(-1, 1)])
    again = Field(before.boundaries, values)
    return again.compact() if draw.random() < 0.2 else again


def bits_of(model: MergedModel) -> list[torch.Tensor]:
    """The bits of all merged weights, padding among them, and of all that the model holds."""
    states = [one.state_dict() for one in (model.model, *model.heads.values())]
    tensors = [shard.merged for shard in model.shards]
    tensors += [tensor for state in states for tensor in state.values()]
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).clone() for tensor in tensors]


def assert_same(partly: MergedModel, wholly: MergedModel, field: Field, bits: Bits = ()) -> None:
    """Write into both, into one of them from scratch, and compare."""
    wholly.forget()
    wholly.write(field, bits)
    partly.write(field, bits)
    assert all(map(torch.equal, bits_of(partly), bits_of(wholly)))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many positions every write merges from now on; None for all."""
    seen: list[int | None] = []
    combine = merged_model.combine_terms

    def counted(*arguments: Any, only: Any = None, **options: Any) -> None:
        seen.append(None if only is None else covered(only))
        combine(*arguments, only=only, **options)

    monkeypatch.setattr(merged_model, "combine_terms", counted)
    return seen


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return family(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


def check_sequence(
    make: Callable[[], MergedModel], arenas: Arenas, seed: int, parts: list[int | None]
) -> None:
    """Some writes in a row; some of them must have merged a part alone."""
    draw = np.random.default_rng(seed)
    partly = make()
    wholly = make()
    del parts[:]
    field = None
    for _ in range(12):
        field = next_field(draw, field, arenas)
        assert_same(partly, wholly, field)
    assert any(part is not None for part in parts)


@pytest.mark.parametrize(("operator", "options", "encoding"), CASES, ids=IDS)
def test_random_sequences_of_every_encoding(
    bf16: Recipe,
    tmp_path: Path,
    parts: list[int | None],
    operator: str,
    options: dict[str, Any],
    encoding: str,
) -> None:
    arenas = open_arenas(recipe_of(bf16, operator, options), tmp_path)
    check_sequence(lambda: held(arenas, threads=2), arenas, 0, parts)


@pytest.mark.parametrize("rows", ["bf16", "int8", "dense"])
@pytest.mark.parametrize(
    "dtypes",
    [
        torch.float16,
        {"base": torch.float32, "expert": torch.bfloat16},
        {"base": torch.float64, "expert": torch.float32},
    ],
    ids=["fp16", "mixed", "fp64"],
)
def test_random_sequences_of_other_numbers(
    tmp_path: Path, parts: list[int | None], rows: Any, dtypes: Any
) -> None:
    arenas = open_arenas(family(tmp_path / "models", dtypes), tmp_path / "arenas", rows=rows)
    check_sequence(lambda: held(arenas), arenas, 5, parts)


@pytest.mark.parametrize("name", ["llama_tied", "resnet", "mixed", "factors", "slerp", "mixtral"])
def test_random_sequences_of_models(
    pico: Pico,
    tmp_path: Path,
    copy_of: Callable[..., Path],
    parts: list[int | None],
    name: str,
) -> None:
    recipe, auto = model_recipe(name, pico, tmp_path, copy_of)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    assert bool(arenas.packing.factored) == (name == "factors")
    make = lambda: MergedModel(load_model(recipe.base.path, auto), arenas)  # noqa: E731
    assert make().has_copies == (name == "mixtral")
    check_sequence(make, arenas, 3, parts)


def model_recipe(
    name: str, pico: Pico, folder: Path, copy_of: Callable[..., Path]
) -> tuple[Recipe, str]:
    """Base and experts of a model, and the class that loads it."""
    field = Field.constant(1, [0.0])
    if name == "factors":
        base = GOLDEN / "llama"
        expert = Source("expert", f"{base}+{base / 'adapter'}")
        return Recipe(Source("base", str(base)), (expert,), "task_arithmetic", field), WORDS
    if name == "mixtral":
        first, second = mixtral(folder)
        return Recipe(Source("base", first), (Source("one", second),), "average", field), WORDS
    own = pico({"mixed": "vit", "slerp": "vit"}.get(name, name))
    base = own.base
    if name == "mixed":
        base = copy_of(base, narrowed)
    special = (("batch_norm", "merge"),) if name == "resnet" else ()
    experts = tuple(Source(path.name, str(path)) for path in own.experts)
    operator = "slerp" if name == "slerp" else "average"
    chosen = experts[:1] if name == "slerp" else experts
    recipe = Recipe(Source("base", str(base)), chosen, operator, field, special=special)
    return recipe, IMAGES if name != "llama_tied" else WORDS


def narrowed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.bfloat16() if "attention" in n else t for n, t in tensors.items()}


def mixtral(folder: Path) -> list[str]:
    """Two mixtures of experts, stored expert by expert and held fused."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, intermediate_size=12,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            MixtralForCausalLM(config).save_pretrained(folder / f"mixtral{seed}")
    return [str(folder / f"mixtral{seed}") for seed in range(2)]


def test_bits_of_tensors_come_and_go(
    pico: Pico, tmp_path: Path, parts: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = model_recipe("vit", pico, tmp_path, lambda *_: tmp_path)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    partly, wholly = (MergedModel(load_model(recipe.base.path, IMAGES), arenas) for _ in range(2))
    names = [spec.name for spec in arenas.layout.tensors if len(spec.shape) > 1][2:6]
    draw = np.random.default_rng(0)
    field = next_field(draw, None, arenas)
    widths: dict[str, int] = {}
    for _ in range(10):
        widths = {n: int(draw.choice([3, 4, 8])) for n in names if draw.random() < 0.3} or widths
        field = next_field(draw, field, arenas) if draw.random() < 0.7 else field
        assert_same(partly, wholly, field, tuple(sorted(widths.items())))
    assert any(part is not None for part in parts)
    rounded = []
    plain = merged_model.rounded_tensors

    def counted(bits: Bits, *rest: Any) -> Any:
        rounded.extend(bits)
        return plain(bits, *rest)

    monkeypatch.setattr(merged_model, "rounded_tensors", counted)
    partly.write(field, tuple(sorted(widths.items())))
    assert not rounded  # neither weights nor bits are others


@pytest.fixture
def vit(pico: Pico, tmp_path: Path) -> tuple[MergedModel, MergedModel]:
    """Two models of the same merges."""
    recipe, _ = model_recipe("vit", pico, tmp_path, lambda *_: tmp_path)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    one, other = (MergedModel(load_model(recipe.base.path, IMAGES), arenas) for _ in range(2))
    return one, other


def two_halves(merged: MergedModel, first: float, second: float) -> Field:
    size = merged.layout.size
    return Field(np.array([0, size // 2, size]), np.array([[first, second], [0.1, 0.2]]))


def test_what_has_not_changed_is_left_alone(vit: tuple[MergedModel, MergedModel]) -> None:
    merged, _ = vit
    merged.write(two_halves(merged, 0.3, 0.3))
    numbers = merged.merged.numpy()  # writes past torch, which it does not count
    numbers[3] = 77
    numbers[-64] = 88
    merged.write(two_halves(merged, 0.3, 0.4))
    assert numbers[3] == 77
    assert numbers[-64] != 88
    merged.forget()
    merged.write(two_halves(merged, 0.3, 0.4))
    assert numbers[3] != 77


def step(merged: MergedModel) -> None:
    for parameter in merged.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(merged.model.parameters()).step()


@torch.no_grad()
def add(merged: MergedModel) -> None:
    next(merged.model.parameters()).add_(1)


@torch.inference_mode()
def add_in_inference(merged: MergedModel) -> None:
    next(merged.model.parameters()).add_(1)


def load(merged: MergedModel) -> None:
    state = {name: tensor + 1 for name, tensor in merged.model.state_dict().items()}
    merged.model.load_state_dict(state)


def copy_to_state(merged: MergedModel) -> None:
    next(iter(merged.model.state_dict().values())).copy_(torch.tensor(3.0))


def fill_buffer(merged: MergedModel) -> None:
    merged.merged[5:9].zero_()


def write_tensors(merged: MergedModel) -> None:
    merged.write_tensors((n, torch.zeros(merged.layout.by_name[n].shape)) for n in ODD)


def fail(merged: MergedModel) -> None:
    with pytest.raises(NonFiniteError):
        merged.write(two_halves(merged, 0.3, np.inf))


def fail_in_tensors(merged: MergedModel) -> None:
    def tensors() -> Any:
        yield ODD[0], torch.zeros(merged.layout.by_name[ODD[0]].shape)
        raise KeyError

    with suppress(KeyError):
        merged.write_tensors(tensors())


def interrupt(merged: MergedModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged_model, "_is_finite", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merged.write(two_halves(merged, 0.9, 0.3))


ODD = ["classifier.weight"]
DISTURBANCES = [
    *(add, add_in_inference, step, load, copy_to_state, fill_buffer),
    *(write_tensors, fail, fail_in_tensors, interrupt),
]


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda one: one.__name__)
def test_what_else_writes_makes_the_next_write_whole(
    vit: tuple[MergedModel, MergedModel],
    parts: list[int | None],
    disturb: Callable[[MergedModel], None],
) -> None:
    merged, other = vit
    merged.write(two_halves(merged, 0.3, 0.3))
    disturb(merged)
    del parts[:]
    assert_same(merged, other, two_halves(merged, 0.3, 0.4))
    assert parts == [None, None]
    assert_same(merged, other, two_halves(merged, 0.3, 0.5))
    assert parts[-1] is not None


def test_evaluation_and_gradients_keep_what_lies_there(
    vit: tuple[MergedModel, MergedModel], parts: list[int | None]
) -> None:
    merged, other = vit
    merged.enable_gradient()
    pixels = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for second in (0.3, 0.4, 0.5):
        assert_same(merged, other, two_halves(merged, 0.3, second))
        merged.clear_gradient()
        merged.model(pixel_values=pixels).logits.sum().backward()
        merged.gradient(two_halves(merged, 0.3, second))
        with torch.inference_mode():
            merged.model(pixel_values=pixels)
    assert [part is None for part in parts[1::2]] == [True, False, False]


def test_another_head_is_written_as_a_whole(
    vit: tuple[MergedModel, MergedModel], parts: list[int | None]
) -> None:
    merged, _ = vit
    merged.write(two_halves(merged, 0.3, 0.3))
    merged.add_head("same", merged.model, None)  # type: ignore[arg-type]
    merged.write(two_halves(merged, 0.3, 0.3))
    assert parts == [None, None]


def test_statistics_are_merged_every_time(
    pico: Pico, tmp_path: Path, parts: list[int | None]
) -> None:
    recipe, _ = model_recipe("resnet", pico, tmp_path, lambda *_: tmp_path)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    partly, wholly = (MergedModel(load_model(recipe.base.path, IMAGES), arenas) for _ in range(2))
    pixels = torch.rand((4, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    field = Field(np.array([0, 300, arenas.layout.size]), np.array([[0.2, 0.3], [0.1, 0.2]]))
    assert running_statistics(arenas.layout.names)
    for value in (0.3, 0.3, 0.4):
        field = Field(field.boundaries, np.array([[value, 0.3], [0.1, 0.2]]))
        assert_same(partly, wholly, field)
        for merged in (partly, wholly):
            recalibrate(merged.model, [{"pixel_values": pixels}])  # torch counts no such write
    assert parts[-1] is not None


def test_weights_that_are_not_finite_are_named(vit: tuple[MergedModel, MergedModel]) -> None:
    merged, other = vit
    layout = merged.layout
    spec = layout.tensors[7]
    edges = np.array([0, spec.start, layout.tensors[8].start, layout.size])
    values = np.full((2, 3), 0.2)
    merged.write(Field(edges, values))
    values[0, 1] = 1e300
    with pytest.raises(NonFiniteError) as caught:
        merged.write(Field(edges, values))
    assert caught.value.where == f"tensor {spec.name!r}"
    values[0, 1] = 0.4
    assert_same(merged, other, Field(edges, values))


def test_an_array_that_the_caller_writes_to_again_is_no_memory(
    vit: tuple[MergedModel, MergedModel],
) -> None:
    merged, other = vit
    size = merged.layout.size
    edges = np.array([0, 1000, size])
    values = np.array([[0.1, 0.5], [0.1, 0.2]])
    merged.write(Field(edges[:], values))
    edges[1] = 2000
    assert_same(merged, other, Field(edges[:], values))


def test_tensors_that_torch_does_not_count_are_merged_whole(
    pico: Pico, tmp_path: Path, parts: list[int | None]
) -> None:
    recipe, _ = model_recipe("vit", pico, tmp_path, lambda *_: tmp_path)
    arenas = open_arenas(recipe, tmp_path / "arenas")
    model = load_model(recipe.base.path, IMAGES)
    with torch.inference_mode():
        merged = MergedModel(model, arenas)
        for second in (0.3, 0.4):
            merged.write(two_halves(merged, 0.3, second))
    assert parts == [None, None]


def test_a_part_of_nearly_everything_is_everything(
    vit: tuple[MergedModel, MergedModel], parts: list[int | None]
) -> None:
    merged, _ = vit
    size = merged.layout.size
    for share, value in ((0.5, 0.2), (last_write.WHOLE_FROM, 0.3), (0.5, 0.4)):
        edge = size - int(size * share) - 1
        field = Field(np.array([0, edge, size]), np.array([[0.1, value], [0.1, 0.1]]))
        merged.forget()
        merged.write(Field.constant(size, [0.1, 0.1]))
        merged.write(field)
    assert [part is None for part in parts[1::2]] == [False, True, False]


class TestRanges:
    @pytest.mark.parametrize("seed", range(20))
    def test_positions_where_fields_differ(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        size = 60
        fields = []
        for _ in range(2):
            edges = np.unique([0, size, *draw.integers(1, size, 5)])
            fields.append(Field(edges, draw.choice([0.0, -0.0, 1.0], (2, len(edges) - 1))))
        before, after = (field.at(np.arange(size)).copy().view(np.int64) for field in fields)
        ranges = differing(*fields)
        assert np.array_equal(marked(ranges, size), np.any(before != after, axis=0))
        assert np.all(ranges[1:, 0] > ranges[:-1, 1])  # joined where they touch

    @pytest.mark.parametrize("seed", range(20))
    def test_joined_ranges_hold_the_same_positions(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        ranges = np.sort(draw.integers(0, 50, (draw.integers(0, 6), 2)), axis=1)
        ranges[:, 1] += 1
        result = joined(ranges)
        assert np.array_equal(marked(result, 60), marked(ranges, 60))
        assert np.all(result[1:, 0] > result[:-1, 1])
        assert covered(result) == marked(result, 60).sum()
        stretches = [range(start, start + 7) for start in range(0, 60, 10)]
        met = [one for one in stretches if marked(ranges, 60)[one.start : one.stop].any()]
        assert list(touched(stretches, result)) == met
        assert touched(stretches, None) is stretches

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    def test_numbers_that_are_not_finite_are_found_in_ranges_alone(
        self, dtype: str, threads: int
    ) -> None:
        largest = torch.finfo(getattr(torch, dtype)).max
        numbers = torch.full((1_100_000,), largest, dtype=getattr(torch, dtype))
        numbers[1::2] *= -1
        inside = np.array([[0, 700], [770, 778], [900, len(numbers)]])
        around = np.array([[0, 777], [778, len(numbers)]])
        assert finite_in(numbers, inside, threads)
        for odd in (np.inf, -np.inf, np.nan):
            numbers[777] = odd
            assert not finite_in(numbers, inside, threads)
            assert finite_in(numbers, around, threads)
        assert finite_in(numbers, np.empty((0, 2), np.int64), threads)


def marked(ranges: Any, size: int) -> Any:
    """Whether each position lies in a range ``(size,)``."""
    held = np.zeros(size, bool)
    for start, stop in ranges:
        held[start:stop] = True
    return held
