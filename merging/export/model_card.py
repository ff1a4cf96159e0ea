"""The README.md of an exported model: sources, operator, coefficients, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import is_hub_name
from mergesearch.merging.family.heads import Heads
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout


def render_card(
    recipe: Recipe,
    layout: Layout,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    facts: Mapping[str, str],
    heads: Heads | None = None,
) -> str:
    """Markdown with the hub's front matter. ``facts`` is shown as a table, for example scores."""
    parent = base if heads is None else heads.base
    licences = [(source.name, declared_licence(source)) for source in (parent, *experts)]
    opening = (
        f"Merged by mergesearch with the operator `{recipe.operator}`{_options(recipe)} over the "
        f"base `{recipe.base.name}`. The recipe (`recipe.yaml`, the same in `recipe.json`) "
        "rebuilds these weights."
    )
    sections = [
        f"---\n{_front_matter(recipe, base, licences)}---",
        f"# Merge of {', '.join(expert.name for expert in recipe.experts)}",
        opening,
        "## Sources\n\n"
        + _table(("role", "name", "source", "weights (SHA-256)"), _source_rows(recipe)),
        "## Coefficients\n\nOver all merged parameters.\n\n"
        + _table(("direction", "mean", "min", "max"), _coefficient_rows(recipe, layout)),
    ]
    if heads is not None:
        sections.append("## Heads\n\n" + _heads(heads))
    if facts:
        sections.append("## Facts\n\n" + _table(("fact", "value"), facts.items()))
    if _common(licences) is None:
        sections.append(
            "## Licences of the parents\n\n"
            + _table(("parent", "licence"), _licence_rows(licences))
        )
    sections.append("## How to load\n\n" + _loading(base))
    return "\n\n".join(sections) + "\n"


def render_bundle_card(
    recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint], facts: Mapping[str, str]
) -> str:
    """Markdown of a merge that depends on its input: what it is, and how to load it."""
    licences = [(source.name, declared_licence(source)) for source in (base, *experts)]
    routing = dict(recipe.routing)
    opening = (
        f"**This is not a single checkpoint.** Its weights are merged by `{routing['method']}` "
        f"anew for each {routing['per']}, which costs several forward passes and a merge each "
        "time. The folders in here are what it is merged from; none of them is the model that was "
        "scored."
    )
    sections = [
        f"---\n{_front_matter(recipe, base, licences)}---",
        f"# Input-dependent merge of {', '.join(expert.name for expert in recipe.experts)}",
        opening,
        "## Parameters\n\n"
        + _table(("parameter", "value"), [(key, str(value)) for key, value in recipe.routing]),
        "## Sources\n\n"
        + _table(("role", "name", "source", "weights (SHA-256)"), _source_rows(recipe)),
    ]
    if facts:
        sections.append("## Facts\n\n" + _table(("fact", "value"), facts.items()))
    if _common(licences) is None:
        sections.append(
            "## Licences of the parents\n\n"
            + _table(("parent", "licence"), _licence_rows(licences))
        )
    code = (
        "from mergesearch.merging.routing.bundle import load\n\nmodel = "
        'load("path/to/this/folder")\n'
    )
    code += "logits = model(pixel_values=images).logits  # .weights says how each item was merged"
    sections.append(f"## How to load\n\nWith mergesearch installed:\n\n```python\n{code}\n```")
    return "\n\n".join(sections) + "\n"


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


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence in the front matter of a checkpoint's README.md, or None."""
    if checkpoint.folder is None:
        return None
    data = _read_front_matter(checkpoint.folder / "README.md")
    licence = data.get("license")
    return licence if isinstance(licence, str) and licence else None


def _read_front_matter(file: Path) -> dict[str, Any]:
    try:
        before, head, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(head) if not before else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # no card, no front matter, or none that can be read
    return data if isinstance(data, dict) else {}


def _front_matter(
    recipe: Recipe, base: Checkpoint, licences: Sequence[tuple[str, str | None]]
) -> str:
    data: dict[str, Any] = {
        "base_model": list(
            dict.fromkeys(_model_name(source) for source in (recipe.base, *recipe.experts))
        ),
        "base_model_relation": "merge",
        "tags": ["merge", "mergesearch"],
    }
    if base.config:
        data["library_name"] = "transformers"
    if (licence := _common(licences)) is not None:
        data["license"] = licence
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _model_name(source: Source) -> str:
    return source.path.split("@")[0] if is_hub_name(source.path) else source.name


def _common(licences: Sequence[tuple[str, str | None]]) -> str | None:
    declared = {licence for _, licence in licences}
    return declared.pop() if len(declared) == 1 else None


def _options(recipe: Recipe) -> str:
    return "".join(f", {name} {value}" for name, value in recipe.hyperparameters)


def _source_rows(recipe: Recipe) -> list[tuple[str, ...]]:
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


def _licence_rows(licences: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    return [(name, licence or "not declared") for name, licence in licences]


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
        _table(("head of", "tensors", "parameters"), rows),
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
