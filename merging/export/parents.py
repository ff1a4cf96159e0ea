"""What is known of the models that a merge comes from: their names on the hub, their licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import is_hub_name, split_path
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.paths import exists
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import path_shown, printable
from mergesearch.merging.foreign.yaml_text import parse_yaml
from mergesearch.merging.recipe import Recipe, Source

#: A folder of the hub's local cache, ``models--org--name``.
_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")

#: The most characters of the metadata of a card, and of the name of a licence.
_FRONT_MATTER = 1 << 18
_LICENCE = 100

#: Parent and the licence that it declares, or None.
Licences = Sequence[tuple[str, str | None]]


def hub_parents(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """Names on the hub of base and experts, as far as they are known.

    A name is known by the path, by the hub's local cache, or, of the base, by the cards and
    adapter settings of the experts, if these agree on what they were fine-tuned from. Names of
    local folders are no names on the hub.
    """
    sources = zip(recipe.experts, experts, strict=True)
    names = [
        hub_base(recipe, base, experts),
        *(_hub_name(source, checkpoint) for source, checkpoint in sources),
    ]
    return list(dict.fromkeys(name for name in names if name is not None))


def hub_base(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]) -> str | None:
    """The name on the hub of the base, as far as it is known; see :func:`hub_parents`."""
    return _hub_name(recipe.base, base) or _declared_base(experts)


def _hub_name(source: Source, checkpoint: Checkpoint) -> str | None:
    _, path = split_path(source.path) or ("", source.path)
    if is_hub_name(path) and not exists(Path(path)):
        return path.split("@")[0]
    for folder in (path, str(_own_folder(checkpoint) or "")):
        match = _CACHED.search(folder)
        if match is not None:
            return f"{match['org']}/{match['name']}"
    return None


def _declared_base(experts: Sequence[Checkpoint]) -> str | None:
    """What the cards or adapter settings of all experts name as their base, if that is one."""
    declared = {_base_in_card(expert) for expert in experts} - {None}
    return declared.pop() if len(declared) == 1 else None


def _base_in_card(expert: Checkpoint) -> str | None:
    folder = _own_folder(expert)
    data = {} if folder is None else read_front_matter(folder / "README.md")
    found = data.get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if found is None and isinstance(expert, AdaptedCheckpoint):
        found = expert.adapter.base
    named = isinstance(found, str) and is_hub_name(found) and not exists(Path(found))
    return str(found).split("@")[0] if named else None


def _own_folder(checkpoint: Checkpoint) -> Path | None:
    """Where a checkpoint's own card lies: that of an adapter is not its model's."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return checkpoint.adapter.folder
    return checkpoint.folder


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence in the front matter of a checkpoint's README.md, or None."""
    folder = _own_folder(checkpoint)
    if folder is None:
        return None
    licence = read_front_matter(folder / "README.md").get("license")
    if not isinstance(licence, str) or not 0 < len(licence) <= _LICENCE:
        return None
    return licence if printable(licence) == licence else None


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
        parts = read_text(file).replace("\r\n", "\n").split("---\n", 2)
        whole = len(parts) == 3 and not parts[0] and len(parts[1]) <= _FRONT_MATTER
        data = parse_yaml(parts[1], path_shown(file)) if whole else None
    except InputError:
        return {}
    return data if isinstance(data, dict) else {}
