"""A model bound on a card holds the bits that a model bound in main memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, MergesearchError, NonFiniteError, Recipe, Source
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import Arenas, open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from tests.merging.resident.test_merged_model import AUTO, FAMILIES, Pico
from tests.pretend.device import NAME, Cards

pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

OPERATORS = ["average", "task_arithmetic", "ties", "slerp"]


def arenas_of(family: Any, folder: Path, operator: str) -> Arenas:
    experts = family.experts[:1] if operator == "slerp" else family.experts
    sources = tuple(Source(path.name, str(path)) for path in experts)
    special = (("batch_norm", "merge"),) if "resnet" in str(family.base) else ()
    base = Source("base", str(family.base))
    field = Field.constant(1, [0.0] * len(sources))
    return open_arenas(Recipe(base, sources, operator, field, special=special), folder)


def bind(family: Any, arenas: Arenas, device: str) -> MergedModel:
    model = load_model(str(family.base), AUTO[family.model_class])
    return MergedModel(model, arenas, device=device)


def field_of(merged: MergedModel, arenas: Arenas) -> Field:
    """Two segments, of which the first ends within a tensor."""
    size = merged.merged.numel()
    values = np.random.default_rng(0).uniform(0.1, 0.6, (arenas.packing.directions, 2))
    return Field(np.array([0, size // 2 + 3, size]), values)


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type in ("vit", "resnet"):
        size = getattr(model.config, "image_size", 16)
        inputs = {"pixel_values": torch.randn((2, 1, size, size), generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(0, 96, (2, 9), generator=generator)}
    with torch.inference_mode():
        return model(**{name: each.to(model.device) for name, each in inputs.items()}).logits


def some(names: list[str], operators: list[str], quick: set[tuple[str, str]]) -> list[Any]:
    """Every pair of a family and an operator; those that are not quick run in the long suite."""
    return [
        pytest.param(name, operator, marks=[] if (name, operator) in quick else pytest.mark.slow)
        for name in names
        for operator in operators
    ]


@pytest.mark.parametrize(
    ("name", "operator"),
    some(
        FAMILIES,
        OPERATORS,
        {(name, "task_arithmetic") for name in FAMILIES} | {("vit", each) for each in OPERATORS},
    ),
)
def test_has_the_bits_of_main_memory(
    cards: Cards, pico: Pico, tmp_path: Path, name: str, operator: str
) -> None:
    arenas = arenas_of(pico(name), tmp_path, operator)
    there = bind(pico(name), arenas, NAME)
    here = bind(pico(name), arenas, "cpu")
    field = field_of(here, arenas)
    there.write(field)
    here.write(field)
    assert there.merged.device == torch.device(NAME, 0)
    assert torch.equal(there.merged.cpu(), here.merged)
    assert {tensor.device.type for tensor in there.model.state_dict().values()} == {NAME}
    assert torch.equal(output(there.model).cpu(), output(here.model))


@pytest.mark.parametrize("name", ["vit", "llama_tied"])
def test_parameters_lie_in_the_buffer_and_ties_share_a_slice(
    cards: Cards, pico: Pico, tmp_path: Path, name: str
) -> None:
    merged = bind(pico(name), arenas_of(pico(name), tmp_path, "average"), NAME)
    first = merged.merged.data_ptr()
    parameters = dict(merged.model.named_parameters(remove_duplicate=False))
    assert all(first <= p.data_ptr() < first + merged.merged.nbytes for p in parameters.values())
    if name == "llama_tied":
        assert parameters["lm_head.weight"] is parameters["model.embed_tokens.weight"]
    merged.model.double()
    with pytest.raises(MergesearchError, match="expected inside the merged buffer"):
        merged.write(Field.constant(merged.merged.numel(), [0.5, 0.5]))


def test_weights_that_are_not_finite_are_named(cards: Cards, pico: Pico, tmp_path: Path) -> None:
    merged = bind(pico("vit"), arenas_of(pico("vit"), tmp_path, "average"), NAME)
    with pytest.raises(NonFiniteError) as caught:
        merged.write(Field.constant(merged.merged.numel(), [np.nan, 0.1]))
    assert "tensor" in caught.value.where
    merged.write(Field.constant(merged.merged.numel(), [0.5, 0.5]))  # the next trial is not harmed
    assert torch.isfinite(output(merged.model)).all()


def test_a_merge_waits_for_the_card_once_and_moves_no_weights(
    cards: Cards, pico: Pico, tmp_path: Path
) -> None:
    arenas = arenas_of(pico("llama"), tmp_path, "task_arithmetic")
    merged = bind(pico("llama"), arenas, NAME)
    field = field_of(merged, arenas)
    merged.write(field)
    with cards.counting() as counted, cards.peak() as peak:
        before = cards.live()
        merged.write(field)
    assert counted.synchronisations == 1  # whether everything is finite
    assert counted.device_to_host == 1
    assert counted.host_to_device < merged.merged.nbytes / 10
    assert cards.live() == before
    assert peak[0] <= 4 * merged.merged.nbytes


def test_what_does_not_fit_is_refused_and_leaves_the_card_as_it_was(
    cards: Cards, pico: Pico, tmp_path: Path
) -> None:
    arenas = arenas_of(pico("vit"), tmp_path, "average")
    before = cards.live()
    cards.limit(before + 2 * arenas.layout.size)
    with pytest.raises(torch.OutOfMemoryError):
        bind(pico("vit"), arenas, NAME)
    assert cards.live() == before


def test_two_models_lie_on_two_cards(cards: Cards, pico: Pico, tmp_path: Path) -> None:
    arenas = arenas_of(pico("vit"), tmp_path, "task_arithmetic")
    before = [cards.live(card) for card in (0, 1)]
    models = [bind(pico("vit"), arenas, f"{NAME}:{card}") for card in (0, 1)]
    field = field_of(models[0], arenas)
    for card, merged in enumerate(models):
        merged.write(field)
        assert merged.merged.device == torch.device(NAME, card)
    assert cards.live(0) - before[0] == cards.live(1) - before[1] > 0
    assert torch.equal(output(models[0].model).cpu(), output(models[1].model).cpu())
