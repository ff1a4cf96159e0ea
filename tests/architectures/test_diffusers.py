"""Studies of folders of diffusers: loaded as the class that they name, or refused by ``check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mergesearch.merging import CheckpointError
from mergesearch.merging.models.loading import load_model
from tests.architectures.denoisers import DENOISERS, INSTALLED
from tests.architectures.evaluations import EXPERTS
from tests.architectures.names_of import LAYOUTS
from tests.architectures.plain import Build
from tests.architectures.trial import make_family, write_study_of
from tests.search.cli.test_cli import mergesearch, refused

needs_diffusers = pytest.mark.skipif(not INSTALLED, reason="needs diffusers")


def study(folder: Path, evaluator: dict[str, Any], name: str = "UNet2DConditionModel") -> Path:
    """A study of pipelines whose denoiser is of a class of that name."""
    for member in ("base", *EXPERTS):
        denoiser = folder / member / "unet"
        denoiser.mkdir(parents=True, exist_ok=True)
        (denoiser / "config.json").write_text(json.dumps({"_class_name": name}))
        (folder / member / "model_index.json").write_text("{}")
        tensors = {
            n: tensor.contiguous() for n, tensor in Build("diffusers_dit")().state_dict().items()
        }
        save_file(tensors, denoiser / "diffusion_pytorch_model.safetensors")
    file = folder / "study.yaml"
    experts = {expert: str(folder / expert) for expert in EXPERTS}
    sections = {"name": "denoisers", "base": str(folder / "base"), "experts": experts}
    file.write_text(yaml.safe_dump(sections | {"evaluators": [evaluator], "budget": {"trials": 9}}))
    return file


def test_check_names_the_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refused("check", study(tmp_path, {"kind": "distance"}))
    assert "expected diffusers to be installed, which has its UNet2DConditionModel" in line
    assert "pip install diffusers" in line


def test_evaluators_of_other_models_are_refused(tmp_path: Path) -> None:
    line = refused("check", study(tmp_path, {"kind": "perplexity", "data": "texts.csv"}))
    assert "evaluators.0.kind: expected an evaluator of the base's UNet2DConditionModel" in line
    assert line.endswith("use kind: python, command or distance")


@needs_diffusers
def test_a_class_that_diffusers_lacks(tmp_path: Path) -> None:
    for name in ("SomethingNew", "DDPMScheduler"):
        line = refused("check", study(tmp_path, {"kind": "distance"}, name))
        assert f"received {name}; install the version that wrote the folder" in line


@needs_diffusers
@pytest.mark.parametrize("odd", ["missing", "other shape"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, odd: str) -> None:
    DENOISERS["diffusers_dit"].build().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "transformer_blocks.0.attn1.to_q.weight"
    kept = tensors.pop(name)
    if odd == "other shape":
        tensors[name] = kept[:3].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"expected .*DiTTransformer2DModel.*to_q.weight"):
        load_model(str(tmp_path), "AutoModel")


@needs_diffusers
@pytest.mark.parametrize("name", DENOISERS)
def test_layouts_are_those_of_diffusers(name: str) -> None:
    from mergesearch.merging.tensors.roles import block_axes, roles_of

    roles = roles_of([tensor for tensor, _ in DENOISERS[name].build().named_parameters()])
    towers = {tower: len(blocks) for tower, blocks in block_axes(roles.values()).items()}
    assert towers == LAYOUTS[name]


@needs_diffusers
@pytest.mark.slow
def test_an_export_is_loaded_with_diffusers_and_scored_again(tmp_path: Path) -> None:
    make_family(DENOISERS["diffusers_dit"], tmp_path)
    file = write_study_of("diffusers_dit", tmp_path)
    run = tmp_path / "run"
    code, _, err = mergesearch("run", file, "--run", run, "--progress", "quiet")
    assert code == 0, err
    code, out, err = mergesearch("export", run, "--out", tmp_path / "best")
    assert code == 0, err
    assert "loaded with diffusers and scored again on test items" in out
