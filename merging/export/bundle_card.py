"""The README.md of a merge that depends on its input: what it serves, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.export.about import NOTHING
from mergesearch.merging.export.card_metadata import checked_card
from mergesearch.merging.export.model_card import (
    closing,
    front_matter,
    licences_of,
    source_rows,
    table,
)
from mergesearch.merging.recipe import Recipe

_LOAD = (
    'from mergesearch.merging.routing.bundle import load\n\nmodel = load("path/to/this/folder")\n'
)


@dataclass(frozen=True)
class Served:
    """Which tasks a merge serves.

    Attributes:
        tasks: Their names; empty where tasks make no difference.
        masks: Whether each is answered under a mask of its own.
        heads: Whether each is answered by the head of its expert.
        infers: Whether the task of an item is inferred where it is not told.
    """

    tasks: tuple[str, ...] = ()
    masks: bool = False
    heads: bool = False
    infers: bool = False


def render_bundle_card(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    facts: Mapping[str, str],
    served: Served,
    *,
    writes: str | None = None,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        recipe: What was merged.
        base: The base.
        experts: The experts.
        facts: Shown as a table.
        served: Its tasks.
        writes: Folder in it with the tokenizer, for one that continues texts.
    """
    licences = licences_of(base, experts)
    routing = dict(recipe.routing)
    opening = (
        f"**This is not a single checkpoint.** Its weights are merged by `{routing['method']}` "
        f"anew for each {routing['per']}, which costs several forward passes and a merge each "
        "time. The folders in here are what it is merged from; none of them is the model that was "
        "scored."
    )
    sections = [
        f"# Input-dependent merge of {', '.join(expert.name for expert in recipe.experts)}",
        opening,
        *([f"## Tasks\n\n{_tasks(served)}"] if served.tasks else []),
        "## Parameters\n\n"
        + table(("parameter", "value"), [(key, str(value)) for key, value in recipe.routing]),
        "## Sources\n\n"
        + table(("role", "name", "source", "weights (SHA-256)"), source_rows(recipe)),
        *closing(facts, licences),
    ]
    code = _calling(served) if writes is None else _writing(served, writes)
    sections.append(f"## How to load\n\nWith mergesearch installed:\n\n```python\n{code}\n```")
    front = front_matter(recipe, base, experts, licences, ["merge", "mergesearch"], NOTHING)
    return checked_card(front, "\n\n".join(sections))


def _tasks(served: Served) -> str:
    """The tasks, and what answers the items of each."""
    names = ", ".join(f"`{task}`" for task in served.tasks)
    if not served.masks:
        by = "by the head of the expert" if served.heads else "among the classes of the task"
        return f"It serves {names}. Each item is answered {by} that is named with it."
    head = ", by the head of its expert" if served.heads else ""
    told = (
        "`tasks_of` infers the task of an item, or of an episode from its first observation."
        if served.infers
        else "It infers no task: name that of every item."
    )
    return f"It serves {names}. Each is answered under a mask of its own{head}. {told}"


def _calling(served: Served) -> str:
    """How the bundle of a model that writes nothing is called."""
    named = f', tasks="{served.tasks[0]}"' if served.tasks else ""
    if not served.masks:
        code = f"{_LOAD}logits = model(pixel_values=images{named}).logits"
        return f"{code}  # .weights says how each item was merged"
    if not served.infers:
        return f"{_LOAD}logits = model(**inputs{named}).logits  # inputs as of the base"
    return (
        f"{_LOAD}tasks = model.tasks_of(**first)  # once for each episode, or for each item\n"
        "logits = model(**inputs, tasks=tasks).logits  # inputs as of the base"
    )


def _writing(served: Served, folder: str) -> str:
    """How the bundle of a model of texts is called."""
    named = f', tasks="{served.tasks[0]}"' if served.tasks and not served.infers else ""
    return (
        f"from transformers import AutoTokenizer\n\n{_LOAD}"
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder/{folder}")\n'
        'prompt = tokenizer("...", return_tensors="pt", return_token_type_ids=False)\n'
        f"tokens = model.generate(**prompt{named}, max_new_tokens=64)"
        "  # the prompt decides, once\n"
        f"logits = model(**prompt{named}).logits"
        "  # prompt_mask says what is prompt if answers follow"
    )
