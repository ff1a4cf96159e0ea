"""The README.md of a mixture that was made smaller."""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.merging.export.about import NOTHING
from mergesearch.merging.export.card_metadata import checked_card, metadata
from mergesearch.merging.export.parents import declared_licence
from mergesearch.merging.mixture.planning import BlockPlan, MixturePlan
from mergesearch.merging.mixture.recipe import MixtureRecipe


def mixture_card(recipe: MixtureRecipe, plan: MixturePlan, notes: Sequence[str]) -> str:
    """Markdown with the hub's front matter.

    Args:
        recipe: What was done to which model.
        plan: What became of its blocks.
        notes: What there is to know beside.
    """
    before = plan.blocks[0].layer.experts
    opening = (
        f"`{recipe.name}` with {plan.stored} experts in each block, {before} before, made by "
        f"mergesearch with the operator `{recipe.operator.name}` ({recipe.operator.paper}): "
        f"{recipe.operator.summary}. The recipe (`recipe.yaml`) makes these weights again; its "
        f"base has the weights (SHA-256) `{recipe.fingerprint[:12]}`."
    )
    sections = [f"# {recipe.name} with {plan.stored} experts", opening, *notes]
    sections.append("## Groups\n\n" + _groups(plan.blocks))
    sections.append(
        "## How to reproduce\n\n```bash\npip install mergesearch\nmergesearch merge recipe.yaml "
        "--out smaller-model\n```"
    )
    front = metadata(
        recipe.name,
        (),
        ["merge", "mergesearch", "moe"],
        "transformers",
        declared_licence(plan.checkpoint),
        NOTHING,
    )
    return checked_card(front, "\n\n".join(sections))


def _groups(blocks: Sequence[BlockPlan]) -> str:
    """A table of what each block's experts were made of, and how much these were used."""
    lines = ["| block | experts | share of use |", "| --- | --- | --- |"]
    for block in blocks:
        groups = "; ".join(" + ".join(map(str, group)) for group in block.groups)
        usage = [sum(block.statistics.usage[list(group)]) for group in block.groups]
        shown = "; ".join(f"{100 * value:.0f} %" for value in usage)
        lines.append(f"| {block.layer.block} | {groups} | {shown} |")
    return "\n".join(lines)
