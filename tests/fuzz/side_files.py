"""Damaged files beside weights: configurations, tokenizers, adapters, cards, and our own caches."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from mergesearch.evaluators.data.pretrained import checkpoint_config
from mergesearch.evaluators.text.tokenizers import parent_warnings
from mergesearch.merging import CheckpointError, Recipe
from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in
from mergesearch.merging.export.parents import declared_licence, hub_parents
from mergesearch.merging.export.pushing import local_names
from mergesearch.merging.family.tokenizer_files import renumbered, vocabulary_files
from mergesearch.merging.family.vocabulary import align_vocabularies, check_same_tokens
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.recipe_file import load_recipe, save_recipe
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.routing.sheet import SHEET, read_sheet
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, JSON, LINES, TEXT, Mutation, mutated
from tests.fuzz.odd_files import ODD, put_odd_file
from tests.fuzz.values import nasty
from tests.fuzz.yaml_mutations import YAML
from tests.merging.family.test_vocabulary import BASE, ONE, bpe, save, words

KIND = "side_files"

_QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
#: One seed in so many loads a model by transformers.
_LOADED = 15
_CARD = """---
license: mit
base_model: org/base
tags:
- merge
---
# A model
"""
#: Every key of an adapter's settings that is read.
_SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {"layers.[0-9].self_attn.q_proj": 2},
    "alpha_pattern": {"q_proj": 8},
    "modules_to_save": ["lm_head"],
    "target_modules": ["q_proj"],
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "bias": "none",
}
_ROUTING: dict[str, Any] = {
    "format": 1,
    "routing": {
        "method": "t3",
        "lambda_min": 0.0,
        "lambda_max": 1.0,
        "gamma": 2.0,
        "per": "item",
        "centred": True,
    },
    "experts": ["one", "two"],
    "model_class": "AutoModelForImageClassification",
    "prompts": {"": ["a photo of a {}"]},
    "classes": {"": ["cat", "dog"]},
    "fixed": False,
}


def prepare(folder: Path) -> None:
    """Make a base and an expert with tokenizers of their own, an adapter, an arena, a bundle."""
    save(folder / "base", words(BASE), 0)
    save(folder / "expert", words(ONE), 1)
    save(folder / "pairs", bpe(BASE), 2)
    for name in ("base", "expert"):
        (folder / name / "README.md").write_text(_CARD)
    _write_adapter(folder / "adapter")
    (folder / "bundle").mkdir()
    (folder / "bundle" / SHEET).write_text(json.dumps(_ROUTING))
    recipe = _recipe(folder)
    save_recipe(recipe, folder / "bundle" / "recipe.json")
    open_arenas(recipe, folder / "arena")


def _write_adapter(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = {
        f"{_QUERY}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{_QUERY}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    folder.mkdir()
    save_file(sides, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_SETTINGS))
    (folder / "README.md").write_text(_CARD)


def _recipe(folder: Path) -> Recipe:
    short = folder / "short.yaml"
    base = str(folder / "base")
    short.write_text(
        json.dumps(
            {
                "base": base,
                "experts": {"same": base, "again": base},
                "operator": "task_arithmetic",
                "coefficients": 0.3,
            }
        )
    )
    return load_recipe(short)


#: Way of reading -> files that are damaged for it, of which one is chosen.
WAYS: dict[str, tuple[str, ...]] = {
    "config": ("config.json", "generation_config.json"),
    "tokens": ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    "pairs": ("tokenizer.json",),
    "card": ("README.md",),
    "adapter": ("adapter_config.json",) * 3 + ("adapter_model.safetensors", "config.json"),
    "arena": ("sheet",),
    "bundle": (SHEET, "recipe.json"),
}


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a file beside weights, and read it in the way of those who need it.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    way = draw.choice((*WAYS, "adapter", "adapter", "config", "tokens"))
    file = draw.choice(WAYS[way])
    source = {"adapter": "adapter", "arena": "arena", "bundle": "bundle", "pairs": "pairs"}
    folder = scratch / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared / source.get(way, "expert"), folder)
    if way == "arena":
        _check_arena(prepared, folder, draw)
        return
    target = folder / file
    content = target.read_bytes() if target.is_file() else b'{"<x>": 3}'
    target.write_bytes(_damaged(content, file, draw))
    if not draw.randrange(ODD):
        put_odd_file(target, draw)
    # Panics of libraries in Rust are told on the standard error of the process.
    with redirect_stderr(io.StringIO()):
        _READERS[way](prepared, folder, draw)


def _damaged(content: bytes, file: str, draw: Random) -> bytes:
    if file.endswith(".md"):
        return mutated(content, draw, LINES, TEXT, YAML, ANY)
    if file.endswith(".safetensors"):
        size = struct.unpack("<Q", content[:8])[0]
        header = mutated(content[8 : 8 + size], draw, JSON, TEXT)
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    return mutated(content, draw, JSON, JSON, JSON, SETTINGS, TEXT, ANY)


def change_setting(content: bytes, draw: Random) -> bytes:
    """Give one setting of a JSON object a value that nobody expects."""
    try:
        data = json.loads(content)
        key = draw.choice(sorted(data))
    except (ValueError, TypeError, IndexError, RecursionError):
        return b"{}"
    if isinstance(data, dict):
        odd = ("(a+)+$", "(", ".*.*.*.*a", "..", "/", "~nobody", "a" * 300, 10**9, 10**18, -1, 8.5)
        data[key] = draw.choice((nasty(draw), {draw.choice(odd[:4]): 2}, draw.choice(odd)))
    return json.dumps(data).encode()


#: Mutations of settings, which stay JSON objects.
SETTINGS: dict[str, Mutation] = {"change_setting": change_setting}


def _opened(path: str) -> Checkpoint | None:
    found: Checkpoint | None = read_or_refuse(partial(open_checkpoint, path))
    return found


def _read_config(prepared: Path, folder: Path, draw: Random) -> None:
    read_or_refuse(partial(checkpoint_config, str(folder), "data.processor"))
    opened = _opened(str(folder))
    if opened is None:
        return
    read_or_refuse(opened.fingerprint)
    read_or_refuse(partial(renumbered, opened.config, {0: 1, 1: 0}, "config.json"))
    if not draw.randrange(_LOADED):
        read_or_refuse(partial(load_model, str(folder), "AutoModelForCausalLM"))
    elif not draw.randrange(_LOADED):
        run_verb(["merge", str(_merge_of(prepared, folder)), "--out", str(folder.parent / "out")])
        shutil.rmtree(folder.parent / "out", ignore_errors=True)


def _merge_of(prepared: Path, expert: Path) -> Path:
    recipe = expert.parent / "recipe.yaml"
    data = {
        "base": str(prepared / "expert"),
        "experts": {"expert": str(expert)},
        "operator": "task_arithmetic",
        "coefficients": 0.5,
    }
    recipe.write_text(json.dumps(data))
    return recipe


def _read_tokens(prepared: Path, folder: Path, draw: Random) -> None:
    base = open_checkpoint(str(prepared / "base"))
    opened = _opened(str(folder))
    if opened is None:
        return
    way = draw.randrange(4)
    if way == 0:
        read_or_refuse(partial(tokenizer_in, folder, "tokenizer"))
    elif way == 1:
        read_or_refuse(partial(parent_warnings, [base.path, opened.path], templates=True))
    else:
        read_or_refuse(partial(check_same_tokens, [base, opened]))
        sources = [opened, base] if way == 2 else [base, opened]
        for policy in ("union", "common"):
            aligned = read_or_refuse(partial(align_vocabularies, sources, policy))
            if aligned is not None:
                read_or_refuse(partial(vocabulary_files, aligned, sources[0], sources[1:]))


def _read_card(prepared: Path, folder: Path, draw: Random) -> None:
    opened = open_checkpoint(str(folder))
    base = open_checkpoint(str(prepared / "base"))
    read_or_refuse(partial(declared_licence, opened))
    read_or_refuse(partial(hub_parents, load_recipe(prepared / "short.yaml"), base, [opened] * 2))


def _read_adapter(prepared: Path, folder: Path, draw: Random) -> None:
    path = f"{prepared / 'expert'}+{folder}" if draw.random() < 0.8 else str(folder)
    opened = _opened(path)
    if isinstance(opened, AdaptedCheckpoint):
        for name in opened.adapted:
            read = read_or_refuse(partial(opened.read, name))
            demand(
                read is None or bool(torch.isfinite(read).all()), f"expected numbers in {name!r}"
            )
        read_or_refuse(opened.fingerprint)


def _read_bundle(prepared: Path, folder: Path, draw: Random) -> None:
    read_or_refuse(partial(read_sheet, folder))
    read_or_refuse(partial(local_names, folder))


_READERS = {
    "config": _read_config,
    "tokens": _read_tokens,
    "pairs": _read_tokens,
    "card": _read_card,
    "adapter": _read_adapter,
    "bundle": _read_bundle,
}


def _check_arena(prepared: Path, folder: Path, draw: Random) -> None:
    """Demand that a damaged sheet, stamp or digest is made anew, and the merge stays the same."""
    recipe = load_recipe(prepared / "short.yaml")
    cache = Path(os.environ["MERGESEARCH_CACHE"]) / "digests"
    kept = sorted(cache.glob("*.json")) if cache.is_dir() else []
    ours = [*folder.glob("*.json"), *folder.glob("*.stamp"), *kept]
    damaged = draw.choice(sorted(ours))
    before = damaged.read_bytes()
    damaged.write_bytes(mutated(before, draw, JSON, TEXT, ANY))
    try:
        opened = read_or_refuse(partial(open_arenas, recipe, folder), CheckpointError)
        whole = open_arenas(recipe, prepared / "arena")
        demand(opened is not None, "expected the arena to be made anew, received a refusal")
        demand(
            opened.memory.tobytes() == whole.memory.tobytes() and opened.packing == whole.packing,
            f"expected the same rows beside a damaged {damaged.suffix}",
        )
    finally:
        if damaged in kept:
            damaged.write_bytes(before)
