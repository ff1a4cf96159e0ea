"""Damaged configurations of mergekit, imported as recipes and as studies."""

from __future__ import annotations

from pathlib import Path
from random import Random

import yaml

from mergesearch.merging.mergekit_format.importing import import_mergekit
from mergesearch.spaces.groups import groupings_by_name
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, LINES, TEXT, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file
from tests.fuzz.yaml_mutations import YAML
from tests.search.conftest import make_pico_models

KIND = "mergekit_configs"


def prepare(folder: Path) -> None:
    """Make models and configurations of them."""
    make_pico_models(folder / "models")
    models = [
        {"model": "models/left", "parameters": {"weight": 0.4, "density": 0.5}},
        {
            "model": "models/right",
            "parameters": {
                "weight": [{"filter": "attention", "value": [0.1, 0.5]}, {"value": 0.3}],
                "density": 0.5,
            },
        },
    ]
    ties = {
        "merge_method": "ties",
        "base_model": "models/base",
        "models": models,
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "float32",
    }
    linear = {
        "merge_method": "linear",
        "models": [
            {"model": f"models/{name}", "parameters": {"weight": 0.5}} for name in ("left", "right")
        ],
        "tokenizer": {"source": "base"},
    }
    sources = [{"model": f"models/{name}", "layer_range": [0, 2]} for name in ("base", "left")]
    slerp = {
        "merge_method": "slerp",
        "base_model": "models/base",
        "slices": [{"sources": sources, "parameters": {"t": [0.1, 0.5]}}],
    }
    for name, data in {"ties": ties, "linear": linear, "slerp": slerp}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a configuration, and read or import it.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    source = draw.choice(sorted(prepared.glob("*.yaml")))
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "models").is_symlink():
        (scratch / "models").symlink_to(prepared / "models")
    config = scratch / "config.yaml"
    clear(config)
    config.write_bytes(mutated(source.read_bytes(), draw, YAML, YAML, LINES, TEXT, ANY))
    if not draw.randrange(ODD):
        put_odd_file(config, draw)
    wanted = [scratch / "recipe.yaml", scratch / "study.yaml"]
    for file in wanted:
        file.unlink(missing_ok=True)
    if draw.randrange(4):
        read_or_refuse(lambda: import_mergekit(config, groupings_by_name))
        return
    lenient = ["--lenient"] if draw.random() < 0.7 else []
    options = ["--out", str(wanted[0]), "--study", str(wanted[1])]
    code, _ = run_verb(["import", str(config), *options, *lenient])
    demand(code == 0 or not wanted[0].exists(), "expected nothing to be written")
