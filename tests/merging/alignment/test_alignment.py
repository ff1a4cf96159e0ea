"""Groups found from the graph leave a model's function as it is, and matching finds them again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.alignment.aligning import ExpertAlignment, weight_terms
from mergesearch.merging.alignment.axes import fresh, leaves, reshaped, tie
from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.invertible import attentions_of
from mergesearch.merging.alignment.matching import agreement, match
from mergesearch.merging.alignment.moving import Moves, from_tensors, identity, moved, to_tensors
from mergesearch.merging.alignment.probing import random_order, rotary_turn
from mergesearch.merging.alignment.rotations import with_turns
from mergesearch.merging.alignment.spec import AlignSpec
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.alignment.transport import plan
from mergesearch.merging.attention.random_maps import random_maps
from mergesearch.merging.attention.realigning import MappedHeads
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.tensors.memo import Memo
from tests.merging.alignment.models import MODELS, saved

#: Model -> groups as they are known by hand: for each, (end of a name, dimension) of its tensors in
#: the first layer; those of heads, of channels of queries, of values and of hidden units.
BY_HAND: Mapping[str, list[set[tuple[str, int]]]] = {
    "vit": [
        {("query.weight", 0), ("key.weight", 0), ("value.weight", 0), ("output.dense.weight", 1)},
        {("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0)},
    ],
    "bert": [
        {("query.weight", 0), ("key.weight", 0), ("value.weight", 0), ("output.dense.weight", 1)},
        {("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0)},
        {("pooler.dense.weight", 0), ("classifier.weight", 1)},
    ],
    "llama": [
        {("q_proj.weight", 0), ("k_proj.weight", 0), ("v_proj.weight", 0), ("o_proj.weight", 1)},
        {("q_proj.weight", 0), ("o_proj.weight", 1)},
        {("v_proj.weight", 0), ("o_proj.weight", 1)},
        {("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)},
        {("embed_tokens.weight", 1), ("o_proj.weight", 0), ("model.norm.weight", 0)},
    ],
    "gpt2": [
        {("c_attn.weight", 1), ("c_attn.bias", 0), ("attn.c_proj.weight", 0)},
        {("c_fc.weight", 1), ("c_fc.bias", 0), ("mlp.c_proj.weight", 0)},
        {("wte.weight", 1), ("wpe.weight", 1), ("c_attn.weight", 0), ("attn.c_proj.weight", 1)},
    ],
    "resnet": [
        {("layer.0.convolution.weight", 0), ("layer.1.convolution.weight", 1)},
        {("layer.0.normalization.running_var", 0), ("layer.1.convolution.weight", 1)},
    ],
}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Subject(open_checkpoint(saved(name, folder / name), "base")) for name in MODELS}


def scrambled(groups: Groups, seed: int = 1) -> Moves:
    rng = np.random.default_rng(seed)
    return Moves(
        {
            index: random_order(groups.outer_sizes(index), groups.groups[index].size, rng)
            for index in identity(groups)
        }
    )


class Twin:
    """The base with its units moved: an expert that is the same function."""

    def __init__(self, subject: Subject, moves: Moves) -> None:
        self._subject = subject
        self._moves = moves
        self.name = "twin"
        self.tensors = subject.base.tensors
        self.identity = "twin"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._subject.base.shape(name)

    def read(self, name: str) -> torch.Tensor:
        groups = self._subject.groups
        tensor = self._subject.base.read(name)
        if name not in groups.tensors:
            return tensor
        return moved(tensor, groups.tensors[name], groups, self._moves)


def answers(subject: Subject, source: object, moves: Moves | None = None) -> torch.Tensor:
    subject.load(source, subject.groups, moves)
    (logits,) = subject.answer()
    return logits.clone()


@pytest.mark.parametrize("name", MODELS)
class TestGroups:
    def test_random_moves_leave_the_function(self, subjects: dict[str, Subject], name: str) -> None:
        subject = subjects[name]
        expected = answers(subject, subject.base)
        found = answers(subject, subject.base, scrambled(subject.groups))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.01

    def test_agree_with_the_table(self, subjects: dict[str, Subject], name: str) -> None:
        groups = subjects[name].groups
        members = [groups.members(index) for index in groups.order]
        for known in BY_HAND[name]:
            assert any(
                all(any(n.endswith(end) and p == place for n, p in found) for end, place in known)
                for found in members
            ), known

    def test_matching_finds_a_permuted_twin(self, subjects: dict[str, Subject], name: str) -> None:
        subject = subjects[name]
        twin = Twin(subject, scrambled(subject.groups))
        terms = weight_terms(subject, twin)
        found = match(subject.groups, terms)
        for key, axes in subject.groups.tensors.items():
            back = moved(twin.read(key), axes, subject.groups, found)
            assert torch.equal(back, subject.base.read(key)), key
        before = agreement(subject.groups, terms, identity(subject.groups))
        assert agreement(subject.groups, terms, found.orders) > 1.5 * before

    def test_an_aligned_stranger_keeps_its_function(
        self, subjects: dict[str, Subject], name: str, tmp_path: Path
    ) -> None:
        subject = subjects[name]
        stranger = open_checkpoint(saved(name, tmp_path / "b", seed=5), "b")
        expected = answers(subject, stranger)
        # Rotations come on top of weight matching.
        spec = AlignSpec(method="procrustes", sweeps=1)
        groups, moves = ExpertAlignment(subject, stranger, spec).found
        assert any((moves.orders[i] != order).any() for i, order in identity(groups).items())
        found = answers(subject, stranger, moves)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class TestKinds:
    def test_rotary_channels_stay_in_pairs(self, subjects: dict[str, Subject]) -> None:
        groups = subjects["llama"].groups
        kinds = {}
        for index in groups.order:
            ends = {name.split(".")[-2] for name, _ in groups.members(index)}
            kinds.setdefault(frozenset(ends), set()).add(groups.groups[index].kind)
        assert kinds[frozenset({"q_proj", "k_proj"})] == {"rotary"}
        assert kinds[frozenset({"v_proj", "o_proj"})] == {"rotation"}
        assert kinds[frozenset({"gate_proj", "up_proj", "down_proj"})] == {"permutation"}

    def test_channels_have_an_order_in_each_head(self, subjects: dict[str, Subject]) -> None:
        groups = subjects["vit"].groups
        inner = [group for group in groups.groups if group.outer]
        assert len(inner) == 4
        assert {groups.outer_sizes(groups.groups.index(group)) for group in inner} == {(4,)}

    def test_turned_heads_are_turned_back(self, subjects: dict[str, Subject]) -> None:
        subject = subjects["vit"]
        groups = subject.groups
        rng = np.random.default_rng(3)
        turns = {
            index: torch.from_numpy(np.linalg.qr(rng.standard_normal((4, 4, 4)))[0])
            for index in groups.order
            if groups.groups[index].kind == "rotation"
        }
        twin = Twin(subject, Moves({}, turns))
        found = with_turns(groups, weight_terms(subject, twin), Moves(identity(groups)))
        for key, axes in groups.tensors.items():
            back = moved(twin.read(key), axes, groups, found)
            torch.testing.assert_close(back, subject.base.read(key), atol=1e-5, rtol=0)


class Mapped:
    """The base with heads in other places, mapped by random matrices that cancel."""

    def __init__(self, subject: Subject) -> None:
        base = subject.base
        self._attentions = attentions_of(base)
        self._heads = MappedHeads(self._attentions, self._maps)
        rng = np.random.default_rng(7)
        groups = subject.groups
        heads = {groups.groups[i].outer[0] for i in groups.order if groups.groups[i].outer}
        moves = {i: random_order((), groups.groups[i].size, rng) for i in sorted(heads)}
        self._base = Twin(subject, Moves(moves))
        self.name = "mapped"
        self.identity = "mapped"
        self.tensors = base.tensors
        self.merged = base.merged
        self.shape = base.shape

    def _maps(self, place: int) -> dict[Any, Any]:
        attention, free = self._attentions[place]
        counts = attention.counts
        rng = np.random.default_rng(place)
        return {one.pair: random_maps(one, counts.groups, counts.width, rng) for one in free}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._base.read(name)
        return self._heads.apply(name, tensor, "float32") if name in self._heads.names else tensor


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_heads_that_were_mapped_come_back(subjects: dict[str, Subject], name: str) -> None:
    subject = subjects[name]
    twin: Any = Mapped(subject)
    expected = answers(subject, subject.base)
    torch.testing.assert_close(answers(subject, twin), expected, atol=1e-5, rtol=0)
    turned, mapped = (
        ExpertAlignment(subject, twin, AlignSpec(method=method, sweeps=3))  # type: ignore[arg-type]
        for method in ("procrustes", "invertible")
    )
    assert mapped.heads is not None
    gaps = {
        alignment.spec.method: max(
            float((alignment.read(key) - subject.base.read(key)).abs().max())
            for key in mapped.heads.names
        )
        for alignment in (turned, mapped)
    }
    assert gaps["invertible"] < 1e-3 < 0.1 < gaps["procrustes"]


def test_moves_come_back_from_a_memo(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["resnet"]
    moves = scrambled(subject.groups)
    memo = Memo(tmp_path)
    first = memo.get(["moves"], lambda: to_tensors(moves))
    again = from_tensors(memo.get(["moves"], partial(pytest.fail, "made again")))
    assert from_tensors(first).orders.keys() == again.orders.keys() == moves.orders.keys()
    assert all((again.orders[index] == order).all() for index, order in moves.orders.items())


def test_a_view_splits_an_axis_that_was_tied_before() -> None:
    (whole,) = fresh(12)
    other = fresh(12)
    tie((whole,), other)
    heads, channels = reshaped([other], [3, 4])
    assert leaves((whole,)) == (*leaves(heads), *leaves(channels))


def test_axes_that_do_not_go_into_each_other_are_fixed() -> None:
    six = (*fresh(2), *fresh(3))
    other = (*fresh(3), *fresh(2))
    tie(six, other)
    assert all(axis.fixed for axis in leaves(six))


def test_a_rotary_turn_turns_pairs() -> None:
    turn = rotary_turn(torch.tensor([0.3, 1.0], dtype=torch.float64))
    pair = torch.complex(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, -1.0]).double())
    expected = pair * torch.polar(torch.ones(2).double(), torch.tensor([0.3, 1.0]).double())
    found = turn @ torch.cat([pair.real, pair.imag])
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag]))


class TestTransport:
    def test_marginals_are_uniform(self) -> None:
        cost = torch.from_numpy(np.random.default_rng(0).uniform(0, 2, (5, 5)))
        made = plan(cost, 0.1)
        torch.testing.assert_close(made.sum(0), torch.full((5,), 0.2).double())
        torch.testing.assert_close(made.sum(1), torch.full((5,), 0.2).double(), atol=1e-5, rtol=0)

    def test_little_smoothing_gives_the_assignment(self) -> None:
        order = [2, 0, 3, 1]
        cost = 1 - torch.eye(4, dtype=torch.float64)[order]
        torch.testing.assert_close(4 * plan(cost, 0.01), torch.eye(4).double()[order])
