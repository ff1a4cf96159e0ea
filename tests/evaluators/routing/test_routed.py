"""Input-dependent evaluations: batches that tell nothing, and scores in the order of the items."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.evaluators.items import (
    LABELS,
    SIDE,
    candidate_at,
    classification,
    opened,
    pico_vit,
    save,
    three_splits,
)


class Recorder(torch.nn.Module):
    """Answers with the mean of an image, and writes down the batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[set[float]] = []

    def forward(self, images: torch.Tensor) -> Any:
        means = images.mean(dim=(1, 2, 3))
        self.seen.append(set(means.sign().tolist()))
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(torch.arange(len(images)) % LABELS, LABELS)
            * means[:, None]
        )


def test_batches_mix_domains_though_the_data_are_sorted(tmp_path: Path) -> None:
    count = 24
    domains = ["day"] * (count // 2) + ["night"] * (count // 2)
    splits = {}
    for seed, split in enumerate(("search", "validation", "test")):
        size = np.linspace(0.5, 1.5, count) * np.where(np.array(domains) == "day", 1.0, -1.0)
        splits[split] = {
            "pixels": (np.ones((count, SIDE, SIDE)) * size[:, None, None])
            .astype("float32")
            .tolist(),
            "label": [0] * count,
            "domain": domains,
            "id": [f"{seed}-{index}" for index in range(count)],
        }
    data = save(tmp_path / "data", splits)
    section = classification(str(data), {"metric": "cross_entropy", "name": "loss"}, batch_size=6)
    evaluator = opened(section | {"kind": "t3", "per": "batch"})
    plain = opened(section)
    recorder = Recorder()
    evaluator.evaluate(candidate_at([0.0], recorder), "test")
    assert recorder.seen == [{1.0, -1.0}] * 4
    sorted_recorder = Recorder()
    plain.evaluate(candidate_at([0.0], sorted_recorder), "test")
    assert sorted_recorder.seen == [{1.0}, {1.0}, {-1.0}, {-1.0}]


def test_scores_keep_the_order_of_the_items(tmp_path: Path) -> None:
    data = save(tmp_path / "data", three_splits())
    section = classification(str(data), {"metric": "cross_entropy", "name": "loss"}, batch_size=7)
    candidate = candidate_at([0.0], pico_vit().double())
    results = [
        opened(s).evaluate(candidate, "test").items["loss"]
        for s in (section, section | {"kind": "t3"})
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
