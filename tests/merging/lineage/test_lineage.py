"""Experts of the base are told from other networks, and from twins that work alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.description import lineage_lines
from mergesearch.merging.lineage.refusal import check_lineages
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.lineage.units import moved_units
from tests.merging.lineage import twins


@cache
def _state(family: str, seed: int = 1) -> twins.State:
    return twins.build(family, seed).state_dict()


def _lineage(folder: Path, family: str, base: twins.State, expert: twins.State) -> Lineage:
    one, other = (
        open_checkpoint(str(twins.save(folder / name, family, state)), name)
        for name, state in (("base", base), ("expert", expert))
    )
    return compare_weights(one, other)


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_a_fine_tuned_expert_is_one_and_another_network_is_none(
    tmp_path: Path, family: str
) -> None:
    base = _state(family)
    tuned = twins.changed(base, twins.fine_tuned)
    lineage = _lineage(tmp_path / "tuned", family, base, tuned)
    assert lineage.kind == "fine-tuned"
    assert lineage.roles["attention"].distance == pytest.approx(0.1, abs=0.02)
    assert {head.pair for head in lineage.heads} == {"query-key", "value-output"}
    assert all(head.product.cosine > 0.9 for head in lineage.heads)
    other = _lineage(tmp_path / "other", family, base, _state(family, 2))
    assert other.kind == "unrelated"
    assert other.refused
    assert abs(other.roles["attention"].cosine) < 0.1
    same = _lineage(tmp_path / "same", family, base, base)
    assert same.kind == "identical"


TWINS = [
    ("llama", twins.permuted_units, "permuted", "mlp"),
    ("llama", twins.permuted_heads, "permuted", "self_attn"),
    ("llama", twins.locked_values, "locked", "value-output products of cosine"),
    ("llama", twins.rotated_keys, "locked", "query-key products of cosine"),
    ("llama", twins.rescaled_keys, "rescaled", "query times 5"),
    ("llama", twins.rescaled_units, "rescaled", "mlp"),
    ("qwen2", twins.rotated_keys, "locked", "query-key"),
    ("bert", twins.turned_keys, "locked", "query-key"),
    ("gpt2", twins.turned_fused_keys, "locked", "query-key"),
    ("gpt_neox", twins.turned_neox_values, "locked", "value-output"),
]


@pytest.mark.parametrize(("family", "change", "kind", "finding"), TWINS)
def test_twins_that_work_alike_are_recognised(
    tmp_path: Path, family: str, change: Callable, kind: str, finding: str
) -> None:
    """Also once they have been fine-tuned, before they were changed."""
    base = _state(family)
    twin = twins.changed(base, change)
    torch.testing.assert_close(
        twins.answers(family, twin), twins.answers(family, base), rtol=1e-3, atol=1e-3
    )
    for name, state in (
        ("twin", twin),
        ("tuned", twins.changed(twins.changed(base, twins.fine_tuned), change)),
    ):
        lineage = _lineage(tmp_path / name, family, base, state)
        assert lineage.kind == kind
        assert finding in lineage.finding


def test_keys_that_cancel_but_not_under_rotary_positions_are_told(tmp_path: Path) -> None:
    """Any invertible matrix cancels in the product, but Llama turns its features in between."""
    base = _state("llama")
    expert = twins.changed(base, twins.swapped_keys)
    lineage = _lineage(tmp_path, "llama", base, expert)
    assert lineage.kind == "locked"
    assert "not under rotary positions" in lineage.finding
    turned = _lineage(tmp_path / "turned", "llama", base, twins.changed(base, twins.rotated_keys))
    assert "rotary" not in turned.finding


def test_new_heads_and_vectors_do_not_make_an_expert_unrelated(tmp_path: Path) -> None:
    base = _state("llama")
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(base["lm_head.weight"].shape, generator=generator)
    expert = dict(base, **{"lm_head.weight": head})
    lineage = _lineage(tmp_path, "llama", base, expert)
    assert lineage.kind == "fine-tuned"
    assert abs(lineage.roles["head"].cosine) < 0.1


def test_one_matrix_that_was_trained_anew_is_a_warning(tmp_path: Path) -> None:
    base = _state("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    expert = dict(base, **{name: torch.randn(base[name].shape, generator=generator) / 50})
    lineage = _lineage(tmp_path, "llama", base, expert)
    assert lineage.apart == (name,)
    assert name in check_lineages([lineage], None, "")[0]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    base = _state("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    holed = base[name].clone()
    holed[3, 4] = torch.nan
    lineage = _lineage(tmp_path, "llama", base, dict(base, **{name: holed}))
    assert lineage.broken == (name,)
    (warning,) = check_lineages([lineage], None, "")
    assert f"received NaN or infinity in {name!r}; merges with it fail" in warning
    assert f"broken    NaN or infinity in {name!r}" in lineage_lines(lineage)
    assert not _lineage(tmp_path / "whole", "llama", base, base).broken


@pytest.mark.parametrize("kind", ["convolution", "perceptron"])
def test_plain_modules_in_another_order(tmp_path: Path, kind: str) -> None:
    """Every layer that reads or makes units in another order, without any known names."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(160, generator=generator)
    kernel = (3, 3) if kind == "convolution" else ()
    first = torch.randn(160, 30, *kernel, generator=generator)
    last = torch.randn(24, 160, *kernel, generator=generator)
    for name, tensors in (
        ("base", {"a.weight": first, "b.weight": last}),
        ("twin", {"a.weight": first[order], "b.weight": last[:, order]}),
    ):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
    base, twin = (open_checkpoint(str(tmp_path / f"{n}.safetensors"), n) for n in ("base", "twin"))
    lineage = compare_weights(base, twin)
    assert lineage.kind == "permuted"
    assert {one.name for one in lineage.moved} == {"a.weight", "b.weight"}
    assert all(one.cosine > 0.999 for one in lineage.moved)


def test_units_of_other_networks_are_not_matched() -> None:
    """Short signatures match by chance, and are not taken for units."""
    generator = np.random.default_rng(0)
    for rows in (8, 10, 64):
        ours, theirs = (generator.standard_normal((rows, 500)).astype(np.float32) for _ in "ab")
        assert moved_units("m", ours, theirs, 1, np.random.default_rng(1)) is None
        assert moved_units("m", ours, ours, 1, np.random.default_rng(1)) is None
        turned = moved_units("m", ours, ours[:, ::-1], 1, np.random.default_rng(1))
        assert turned is not None
        assert turned.moved == turned.sampled == 128


def test_a_refusal_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    base = _state("llama")
    other = _lineage(tmp_path / "a", "llama", base, _state("llama", 2))
    with pytest.raises(CheckpointError) as caught:
        check_lineages([other, other], None, "set it")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"expert 'expert' ({tmp_path / 'a' / 'expert'}): expected weights ")
    assert f"({tmp_path / 'a' / 'base'}), received cosines of " in message
    assert message.endswith("choose experts of this base (as 1 more of the experts), or set it")
    (warning,) = check_lineages([other], "a control", "")
    assert warning.endswith("merged all the same, as asked: a control")
    twin = _lineage(tmp_path / "b", "llama", base, twins.changed(base, twins.permuted_units))
    with pytest.raises(CheckpointError, match=r"weight matching \(Git Re-Basin\)"):
        check_lineages([twin], False, "set it")
