"""What is known of the models that a merge comes from: their names on the hub, their licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import is_hub_name, split_path
from mergesearch.merging.recipe import Recipe, Source

#: A folder of the hub's local cache, ``models--org--name``.
_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")

#: Parent and the licence that it declares, or None.
Licences = Sequence[tuple[str, str | None]]


def hub_parents(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """Names on the hub of base and experts, as far as they are known.

    A name is known by the path, by the hub's local cache, or, of the base, by the cards of the
    experts, if these agree on what they were fine-tuned from. Names of local folders are no names
    on the hub.
    """
    own = _hub_name(recipe.base, base) or _declared_base(experts)
    sources = zip(recipe.experts, experts, strict=True)
    names = [own, *(_hub_name(source, checkpoint) for source, checkpoint in sources)]
    return list(dict.fromkeys(name for name in names if name is not None))


def _hub_name(source: Source, checkpoint: Checkpoint) -> str | None:
    _, path = split_path(source.path) or ("", source.path)
    if is_hub_name(path) and not Path(path).exists():
        return path.split("@")[0]
    for folder in (path, str(checkpoint.folder or "")):
        match = _CACHED.search(folder)
        if match is not None:
            return f"{match['org']}/{match['name']}"
    return None


def _declared_base(experts: Sequence[Checkpoint]) -> str | None:
    """What the cards of all experts name as their base, if that is one model."""
    declared = {_base_in_card(expert) for expert in experts} - {None}
    return declared.pop() if len(declared) == 1 else None


def _base_in_card(expert: Checkpoint) -> str | None:
    data = {} if expert.folder is None else read_front_matter(expert.folder / "README.md")
    found = data.get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    named = isinstance(found, str) and is_hub_name(found) and not Path(found).exists()
    return str(found).split("@")[0] if named else None


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence in the front matter of a checkpoint's README.md, or None."""
    if checkpoint.folder is None:
        return None
    licence = read_front_matter(checkpoint.folder / "README.md").get("license")
    return licence if isinstance(licence, str) and licence else None


def common_licence(licences: Licences) -> str | None:
    """The licence that all parents declare, or None."""
    declared = {licence for _, licence in licences}
    return declared.pop() if len(declared) == 1 else None


def licence_conflict(licences: Licences) -> str:
    """What keeps the card from stating a licence, in one sentence or two."""
    owners: dict[str, list[str]] = {}
    silent = [f"`{name}`" for name, licence in licences if licence is None]
    for name, licence in licences:
        if licence is not None:
            owners.setdefault(licence, []).append(f"`{name}`")
    shown = "; ".join(f"{licence} ({', '.join(names)})" for licence, names in owners.items())
    parts = [f"The parents declare different licences: {shown}."] if len(owners) > 1 else []
    if silent:
        parts.append(f"No licence is declared by {', '.join(silent)}.")
    return " ".join([*parts, "Settle the licence of the merge before you publish it."])


def read_front_matter(file: Path) -> Mapping[str, Any]:
    """The metadata of a card, empty where there is none that can be read."""
    try:
        before, head, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(head) if not before else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}
