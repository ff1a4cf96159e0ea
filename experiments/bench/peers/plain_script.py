"""The script that people write: state dicts in memory, a loop over names, ``load_state_dict``."""

from __future__ import annotations

import sys
from typing import Any

import torch

from experiments.bench.peers.scoring import load, run_trials, setting_of


def main() -> None:
    """Run the trials, task arithmetic alone."""
    setting = setting_of(sys.argv)
    model = load(setting["base"])
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = [load(folder).state_dict() for folder in setting["experts"]]

    def trial(point: list[float]) -> Any:
        merged = {}
        for name, tensor in base.items():
            total = tensor.float()
            for weight, expert in zip(point, experts, strict=True):
                total = total + weight * (expert[name].float() - tensor.float())
            merged[name] = total.to(tensor.dtype)
        model.load_state_dict(merged)
        return model

    with torch.no_grad():
        run_trials(setting, trial)


if __name__ == "__main__":
    main()
