"""The README.md of an exported model: sources, operator, coefficients, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.export.about import NOTHING, About
from mergesearch.merging.export.card_metadata import checked_card, metadata
from mergesearch.merging.export.parents import (
    Licences,
    common_licence,
    declared_licence,
    hub_parents,
    licence_conflict,
)
from mergesearch.merging.family.heads import Heads
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout

#: Lines of a recipe that a card still shows; longer ones are in recipe.yaml alone.
_LONGEST = 60


def render_card(
    recipe: Recipe,
    layout: Layout,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    facts: Mapping[str, str],
    heads: Heads | None = None,
    about: About = NOTHING,
    mergekit: bool = False,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        recipe: What was merged.
        layout: Its tensors.
        base: The base.
        experts: The experts.
        facts: Shown as a table, for example scores.
        heads: What the sources keep for themselves.
        about: What the recipe does not say.
        mergekit: Whether mergekit's configuration lies beside the card.
    """
    parent = base if heads is None else heads.base
    licences = licences_of(parent, experts)
    opening = (
        f"Merged by mergesearch with the operator `{recipe.operator}`{_options(recipe)} over the "
        f"base `{recipe.base.name}`. The recipe (`recipe.yaml`, the same in `recipe.json`) "
        "rebuilds these weights."
    )
    sections = [
        f"# Merge of {', '.join(expert.name for expert in recipe.experts)}",
        opening,
        "## Sources\n\n"
        + table(("role", "name", "source", "weights (SHA-256)"), source_rows(recipe)),
        "## Coefficients\n\nOver all merged parameters.\n\n"
        + table(("direction", "mean", "min", "max"), _coefficient_rows(recipe, layout)),
    ]
    if 0 < about.recipe.count("\n") <= _LONGEST:
        sections.append(f"## Recipe\n\n```yaml\n{about.recipe.rstrip()}\n```")
    if heads is not None:
        sections.append("## Heads\n\n" + _heads(heads))
    sections += closing(facts, licences)
    sections.append("## How to reproduce\n\n" + _reproducing(about, mergekit))
    sections.append("## How to load\n\n" + _loading(base))
    tags = ["merge", "mergesearch", *(["mergekit"] if mergekit else [])]
    front = front_matter(recipe, base, experts, licences, tags, about)
    return checked_card(front, "\n\n".join(sections))


def licences_of(base: Checkpoint, experts: Sequence[Checkpoint]) -> Licences:
    return [(source.name, declared_licence(source)) for source in (base, *experts)]


def closing(facts: Mapping[str, str], licences: Licences) -> list[str]:
    """The sections of facts and of licences, where there is something to say."""
    sections = []
    if facts:
        sections.append("## Facts\n\n" + table(("fact", "value"), facts.items()))
    if common_licence(licences) is None:
        rows = [(name, licence or "not declared") for name, licence in licences]
        told = table(("parent", "licence"), rows)
        sections.append(f"## Licences of the parents\n\n{licence_conflict(licences)}\n\n{told}")
    return sections


def coefficient_summary(field: Field, layout: Layout) -> npt.NDArray[np.float64]:
    """Mean, least and greatest coefficient of each direction: ``(directions, 3)``.

    Over parameters; padding is left out.
    """
    starts = np.array([spec.start for spec in layout.tensors])
    stops = np.array([spec.stop for spec in layout.tensors])
    fine = field.refine(np.concatenate((starts, stops)))
    left = fine.boundaries[:-1]
    owned = left < stops[np.searchsorted(starts, left, side="right") - 1]
    values = fine.values[:, owned]
    sizes = np.diff(fine.boundaries)[owned]
    return np.stack((values @ sizes / sizes.sum(), values.min(axis=1), values.max(axis=1)), axis=1)


def front_matter(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    licences: Licences,
    tags: Sequence[str],
    about: About,
) -> str:
    return metadata(
        f"Merge of {', '.join(expert.name for expert in recipe.experts)}",
        hub_parents(recipe, base, experts),
        tags,
        "transformers" if base.config else None,
        common_licence(licences),
        about,
    )


def _reproducing(about: About, mergekit: bool) -> str:
    """Commands that make the merge again from its sources."""
    stored = f" --dtype {about.dtype}" if about.dtype else ""
    lines = ["pip install mergesearch", f"mergesearch merge recipe.yaml --out merged-model{stored}"]
    lines += [
        f"{line}{stored}" if line.startswith("mergesearch ") else line for line in about.commands
    ]
    lines += ["# or, up to rounding:", "mergekit-yaml mergekit_config.yml merged-model"] * mergekit
    return "From the sources above, in this folder:\n\n```bash\n" + "\n".join(lines) + "\n```"


def _options(recipe: Recipe) -> str:
    return "".join(f", {name} {value}" for name, value in recipe.hyperparameters)


def source_rows(recipe: Recipe) -> list[tuple[str, ...]]:
    roles = ("base", *("expert" for _ in recipe.experts))
    sources = zip(roles, (recipe.base, *recipe.experts), strict=True)
    return [
        (role, source.name, f"`{source.path}`", f"`{source.fingerprint[:12]}`")
        for role, source in sources
    ]


def _coefficient_rows(recipe: Recipe, layout: Layout) -> list[tuple[str, ...]]:
    summary = coefficient_summary(recipe.field, layout)
    # Operators that fuse experts, or add directions of their own, have no expert per direction.
    own = len(recipe.experts) == len(summary)
    names = (
        [expert.name for expert in recipe.experts]
        if own
        else [f"{i + 1}" for i in range(len(summary))]
    )
    return [
        (name, *(f"{value:.4g}" for value in row)) for name, row in zip(names, summary, strict=True)
    ]


def _loading(base: Checkpoint) -> str:
    architecture = (base.config.get("architectures") or [None])[0]
    if architecture is None:
        return (
            "```python\nfrom safetensors.torch import load_file\n\ntensors = "
            'load_file("model.safetensors")\n```'
        )
    return (
        f"```python\nfrom transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("path/to/this/folder")\n```'
    )


def _heads(heads: Heads) -> str:
    """What of the model is shared, and how the heads that are not are put beside it."""
    if heads.chosen is not None:
        return (
            f"The model has the head of `{heads.chosen}` around weights that all tasks share. "
            "Other tasks were measured with heads of their own, which are not in this folder."
        )
    rows = [(name, str(len(head.names)), f"{head.size:,}") for name, head in heads.apart.items()]
    about = (
        "The tensors of this folder are shared by all tasks. Heads were not merged: each task was "
        "measured with its expert's, which is in `heads/NAME` beside its configuration."
    )
    code = (
        "from pathlib import Path\n\nfrom mergesearch.merging.export.head_models import "
        'load_with_head\n\nmodel = load_with_head(Path("path/to/this/folder"), "NAME", '
        '"AutoModel...")\n'
    )
    lines = [
        about,
        table(("head of", "tensors", "parameters"), rows),
        "`mergesearch export --head NAME` writes the whole model of one head. In Python:",
        f"```python\n{code}```",
    ]
    if heads.added:
        owners = sorted({*heads.added.values()})
        lines.insert(
            1,
            f"It also holds {len(heads.added)} tensors that one expert alone has "
            f"({', '.join(owners)}), as they are.",
        )
    return "\n\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
