"""Soft maps: their policies at additions, and experts of other widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from mergesearch.merging.alignment.activations import collected
from mergesearch.merging.alignment.groups import Groups, State
from mergesearch.merging.alignment.kept_groups import from_tensors, to_tensors
from mergesearch.merging.alignment.moving import Moves, moved
from mergesearch.merging.alignment.probing import random_order
from mergesearch.merging.alignment.rectangular import plans_between
from mergesearch.merging.alignment.spec import Residual
from mergesearch.merging.alignment.streams import _combined, stream_maps
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.family.family import align_family
from mergesearch.merging.policies import parse_policies
from tests.merging.alignment.models import saved
from tests.merging.operators.calibrated import images, save_items

POLICIES = [each for each in get_args(Residual) if each != "joint"]


def items(folder: Path) -> dict[str, Any]:
    path = folder / "items"
    if not path.is_dir():
        save_items(path, images(40, 1))
    return {
        "data": str(path),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transport")
    for kind in ("vit", "resnet"):
        saved(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def vit(folder: Path) -> Subject:
    return Subject(open_checkpoint(str(folder / "vit"), "base"), items(folder))


class Permuted:
    """The base with the units of its stream in another order."""

    name = "permuted"

    def __init__(self, subject: Subject, moves: Moves) -> None:
        self._subject = subject
        self._moves = moves
        self.tensors = subject.base.tensors

    def read(self, name: str) -> torch.Tensor:
        groups = self._subject.groups
        tensor = self._subject.base.read(name)
        axes = groups.tensors.get(name, ())
        return moved(tensor, axes, groups, self._moves)


class TestPolicies:
    def test_states_of_a_stream_are_read_in_order(self, vit: Subject) -> None:
        ((index, flow),) = vit.groups.flows.items()
        assert {*flow.uses} == {*vit.groups.members(index)}
        # One addition for the positions, and two in each of two layers.
        assert sum(bool(state.added) for state in flow.states) == 5
        ends = [("layernorm_before.weight", 0), ("query.weight", 1), ("output.dense.weight", 0)]
        for end, place in ends:
            first, second = (
                state
                for (name, at), state in flow.uses.items()
                if name.endswith(end) and at == place and "intermediate" not in name
                if "attention.output" in name or "output" not in end
            )
            assert first < second

    def test_groups_come_back_from_a_file(self, vit: Subject) -> None:
        again = from_tensors(to_tensors(vit.groups))
        assert isinstance(again, Groups)
        assert vars(again) == vars(vit.groups)

    def test_sums_combine_maps_as_the_paper_says(self) -> None:
        stream, branch = torch.eye(2).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
        sizes = {0: torch.tensor([[3.0, -3.0], [1.0, 1.0]]), 1: torch.tensor([[1.0], [3.0]])}
        state = State((), None, added=(0, 1))
        # Shares of the stream: 1/2; 4/8; 3/4 for the first unit and 1/4 for the second.
        expected = {"averaging": [0.5, 0.5], "weighted_scalar": [0.5, 0.5]}
        expected["weighted_matrix"] = [0.75, 0.25]
        for policy, shares in expected.items():
            found = _combined([stream, branch], state, sizes, policy)  # type: ignore[arg-type]
            share = torch.tensor(shares).double()[:, None]
            torch.testing.assert_close(found, share * stream + (1 - share) * branch)
        sizes[1] = 3 * sizes[1]
        found = _combined([stream, branch], state, sizes, "weighted_scalar")
        torch.testing.assert_close(found, 0.25 * stream + 0.75 * branch)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_permuted_stream_is_found(self, vit: Subject, policy: Any) -> None:
        groups = vit.groups
        (index,) = groups.flows
        order = random_order((), groups.groups[index].size, np.random.default_rng(2))
        other = Permuted(vit, Moves({index: order}))
        own = stream_maps(vit, other, policy, 0.002)
        for name, axes in groups.tensors.items():
            back = moved(other.read(name), axes, groups, Moves(own=own), name)
            torch.testing.assert_close(back, vit.base.read(name), atol=1e-3, rtol=0)


def doubled(folder: Path, out: Path) -> Path:
    """The ResNet with two copies of every unit, each of which is read by half."""
    from safetensors.torch import load_file, save_file

    subject = Subject(open_checkpoint(str(folder / "resnet"), "base"))
    groups = subject.groups
    tensors = load_file(folder / "resnet" / "model.safetensors")
    for name, axes in groups.tensors.items():
        for place, axis in enumerate(axes):
            if axis and axis[0].group is not None:
                tensors[name] = tensors[name].repeat_interleave(2, place)
                if groups.inputs.get(name) == place:
                    tensors[name] = tensors[name] / 2
    config = json.loads((folder / "resnet" / "config.json").read_text())
    config["embedding_size"] *= 2
    config["hidden_sizes"] = [2 * size for size in config["hidden_sizes"]]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_wider_twin_becomes_the_base(folder: Path, tmp_path: Path) -> None:
    base = open_checkpoint(str(folder / "resnet"), "base")
    twin = open_checkpoint(str(doubled(folder, tmp_path / "twin")), "b")
    align = {"method": "transport", "smoothing": 0.002, "calibration": items(folder)}
    policies = parse_policies({"align": {"b": align}, "batch_norm": "merge"})
    found = align_family(base, [twin], policies)
    (expert,) = found.experts
    # Units that are always 0 are alike, and are mixed with one another.
    alive = alive_of(Subject(base, items(folder)))
    groups = Subject(base, items(folder)).groups
    for name in base.merged:
        ours, theirs = base.read(name), expert.read(name)
        assert theirs.shape == ours.shape
        for place, axis in enumerate(groups.tensors[name]):
            if axis and axis[0].group in alive:
                units = alive[axis[0].group].nonzero()[:, 0]
                ours, theirs = (each.index_select(place, units) for each in (ours, theirs))
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def alive_of(subject: Subject) -> dict[int, torch.Tensor]:
    """Group -> which of its units answer at all, wherever they are read."""
    groups = subject.groups
    read = collected(subject, subject.base, groups.reads, subject.batches("b"))
    alive: dict[int, torch.Tensor] = {}
    for place, axes in groups.reads.items():
        group = next(leaf.group for axis in axes for leaf in axis if leaf.group is not None)
        answers = read[place].norm(dim=1) > 0
        alive[group] = alive.get(group, answers) & answers
    return alive


def test_models_that_differ_in_more_than_widths_are_refused(folder: Path, vit: Subject) -> None:
    other = Subject(open_checkpoint(str(folder / "resnet"), "b"))
    with pytest.raises(RecipeError, match="differs from the base in widths alone"):
        plans_between(vit, other, 0.1)
