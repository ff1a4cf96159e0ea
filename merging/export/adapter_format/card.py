"""The README.md of an exported adapter: what it is, what it lacks, and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from mergesearch.merging.export.parents import declared_licence, hub_base
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.recipe import Recipe

#: Tensors that a table lists; more are counted.
_ROWS = 40


def render_adapter_card(
    recipe: Recipe,
    family: ModelFamily,
    facts: Mapping[str, str],
    errors: Mapping[str, float],
    lost: Mapping[str, float],
) -> str:
    """Markdown with the hub's front matter.

    Args:
        recipe: What was merged.
        family: Its sources.
        facts: Shown as a table.
        errors: Tensor -> share of its change that the adapter lacks.
        lost: Tensor that the adapter leaves as it is in the base -> size of its change.
    """
    opening = (
        f"Merged by mergesearch with the operator `{recipe.operator}` over the base "
        f"`{recipe.base.name}`, and written as one LoRA adapter of it. The recipe (`recipe.yaml`) "
        "rebuilds the whole model."
    )
    sections = [
        f"---\n{_front_matter(recipe, family)}---",
        f"# Merge of {', '.join(expert.name for expert in recipe.experts)}, as an adapter",
        opening,
        "## Sources\n\n" + _table(("role", "name", "source"), _sources(recipe)),
    ]
    if facts:
        sections.append("## Facts\n\n" + _table(("fact", "value"), facts.items()))
        if lost or any(errors.values()):
            sections.append("Scores are those of the whole merge, which this adapter approximates.")
    inexact = {name: error for name, error in errors.items() if error}
    for title, sizes in (
        ("Relative error of changes", inexact),
        ("Changes that are left out, relative to the base", lost),
    ):
        if sizes:
            sections.append(f"## {title}\n\n" + _size_table(sizes))
    sections.append("## How to load\n\n" + _loading(recipe, family.base.config))
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe, family: ModelFamily) -> str:
    parent = hub_base(recipe, family.base, family.experts)
    known = {} if parent is None else {"base_model": parent, "base_model_relation": "adapter"}
    data: dict[str, Any] = {
        **known,
        "library_name": "peft",
        "tags": ["lora", "merge", "mergesearch"],
    }
    licences = {declared_licence(source) for source in family.sources}
    if len(licences) == 1 and (licence := licences.pop()) is not None:
        data["license"] = licence
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _sources(recipe: Recipe) -> list[tuple[str, ...]]:
    rows = [("base", recipe.base), *(("expert", expert) for expert in recipe.experts)]
    return [(role, source.name, f"`{source.path}`") for role, source in rows]


def _size_table(sizes: Mapping[str, float]) -> str:
    greatest = sorted(sizes, key=lambda name: -sizes[name])[:_ROWS]
    table = _table(("tensor", "share"), [(f"`{n}`", f"{sizes[n]:.3g}") for n in greatest])
    more = len(sizes) - len(greatest)
    return table + (f"\n\nand {more} more, which are smaller." if more else "")


def _loading(recipe: Recipe, config: Mapping[str, Any]) -> str:
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    labels = config.get("id2label") or {}
    classes = f", num_labels={len(labels)}" if "Classification" in architecture else ""
    code = (
        f"from peft import PeftModel\nfrom transformers import {architecture}\n\n"
        f'base = {architecture}.from_pretrained("{recipe.base.path.split("@")[0]}"{classes})\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        "model = model.merge_and_unload()  # the merged model as one"
    )
    return f"```python\n{code}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(str(value).split()).replace("|", "\\|") for value in row] for row in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
