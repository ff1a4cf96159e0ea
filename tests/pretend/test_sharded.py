"""A model over two cards: each card holds and merges its own tensors, and no other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import Field
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.device_map import device_map, dispatch
from mergesearch.merging.resident.merged_model import MergedModel
from tests.pretend.device import NAME, Cards
from tests.pretend.test_merged_model import AUTO, Pico, arenas_of, bind, output
from tests.pretend.test_study import ON_HOST, run
from tests.search.conftest import model_study
from tests.search.studies import fingerprint
from tests.search.study.test_heads_study import headed_items, headed_models
from tests.search.study.test_heads_study import study as headed_study

__all__ = ["headed_items", "headed_models"]

pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")


def over_two_cards(family: Any, arenas: Any) -> MergedModel:
    """The model with half of its blocks on each card."""
    model = load_model(str(family.base), AUTO[family.model_class])
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    devices = device_map(model, {f"{NAME}:0": 2 * weights, f"{NAME}:1": 2 * weights})
    assert set(devices.values()) == {f"{NAME}:0", f"{NAME}:1"}
    merged = MergedModel(model, arenas, devices=devices)
    dispatch(model, devices)
    return merged


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("llama", "task_arithmetic"),
        ("vit", "ties"),
        pytest.param("llama_bf16", "average", marks=pytest.mark.slow),
        pytest.param("gpt2", "slerp", marks=pytest.mark.slow),
    ],
)
def test_two_cards_hold_what_main_memory_holds(
    cards: Cards, pico: Pico, tmp_path: Path, name: str, operator: str
) -> None:
    family = pico(name)
    arenas = arenas_of(family, tmp_path, operator)
    before = [cards.live(0), cards.live(1)]
    sharded = over_two_cards(family, arenas)
    size = arenas.layout.size
    values = np.random.default_rng(0).uniform(0.1, 0.6, (arenas.packing.directions, 2))
    field = Field(np.array([0, size // 2 + 3, size]), values)
    sharded.write(field)
    held = [cards.live(0) - before[0], cards.live(1) - before[1]]
    whole = bind(family, arenas, "cpu")
    whole.write(field)
    assert [str(shard.merged.device) for shard in sharded.shards] in (
        [f"{NAME}:0", f"{NAME}:1"],
        [f"{NAME}:1", f"{NAME}:0"],
    )
    for one, other in zip(sharded.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one.cpu(), other)
    with torch.inference_mode():
        assert torch.equal(output(sharded.model).cpu(), output(whole.model))
    bytes_of_all = arenas.memory.nbytes + whole.merged.nbytes
    assert max(held) < 0.75 * bytes_of_all
    assert sum(held) < 1.05 * bytes_of_all


def test_gradients_of_two_cards_add_up(cards: Cards, pico: Pico, tmp_path: Path) -> None:
    family = pico("llama")
    arenas = arenas_of(family, tmp_path, "task_arithmetic")
    field = Field.constant(arenas.layout.size, [0.3, 0.4])
    gradients = []
    for merged in (over_two_cards(family, arenas), bind(family, arenas, "cpu")):
        merged.write(field)
        merged.enable_gradient()
        merged.clear_gradient()
        tokens = torch.arange(18).view(2, 9).to(merged.model.device)
        torch.autograd.backward(merged.model(input_ids=tokens).logits.square().mean())
        gradients.append(merged.gradient(field))
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5)


def test_a_study_over_two_cards_is_that_in_main_memory(
    cards: Cards, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    budget = {"budget": {"trials": 8}, "selection": {"leaders": 1}}
    study = model_study(pico_models, pico_items, **budget)
    with cards.counting(1) as counted:
        found = run(study, tmp_path / "cards", {"backend": "inline", "gpus": 2})
    assert fingerprint(found) == fingerprint(run(study, tmp_path / "host", ON_HOST))
    assert counted.operations > 100


@pytest.mark.slow
def test_heads_of_experts_lie_beside_the_layers_that_they_share(
    cards: Cards, headed_models: Path, headed_items: Path, tmp_path: Path
) -> None:
    sections = {"strategy": "cma_es", "budget": {"trials": 9}}
    study = headed_study(headed_models, headed_items, **sections)
    with cards.counting(1) as counted:
        found = run(study, tmp_path / "cards", {"backend": "inline", "gpus": 2})
    assert all(record.state == "complete" for record in found.log.records)
    assert fingerprint(found) == fingerprint(run(study, tmp_path / "host", ON_HOST))
    assert counted.operations > 100
