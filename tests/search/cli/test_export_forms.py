"""Exports as an adapter and as GGUF, of a study with scores at int4, as a user makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging.checkpoints.opening import open_checkpoint
from tests.merging.export.test_adapter import recipe_of
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.studies import write_study


def study_with_adapters(place: Path, items: Path, **sections: Any) -> Path:
    """A study of LoRA experts of a language model, scored as merged and at int4."""
    place.mkdir()
    recipe = recipe_of("llama", place)
    scores = {"kind": "language_model", "data": str(items)}
    data = {
        "name": "lora",
        "base": recipe.base.path,
        "experts": {expert.name: expert.path for expert in recipe.experts},
        "space": {"granularity": "global"},
        "evaluators": [
            scores | {"objectives": [{"name": "plain"}]},
            scores | {"objectives": [{"name": "int4"}], "quantise": "int4"},
        ],
        "anchors": "none",
        "budget": {"trials": 4},
        "selection": {"leaders": 1},
    }
    return write_study(data | sections, place)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of three splits."""
    import datasets

    place = tmp_path_factory.mktemp("texts") / "data"
    generator = torch.Generator().manual_seed(0)
    splits = {
        name: datasets.Dataset.from_dict(
            {"input_ids": torch.randint(3, 24, (6, 8), generator=generator).tolist()}
        )
        for name in ("search", "validation", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(place))
    return place


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A finished run of such a study."""
    place = tmp_path_factory.mktemp("run")
    study = study_with_adapters(place / "study", texts)
    code, _, err = mergesearch("run", study, "--run", place / "run", "--progress", "quiet")
    assert code == 0, err
    return place / "run"


def exported(*arguments: object) -> Mapping[str, Any]:
    code, out, err = mergesearch("export", *arguments, "--json")
    assert code == 0, err
    data: Mapping[str, Any] = json.loads(out)
    return data


def test_model_and_adapter_of_one_trial(run: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    adapter = tmp_path / "adapter"
    result = exported(run, "--trial", 2, "--out", full, "--adapter", adapter)
    assert result["identical"] is True  # the score at int4 too
    assert result["values"]["plain"] != result["values"]["int4"]
    assert result["adapter"]["exact"] is True
    scored = result["adapter"]["values"]  # the int4 of which is that of weights in fp32
    assert scored["plain"] == pytest.approx(result["values"]["plain"], abs=1e-4)
    assert scored.keys() == result["adapter"]["recorded"].keys() == result["values"].keys()
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    ours = open_checkpoint(f"{base}+{adapter}")
    for name, tensor in load_file(full / "model.safetensors").items():
        torch.testing.assert_close(ours.read(name), tensor, rtol=0, atol=2e-6, msg=name)


def test_the_loss_at_a_rank_is_said_everywhere(run: Path, tmp_path: Path) -> None:
    result = exported(run, "--trial", 2, "--adapter", tmp_path / "one", "--adapter-rank", 1)[
        "adapter"
    ]
    assert result["rank"] == 1
    assert result["exact"] is False
    assert result["values"]["plain"] != pytest.approx(result["recorded"]["plain"], abs=1e-4)
    assert 0 < result["mean_error"] <= result["worst_error"] < 1
    options = ("--trial", 2, "--adapter", tmp_path / "two", "--adapter-rank", 1)
    code, out, _ = mergesearch("export", run, *options)
    assert code == 0
    line = f"{result['mean_error']:.3g} in the mean and {result['worst_error']:.3g} at worst"
    assert line in out
    assert result["worst_tensor"] in out
    assert f"plain {result['values']['plain']:.6g} (merge {result['recorded']['plain']:.6g})" in out
    code, out, _ = mergesearch("export", run, *options, "--overwrite", "--no-rescore")
    assert "scored" not in out
    assert line in (tmp_path / "two" / "README.md").read_text()


def test_gguf_without_a_folder(run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    exported(run, "--trial", 2, "--out", tmp_path / "full")
    file = tmp_path / "new" / "model.gguf"
    result = exported(run, "--trial", 2, "--gguf", file, "--gguf-type", "f32")["gguf"]
    assert result["type"] == "f32"
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    expected = load_file(tmp_path / "full" / "model.safetensors")
    down = expected["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(torch.tensor(read["blk.0.ffn_down.weight"]), down)
    assert len(read) == len(expected)
    assert "one that exists" in refused("export", run, "--gguf", file)
    assert mergesearch("export", run, "--gguf", file, "--overwrite")[0] == 0


@pytest.mark.slow
def test_gguf_of_the_bits_of_layers(texts: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    study = study_with_adapters(
        tmp_path / "study",
        texts,
        space={"granularity": "global", "bits": {"mean": 4.0, "choices": [3, 4]}},
        evaluators=[{"kind": "language_model", "data": str(texts)}],
    )
    run = tmp_path / "run"
    code, _, err = mergesearch("run", study, "--run", run, "--progress", "quiet")
    assert code == 0, err
    file = tmp_path / "model.gguf"
    result = exported(run, "--gguf", file, "--gguf-type", "bits")["gguf"]
    assert len(gguf.GGUFReader(file).tensors) == result["tensors"]
    assert len(result["wider"]) == 7  # the model's rows are shorter than a block
    assert result["types"]["f16"] == 7 + 2  # those, embeddings and the output


def test_refusals(run: Path, tmp_path: Path) -> None:
    assert "give --out DIR, --adapter DIR or --gguf FILE" in refused("export", run)
    assert "--adapter-rank: expected --adapter" in refused(
        "export", run, "--out", tmp_path / "x", "--adapter-rank", 2
    )
    assert "--lossy: expected --adapter" in refused(
        "export", run, "--out", tmp_path / "x", "--lossy"
    )
    assert "--gguf-type: expected --gguf" in refused(
        "export", run, "--out", tmp_path / "x", "--gguf-type", "f16"
    )
    pytest.importorskip("gguf", reason="gguf is not installed")
    assert "expected a trial whose layers have bits of their own" in refused(
        "export", run, "--gguf", tmp_path / "x.gguf", "--gguf-type", "bits"
    )
