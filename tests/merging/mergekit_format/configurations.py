"""mergekit configurations that have a counterpart, for tests with and without mergekit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: Name -> what follows ``base_model``; BASE, ONE and TWO stand for the models.
CONFIGURATIONS: Mapping[str, str] = {
    "linear": """
        merge_method: linear
        models:
          - {model: BASE, parameters: {weight: 0.2}}
          - {model: ONE, parameters: {weight: 0.5}}
          - {model: TWO, parameters: {weight: [0.1, 0.9]}}
    """,
    "task arithmetic": """
        merge_method: task_arithmetic
        models:
          - model: ONE
            parameters: {weight: [{filter: mlp, value: [0.9, 0.1]}, {value: 0.4}]}
          - {model: TWO, parameters: {weight: 3e-1}}
        parameters: {lambda: 0.7, normalize: true}
    """,
    "slices": """
        merge_method: task_arithmetic
        slices:
          - sources:
              - {model: BASE, layer_range: [0, 1]}
              - {model: ONE, layer_range: [0, 1], parameters: {weight: 0.4}}
              - {model: TWO, layer_range: [0, 1], parameters: {weight: 0}}
          - sources:
              - {model: BASE, layer_range: [1, 2]}
              - {model: ONE, layer_range: [1, 2], parameters: {weight: 0.2}}
              - {model: TWO, layer_range: [1, 2]}
            parameters: {weight: [0.6, 0.8]}
    """,
    "ties": """
        merge_method: ties
        models:
          - {model: ONE, parameters: {weight: 1.0}}
          - {model: TWO, parameters: {weight: 0.4}}
        parameters: {density: 0.5, int8_mask: true}
    """,
    "ties of equal weights": """
        merge_method: ties
        models: [{model: ONE}, {model: TWO}]
        parameters: {density: 0.5, weight: 0.5, lambda: [0.4, 1.2]}
    """,
    "sums of ties": """
        merge_method: ties
        models:
          - {model: ONE, parameters: {weight: 1.0}}
          - {model: TWO, parameters: {weight: -0.4}}
        parameters: {density: 0.25, normalize: false, lambda: 0.5}
    """,
    "dare without dropping": """
        merge_method: dare_ties
        models:
          - {model: ONE, parameters: {weight: 1.0}}
          - {model: TWO, parameters: {weight: 0.4}}
    """,
    "della without dropping": """
        merge_method: della_linear
        models:
          - {model: ONE, parameters: {weight: 1.0}}
          - {model: TWO, parameters: {weight: 0.4}}
    """,
    "breadcrumbs": """
        merge_method: breadcrumbs
        models: [{model: ONE}, {model: TWO}]
        parameters: {density: 0.5, gamma: 0.125, weight: [{filter: attn, value: 0.3}, {value: 0.5}]}
    """,
    "slerp": """
        merge_method: slerp
        models: [{model: BASE}, {model: ONE}]
        parameters:
          t: [{filter: self_attn, value: [0, 0.5]}, {filter: mlp, value: [1, 0.5]}, {value: 0.3}]
    """,
    "sce": """
        merge_method: sce
        models: [{model: ONE}, {model: TWO}]
    """,
}


def write_configuration(name: str, folder: Path, models: Mapping[str, Path]) -> Path:
    """The file of a configuration.

    Args:
        name: One of :data:`CONFIGURATIONS`.
        folder: Where to write.
        models: Folders of BASE, ONE and TWO.
    """
    data = placed(yaml.safe_load(CONFIGURATIONS[name]), models)
    path = folder / f"{name.replace(' ', '-')}.yml"
    path.write_text(yaml.safe_dump({"base_model": str(models["BASE"]), **data}))
    return path


def placed(value: Any, models: Mapping[str, Path]) -> Any:
    """A configuration with the folders of its models."""
    if isinstance(value, dict):
        return {key: placed(each, models) for key, each in value.items()}
    if isinstance(value, list):
        return [placed(each, models) for each in value]
    return str(models[value]) if isinstance(value, str) and value in models else value
