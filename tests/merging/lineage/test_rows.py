"""Samples are rows of the stored tensors, whatever stores them, and a bounded number of bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.family import align_family
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.rows import (
    RowReader,
    generator_for,
    matrix_view,
    sampled_rows,
)
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import FLOATING
from tests.headers import LLAMA_8B, write_adapter, write_llama

#: Models with an adapter that peft has merged.
GOLDEN = Path(__file__).parents[2] / "golden" / "peft"


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((4096, 14336), (4096, 14336)),
        ((64, 32, 3, 3), (64, 288)),
        ((128, 2880, 5760), (128 * 2880, 5760)),
        ((8, 16, 32), (8, 512)),
    ],
)
def test_trailing_dimensions_form_a_row(shape: tuple[int, ...], view: tuple[int, int]) -> None:
    assert matrix_view(shape) == view


def test_sampled_rows_are_distinct_and_within_the_budget() -> None:
    rows = sampled_rows(100_000, 512, 32768, generator_for(0, "a"))
    assert len(rows) == len(set(rows.tolist())) == 64
    assert np.all(np.diff(rows) > 0)
    assert (np.diff(rows) > 1).sum() == 7, "runs of a page each"
    assert rows.tolist() == sampled_rows(100_000, 512, 32768, generator_for(0, "a")).tolist()
    assert rows.tolist() != sampled_rows(100_000, 512, 32768, generator_for(1, "a")).tolist()
    assert sampled_rows(50, 512, 32768, generator_for(0, "a")).tolist() == list(range(50))
    assert len(sampled_rows(1000, 1 << 20, 32768, generator_for(0, "a"))) == 4


@pytest.mark.parametrize("dtype", sorted(FLOATING))
def test_rows_are_those_of_the_file(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 3, 5, generator=generator).to(getattr(torch, dtype))
    tensor[1, 1, 1] = float("nan")
    save_file({"a": torch.zeros(3), "t": tensor}, tmp_path / "m.safetensors")
    source = open_checkpoint(str(tmp_path / "m.safetensors"))
    wanted = np.array([0, 1, 2, 17, 39])
    reader = RowReader()
    read = reader.rows(source, "t", wanted)
    expected = tensor.float().nan_to_num().reshape(40, 15)[wanted].numpy()
    np.testing.assert_array_equal(read, expected)
    assert reader.size == 5 * 15 * tensor.itemsize


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_an_adapter_is_seen_as_the_model_with_its_change(name: str) -> None:
    base = open_checkpoint(str(GOLDEN / name))
    adapted = open_checkpoint(f"{GOLDEN / name}+{GOLDEN / name / 'adapter'}")
    assert isinstance(adapted, AdaptedCheckpoint)
    wanted = np.array([1, 5, 6])
    for stored in adapted.changes:
        read = RowReader().rows(adapted, stored, wanted)
        expected = adapted.read(stored).flatten(1)[wanted].numpy()
        np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(read, base.read(stored).flatten(1)[wanted].numpy())
    assert compare_weights(base, adapted).tensors == len(base.merged)


def test_tensors_that_a_policy_makes_are_left_out(tmp_path: Path) -> None:
    """What the base lacks is compared with nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, more in (
        ("base", {}),
        ("expert", {"new.weight": torch.randn(100, 100, generator=generator)}),
    ):
        tensors = {"w.weight": torch.randn(100, 100, generator=generator), **more}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    base, expert = (open_checkpoint(str(tmp_path / f"{n}.safetensors")) for n in ("base", "expert"))
    family = align_family(base, [expert], TensorPolicies(absent="base_zero"))
    assert RowReader().rows(family.base, "new.weight", np.arange(1)) is None
    lineage = compare_weights(family.base, family.experts[0])
    assert lineage.kind == "unrelated"
    assert lineage.tensors == 1


def test_a_model_of_8b_parameters_takes_some_megabytes(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", LLAMA_8B)
    adapter = write_adapter(tmp_path / "adapter", LLAMA_8B, 16)
    one = open_checkpoint(str(base))
    lineage = compare_weights(one, open_checkpoint(str(write_llama(tmp_path / "a", LLAMA_8B))))
    assert lineage.kind == "unknown"
    assert lineage.size < 40e6
    adapted = compare_weights(one, open_checkpoint(f"{base}+{adapter}"))
    assert adapted.tensors == 291
    assert adapted.size < 100e6
