"""A merge as mergekit is told it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

OPTIONS = MergeOptions(copy_tokenizer=False, quiet=True)


def configuration(setting: Mapping[str, Any], point: Sequence[float]) -> MergeConfiguration:
    """The configuration of a point."""
    more = {"density": 0.2} if setting["method"] == "ties" else {}
    models = [
        {"model": expert, "parameters": {"weight": weight, **more}}
        for expert, weight in zip(setting["experts"], point, strict=True)
    ]
    data: dict[str, Any] = {
        "merge_method": setting["method"],
        "base_model": setting["base"],
        "models": models,
        "dtype": setting["dtype"],
    }
    if setting["method"] == "ties":
        data["parameters"] = {"normalize": False}
    return MergeConfiguration.model_validate(data)
