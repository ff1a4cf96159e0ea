"""An architecture that no table knows: its groups are read from the graph, all that there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergesearch.merging.alignment.aligning import ExpertAlignment
from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.moving import Moves, identity, moved
from mergesearch.merging.alignment.probing import random_order
from mergesearch.merging.alignment.spec import AlignSpec
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.extensions.references import give
from tests.merging.operators.calibrated import save_items

WIDTH = 6
RAYS = 3
TINT = 4


class Prism(nn.Module):
    """A mixer of tokens with rays and tints, a forked gate, and a mirrored branch."""

    def __init__(self) -> None:
        super().__init__()
        self.lens = nn.Linear(5, WIDTH)
        self.split = nn.Linear(WIDTH, RAYS * TINT)
        self.join = nn.Linear(RAYS * TINT, WIDTH, bias=False)
        self.weave = nn.Parameter(torch.zeros(RAYS, 7, 7))
        self.warm = nn.Linear(WIDTH, 9)
        self.cold = nn.Linear(WIDTH, 9)
        self.blend = nn.Linear(9, WIDTH)
        self.polish = nn.LayerNorm(WIDTH)
        self.mirror = nn.Linear(WIDTH, WIDTH)
        self.dial = nn.Parameter(torch.zeros(WIDTH))
        self.screen = nn.Linear(WIDTH, 2)

    def forward(self, light: torch.Tensor) -> dict[str, torch.Tensor]:
        beam = self.lens(light)
        batch, tokens, _ = beam.shape
        rays = self.split(beam).reshape(batch, tokens, RAYS, TINT).permute(0, 2, 1, 3)
        woven = self.weave.softmax(-1).expand(batch, RAYS, tokens, tokens) @ rays.sigmoid()
        beam = beam + self.join(woven.permute(0, 2, 1, 3).reshape(batch, tokens, RAYS * TINT))
        clear = self.polish(beam)
        beam = beam + self.blend(torch.tanh(self.warm(clear)) * self.cold(clear).cos())
        # The mirror reads units in one order and writes them in reverse: their order is fixed.
        folded = self.mirror(beam).flip(-1).square() * self.dial
        return {"logits": self.screen(torch.relu(beam).mean(1)) + folded.mean((1, 2))[:, None]}


#: Group -> (tensor, dimension) of all that it moves, as one would find it on paper.
BY_HAND: dict[str, set[tuple[str, int]]] = {
    "stream": {
        *((f"{name}.weight", 0) for name in ("lens", "join", "blend", "polish")),
        *((f"{name}.bias", 0) for name in ("lens", "blend", "polish")),
        *((f"{name}.weight", 1) for name in ("split", "warm", "cold", "mirror", "screen")),
    },
    "rays": {("split.weight", 0), ("split.bias", 0), ("join.weight", 1), ("weave", 0)},
    "tints": {("split.weight", 0), ("split.bias", 0), ("join.weight", 1)},
    "gate": {
        *((f"{name}.{what}", 0) for name in ("warm", "cold") for what in ("weight", "bias")),
        ("blend.weight", 1),
    },
}
#: ``flip`` has no rule, so what it touches keeps its order.
FIXED = {("mirror.weight", 0), ("mirror.bias", 0), ("dial", 0)}


def written(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in Prism().state_dict().items()
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("prism")
    give({"tests:Prism": Prism})
    light = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    save_items(folder / "items", {"light": light.tolist()})
    calibration = {
        "data": str(folder / "items"),
        "model_class": "tests:Prism",
        "inputs": {"light": "light"},
    }
    return Subject(open_checkpoint(str(written(folder / "base", 1)), "base"), calibration)


def answers(subject: Subject, source: object, moves: Moves) -> torch.Tensor:
    subject.load(source, subject.groups, moves)
    (logits,) = subject.answer()
    return logits.clone()


def scrambled(groups: Groups) -> Moves:
    rng = np.random.default_rng(4)
    return Moves(
        {
            index: random_order(groups.outer_sizes(index), groups.groups[index].size, rng)
            for index in identity(groups)
        }
    )


def test_groups_are_those_on_paper(subject: Subject) -> None:
    groups = subject.groups
    found = [{*groups.members(index)} for index in groups.order]
    assert sorted(map(sorted, found)) == sorted(map(sorted, BY_HAND.values()))
    assert not FIXED & {member for members in found for member in members}
    assert groups.odd == {"flip"}
    tints = next(i for i in groups.order if {*groups.members(i)} == BY_HAND["tints"])
    assert groups.outer_sizes(tints) == (RAYS,)
    assert groups.groups[tints].kind == "permutation"  # a sigmoid stands between both sides


def test_moves_of_all_groups_leave_the_function(subject: Subject) -> None:
    expected = answers(subject, subject.base, Moves())
    moves = scrambled(subject.groups)
    assert any((moves.orders[i] != o).any() for i, o in identity(subject.groups).items())
    found = answers(subject, subject.base, moves)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_order_that_is_fixed_changes_the_function(subject: Subject) -> None:
    expected = answers(subject, subject.base, Moves())
    state = dict(subject.model.state_dict())
    kept = state["mirror.weight"].clone()
    state["mirror.weight"].copy_(kept.flip(0))
    (found,) = subject.answer()
    state["mirror.weight"].copy_(kept)
    assert (found - expected).abs().max() > 0.01


def test_an_aligned_stranger_keeps_its_function(subject: Subject, tmp_path: Path) -> None:
    stranger = open_checkpoint(str(written(tmp_path / "b", 9)), "b")
    expected = answers(subject, stranger, Moves())
    groups, moves = ExpertAlignment(subject, stranger, AlignSpec(method="weight_matching")).found
    assert any((moves.orders[i] != order).any() for i, order in identity(groups).items())
    found = answers(subject, stranger, moves)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_permuted_twin_is_found(subject: Subject, tmp_path: Path) -> None:
    groups = subject.groups
    moves = scrambled(groups)
    state = {
        name: moved(subject.base.read(name), groups.tensors[name], groups, moves)
        for name in subject.base.tensors
    }
    (tmp_path / "twin").mkdir()
    save_file(state, tmp_path / "twin" / "model.safetensors")
    twin = open_checkpoint(str(tmp_path / "twin"), "twin")
    aligned = ExpertAlignment(subject, twin, AlignSpec(method="weight_matching"))
    for name in state:
        assert torch.equal(aligned.read(name), subject.base.read(name)), name
