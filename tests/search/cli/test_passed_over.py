"""What an operator passes over is said by ``merge`` and on the card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.search.cli.test_cli import mergesearch
from tests.search.conftest import write_checkpoint

#: The tensors of a block of gpt-oss.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.mlp.router.weight": (4, 12),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 12, 16),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 16),
    "model.layers.0.mlp.experts.down_proj": (4, 8, 12),
    "model.layers.0.input_layernorm.weight": (12,),
}


def test_optmerge_merges_stacked_experts_and_names_the_rest(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name in ("base", "one", "two"):
        change = 0.0 if name == "base" else 0.1
        state = {n: t + change * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        write_checkpoint(tmp_path / name, state, {"model_type": "gpt_oss"})
    recipe = tmp_path / "recipe.yaml"
    sources = {"base": "base", "experts": ["one", "two"], "operator": "optmerge"}
    recipe.write_text(yaml.safe_dump(sources))
    code, out, err = mergesearch("merge", recipe, "--out", tmp_path / "out")
    assert code == 0, err
    sentence = "29% of the parameters stay the base's: model.embed_tokens.weight (480 in 1)"
    assert sentence in out
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    stacks = [name for name in SHAPES if name.endswith("_proj")]
    assert not any(torch.equal(merged[name], base[name]) for name in stacks)
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    code, out, err = mergesearch("merge", recipe, "--out", tmp_path / "again", "--json")
    passed = json.loads(out)["untouched"]
    assert passed["fate"] == "base"
    assert {one["kind"] for one in passed["kinds"]} == {
        "model.embed_tokens.weight",
        "model.layers.#.mlp.experts.gate_up_proj_bias",
        "model.layers.#.input_layernorm.weight",
    }
