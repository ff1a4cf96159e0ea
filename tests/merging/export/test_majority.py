"""Exports of elections: the majority is counted as tensors are merged, and corrected at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.in_memory import merge
from mergesearch.merging.kernels import thinned_numba

SHAPES = {"a.weight": (40, 30), "b.weight": (90,), "c.weight": (70, 33), "d.weight": (64, 64)}
COEFFICIENTS = [0.5, 1.0, 0.7]


def write_family(folder: Path, signs: dict[str, float], dtype: torch.dtype) -> list[Path]:
    """A base and three experts whose changes cancel in places, and else have these signs.

    Of a thousand elements a few cancel, as in real models.
    """
    generator = torch.Generator().manual_seed(1)
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    states = [base]
    for k in range(3):
        states.append({})
        for name, shape in SHAPES.items():
            change = signs[name] * (0.25 + 0.25 * torch.rand(shape, generator=generator))
            flat = change.view(-1)
            flat[::40] = (0.5, -0.5, 0.0)[k]
            states[-1][name] = (base[name].float() + change).to(dtype)
            states[-1][name].view(-1)[::40] = (base[name].float() + change).view(-1)[::40].to(dtype)
    folders = [folder / name for name in ("base", "one", "two", "three")]
    for path, state in zip(folders, states, strict=True):
        path.mkdir()
        save_file(state, path / "model.safetensors")
    return folders


def recipe_of(folders: list[Path], operator: str, options: dict[str, Any]) -> Recipe:
    layout = layout_of(open_checkpoint(str(folders[0])))
    return Recipe(
        base=Source("base", str(folders[0])),
        experts=tuple(Source(folder.name, str(folder)) for folder in folders[1:]),
        operator=operator,
        hyperparameters=tuple(options.items()),
        field=Field.constant(layout.size, COEFFICIENTS),
        layout=layout.digest,
    )


#: Signs of the tensors: the first one is misleading, right, or every guess is.
FAMILIES = {
    "first misleads": {"a.weight": 1.0, "b.weight": -1.0, "c.weight": -1.0, "d.weight": -1.0},
    "last misleads": {"a.weight": -1.0, "b.weight": -1.0, "c.weight": -1.0, "d.weight": 0.1},
    "all right": {"a.weight": 1.0, "b.weight": 1.0, "c.weight": 1.0, "d.weight": 1.0},
}
OPERATORS: dict[str, dict[str, Any]] = {
    "ties": {"density": 1.0, "scope": "tensor"},
    "dare_ties": {"drop": 0.2, "vectors": "drop"},
    "della": {"density": 0.8, "epsilon": 0.1, "vectors": "drop"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("patched", [16, 1 << 30])
def test_an_export_holds_what_is_merged_in_memory(
    dtype: torch.dtype,
    operator: str,
    family: str,
    patched: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thinned_numba, "PATCHED", patched)
    folders = write_family(tmp_path, FAMILIES[family], dtype)
    reads: Counter[tuple[str, str]] = Counter()
    read = Checkpoint.read

    def watched(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        reads[checkpoint.name, name] += 1
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", watched)
    options = OPERATORS[operator]
    exported = export_model(recipe_of(folders, operator, options), tmp_path / "out", threads=2)
    # Once; and once more where a guess was wrong and too much of it to be noted. Vectors that
    # kernels do not thin themselves are made from mappings of their own.
    mappings = 2 if operator == "della" else 1
    assert max(reads.values()) <= (1 if patched == 16 else 2) * mappings
    states = [load_file(folder / "model.safetensors") for folder in folders]
    named = {folder.name: state for folder, state in zip(folders[1:], states[1:], strict=True)}
    expected = merge(
        states[0],
        named,
        operator=operator,
        coefficients=COEFFICIENTS,
        allow_unrelated="made for this test",
        **options,
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    assert exported.rounding.change >= 0
