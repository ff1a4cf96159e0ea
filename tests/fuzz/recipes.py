"""Damaged recipes, exact and shorthand, read as YAML and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import yaml

from mergesearch.merging.recipe_file import load_recipe, save_recipe
from mergesearch.spaces.groups import groups_by_name
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, JSON, LINES, TEXT, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file
from tests.fuzz.yaml_mutations import YAML
from tests.search.conftest import make_pico_models

KIND = "recipes"
#: One seed in so many merges, where the recipe can be read.
MERGED = 8


def prepare(folder: Path) -> None:
    """Make models and recipes of them."""
    make_pico_models(folder / "models")
    short = {
        "base": "models/base",
        "experts": {"left": "models/left", "right": "models/right"},
        "operator": "ties",
        "hyperparameters": {"density": 0.5},
        "special": {"heads": "base"},
        "coefficients": {
            "default": 0.3,
            "block 1": {"left": 0.4, "right": 0.1},
            ".*attention.*": [0.1, 0.5],
        },
    }
    plain = {
        "base": "models/base",
        "experts": ["models/left", "models/right"],
        "operator": "task_arithmetic",
        "coefficients": 0.3,
    }
    for name, data in {"short": short, "plain": plain}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        (folder / f"{name}.json").write_text(json.dumps(data))
        exact = load_recipe(folder / f"{name}.yaml", groups_by_name)
        for suffix in ("yaml", "json"):
            save_recipe(exact, folder / f"{name}-exact.{suffix}")


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a recipe, and read it or merge by it.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    sources = [*prepared.glob("*.yaml"), *prepared.glob("*.json")]
    source = draw.choice(sorted(sources))
    tables = (JSON, TEXT, ANY) if source.suffix == ".json" else (YAML, YAML, LINES, TEXT, ANY)
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "models").is_symlink():
        (scratch / "models").symlink_to(prepared / "models")
    recipe = scratch / f"recipe{source.suffix}"
    clear(recipe)
    recipe.write_bytes(mutated(source.read_bytes(), draw, *tables))
    if not draw.randrange(ODD):
        put_odd_file(recipe, draw)
    out = scratch / "out"
    if draw.randrange(MERGED):
        read_or_refuse(lambda: load_recipe(recipe, groups_by_name))
        return
    arguments = ["merge", str(recipe), "--out", str(out), "--overwrite"]
    code, message = run_verb(arguments, codes=(0, 1, 2))
    # Coefficients may be so large that the merge is not finite, which only merging shows.
    demand(code != 1 or "holds NaN or infinite" in message, f"expected 0 or 2, received {message}")
    if code:
        left = not out.exists() or (out / "model.safetensors").is_file()
        demand(left, "expected nothing to be written by a recipe that is refused")
