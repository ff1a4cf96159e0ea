"""Folders of diffusers: opened at their denoiser, merged, and written in the same layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import CheckpointError, Field, Layout, Recipe, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.models.loading import load_model
from tests.architectures.names_of import layout_shapes

STEM = "diffusion_pytorch_model"


def tensors(layout: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in layout_shapes(layout).items()
    }


def model(folder: Path, layout: str, seed: int) -> Path:
    """The folder of one diffusers model."""
    folder.mkdir(parents=True)
    save_file(tensors(layout, seed), folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": layout, "sample_size": 8}))
    return folder


def pipeline(folder: Path, denoiser: str, layout: str, seed: int) -> Path:
    """A pipeline of a denoiser, an autoencoder and a scheduler."""
    model(folder / denoiser, layout, seed)
    model(folder / "vae", "diffusers_vae", seed + 100)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    (folder / "whole.safetensors").write_bytes(b"a second copy of all weights")
    (folder / "vae" / "code.py").write_text("")
    return folder


def average(base: Path, *experts: Path) -> Recipe:
    opened = open_checkpoint(str(base))
    layout = Layout.build(opened.merged)
    return Recipe(
        Source("base", str(base)),
        tuple(Source(path.name, str(path)) for path in experts),
        "average",
        Field.constant(layout.size, np.full(len(experts), 1 / len(experts))),
    )


@pytest.mark.parametrize(
    ("denoiser", "layout"), [("unet", "diffusers_unet"), ("transformer", "diffusers_flux")]
)
def test_a_pipeline_is_merged_at_its_denoiser(tmp_path: Path, denoiser: str, layout: str) -> None:
    folders = [
        pipeline(tmp_path / name, denoiser, layout, seed)
        for seed, name in enumerate(("base", "left", "right"))
    ]
    assert open_checkpoint(str(folders[0])).config["_class_name"] == layout

    out = export_model(average(*folders), tmp_path / "out").folder
    merged = load_file(out / denoiser / f"{STEM}.safetensors")
    left, right = tensors(layout, 1), tensors(layout, 2)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, (left[name] + right[name]) / 2, atol=1e-6)
    assert merged.keys() == left.keys()
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *("README.md", "recipe.json", "recipe.yaml", "model_index.json"),
        *(f"{denoiser}/{name}" for name in ("config.json", f"{STEM}.safetensors")),
        *(f"vae/{name}" for name in ("config.json", f"{STEM}.safetensors")),
        "scheduler/scheduler_config.json",
    }
    vae = Path("vae") / f"{STEM}.safetensors"
    assert (out / vae).read_bytes() == (folders[0] / vae).read_bytes()
    assert open_checkpoint(str(out)).names == open_checkpoint(str(folders[0])).names


def test_one_model_of_a_pipeline_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    folders = [
        pipeline(tmp_path / name, "unet", "diffusers_unet", seed) / "vae"
        for seed, name in enumerate(("base", "left"))
    ]
    out = export_model(average(*folders), tmp_path / "out", dtype="bfloat16").folder
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "recipe.json", "recipe.yaml", "config.json", f"{STEM}.safetensors")
    }
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folders[0] / "config.json").read_text()
    )


def test_shards_keep_the_names_of_diffusers(tmp_path: Path) -> None:
    folders = [
        model(tmp_path / name, "diffusers_flux", seed) for seed, name in enumerate(("base", "left"))
    ]
    out = export_model(average(*folders), tmp_path / "out", shard_bytes=200_000).folder
    assert (out / f"{STEM}.safetensors.index.json").is_file()
    again = export_model(average(out, folders[1]), tmp_path / "again").folder
    assert (again / f"{STEM}.safetensors").is_file()


def test_a_pipeline_without_a_denoiser_is_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "odd", "prior", "diffusers_dit", 0)
    with pytest.raises(CheckpointError, match=r"odd: expected model.safetensors or"):
        open_checkpoint(str(tmp_path / "odd"))


def test_without_diffusers_it_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    pipeline(tmp_path / "base", "unet", "diffusers_unet", 0)
    with pytest.raises(CheckpointError, match=r"which has its diffusers_unet, .* with a function"):
        load_model(str(tmp_path / "base"), "AutoModel")
