"""Makes LoRA adapters of the digits experts: low-rank task vectors of the linear layers.

``python -m experiments.zoo.digits_adapters`` writes ``zoo/digits/adapters/NAME`` in the form that
peft writes, for experiments with pools of adapters. The cut is the truncated singular value
decomposition, the nearest matrix of that rank (Eckart 1936, "The approximation of one matrix by
another of lower rank").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.zoo.digits_data import DOMAINS

if TYPE_CHECKING:
    import torch

RANK = 16


def extract_adapters(zoo: Path, rank: int = RANK) -> Path:
    """Write an adapter for every expert, unless they are there; returns their folder."""
    folder = zoo / "adapters"
    for name in DOMAINS:
        if not (folder / name / "adapter_model.safetensors").is_file():
            write_adapter(zoo / "base", zoo / name, folder / name, rank)
    return folder


def write_adapter(base: Path, expert: Path, out: Path, rank: int) -> None:
    """Write the adapter of one expert of a ViT for classification, in the form that peft writes."""
    from safetensors.torch import save_file
    from transformers import ViTForImageClassification

    models = [
        ViTForImageClassification.from_pretrained(path, local_files_only=True)
        for path in (base, expert)
    ]
    one, other = (dict(model.named_modules()) for model in models)
    linear = [
        name
        for name, module in one.items()
        if type(module).__name__ == "Linear" and "layers" in name
    ]
    tensors: dict[str, torch.Tensor] = {}
    for name in linear:
        up, down = _factors((other[name].weight - one[name].weight).detach(), rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in linear}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, in)`` -> B ``(out, rank)`` and A ``(rank, in)`` whose product is nearest to it."""
    import torch

    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float().contiguous(), (
        root[:, None] * right[:rank]
    ).float().contiguous()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from experiments.zoo.building import silence_transformers
    from experiments.zoo.digits import build_digits

    parser = argparse.ArgumentParser(
        description="Cut the experts of the digits zoo down to LoRA adapters."
    )
    parser.add_argument(
        "--zoo", type=Path, default=Path("zoo/digits"), help="the zoo (default: %(default)s)"
    )
    silence_transformers()
    options = parser.parse_args(arguments)
    print(extract_adapters(build_digits(options.zoo)))


if __name__ == "__main__":
    main()
