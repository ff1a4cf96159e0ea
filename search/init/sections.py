"""The ``evaluators`` section from what is proposed for each set of items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergesearch.search.init.commented import Key
from mergesearch.search.init.given import located
from mergesearch.search.init.harness_tasks import Tasks
from mergesearch.search.init.models import PROCESSORS, Models, folder_with
from mergesearch.search.init.proposed import Proposal

#: Items below which scores are too uncertain to tell merges apart.
FEW = 200
#: Said where files name no splits.
DIVIDED = (
    "No splits are named: items are divided by a hash of their content, alike in every class. The "
    "search sees the first share, the winner is chosen on the second and reported on the third."
)


def evaluator_sections(
    proposals: Sequence[Proposal], models: Models, folder: Path, max_items: int | None = None
) -> list[tuple[Key, ...]]:
    """One section for all sets of items that are read alike, and one for each other.

    Args:
        proposals: Of all sets of items.
        models: Whose heads score them.
        folder: Folder of the study file.
        max_items: Search items of a trial at most.
    """
    alike: dict[str, list[Proposal]] = {}
    for proposal in proposals:
        alike.setdefault(_likeness(proposal), []).append(proposal)
    apart = len(alike) > 1
    return [_section(group, models, folder, max_items, apart) for group in alike.values()]


def _likeness(proposal: Proposal) -> str:
    """What one section can say of several sets of items."""
    data = proposal.data
    return repr(
        (
            proposal.kind,
            [(key.name, key.value) for key in proposal.keys],
            data.split_column,
            sorted(data.splits.items()),
            proposal.domain,
            proposal.metric,
        )
    )


def _section(
    group: Sequence[Proposal],
    models: Models,
    folder: Path,
    max_items: int | None,
    apart: bool,
) -> tuple[Key, ...]:
    first = group[0]
    keys = [Key("kind", first.kind, first.why), _data(group, models, folder)]
    if first.data.splits and {*first.data.splits} != {*first.data.splits.values()}:
        why = "The data name their splits like this."
        keys.append(Key("splits", dict(first.data.splits), why))
    keys += [_located(key, folder) for key in first.keys]
    if first.domain is not None:
        keys.append(Key("domain", first.domain, "Says which task an item belongs to."))
    keys += _heads(group, models)
    keys += _fewer(max_items)
    keys.append(_objectives(group, apart))
    return tuple(keys)


def _fewer(max_items: int | None) -> list[Key]:
    """How many items the search sees, if not all."""
    if max_items is None:
        return []
    why = "All items would make too few trials in this time: the search sees so many."
    return [Key("max_items", max_items, why)]


def _located(key: Key, folder: Path) -> Key:
    """A key whose value is a path from here, as the study names it."""
    if key.name != "tokenizer":
        return key
    return Key(key.name, located(key.value, folder), key.why)


def _data(group: Sequence[Proposal], models: Models, folder: Path) -> Key:
    """Files, division and names of classes."""
    first = group[0]
    paths = [located(one.data.path, folder) for one in group]
    several = len(group) > 1
    named = dict(zip([one.data.name for one in group], paths, strict=True))
    notes = [one.data.note for one in group if one.data.note]
    rows = ", ".join(f"{one.data.name}: {one.data.rows:,} items" for one in group)
    if sum(one.data.rows for one in group) < FEW:
        notes.append("So few items make scores uncertain: more make the choice of a winner surer")
    keys = [Key("file", named if several else paths[0], ". ".join([rows, *notes]) + ".")]
    if first.data.split_column:
        keys.append(Key("split", first.data.split_column, "Names the split of an item."))
    if not first.data.splits:
        keys.append(Key("divide", [0.6, 0.2, 0.2], DIVIDED))
    processor = _processor(group, models)
    keys += _classes(group, owned=processor is None)
    if processor is not None:
        why = "Its processor makes inputs of the files, as the base has none."
        keys.append(Key("processor", located(processor, folder), why))
    return Key("data", tuple(keys))


def _processor(group: Sequence[Proposal], models: Models) -> str | None:
    """Path of the model whose processor makes inputs, where the study must name it."""
    first = group[0]
    if not first.processed:
        return None
    owner = first.expert if len(group) == 1 else None
    return folder_with(models, PROCESSORS, owner)


def _classes(group: Sequence[Proposal], *, owned: bool) -> list[Key]:
    """Names of classes in the order of the models' numbers, where the study must state them.

    Args:
        group: Sets of items of one section.
        owned: Whether the names of the expert whose head scores the items are read.
    """
    stated = {one.data.name: list(one.classes) for one in group if one.classes}
    if len(stated) < len(group):
        return []
    if len(group) > 1:
        return [Key("classes", stated, "In the order of each head's numbers.")]
    if group[0].expert is not None and owned and not group[0].given:
        return []
    return [Key("classes", stated[group[0].data.name], "In the order of the model's numbers.")]


def _heads(group: Sequence[Proposal], models: Models) -> list[Key]:
    """Whose head scores the items, where experts keep their own and names do not say so."""
    if models.heads != "own":
        return []
    if len(group) == 1 and group[0].expert is not None:
        return [Key("head", group[0].expert, "Its head has these classes.")]
    others = {one.data.name: one.expert for one in group if one.expert != one.data.name}
    if not others or group[0].domain is not None:
        return []
    every = {one.data.name: one.expert for one in group}
    return [Key("experts", every, "Whose head scores which items: its classes are these.")]


def _objectives(group: Sequence[Proposal], apart: bool) -> Key:
    first = group[0]
    metric = first.metric
    value: dict[str, Any] = {"metric": metric}
    if len(group) == 1 and first.domain is None:
        if apart:
            value = {"name": f"{first.data.name} {metric}", **value}
        return Key("objectives", [value], first.metric_why)
    worst = {"name": f"worst {metric}", "metric": metric, "reduce": "worst"}
    mean = {"name": f"mean {metric}", "metric": metric}
    if apart:
        mean["name"] = f"{mean['name']} of {first.data.name}"
        worst["name"] = f"{worst['name']} of {first.data.name}"
    why = f"{first.metric_why} The mean over tasks, and the worst task, so that none is given up."
    return Key("objectives", [mean, worst], why)


def task_section(
    tasks: Tasks, tokenizer: str | None, folder: Path, max_items: int | None = None
) -> tuple[Key, ...]:
    """The section of tasks of lm_eval."""
    why = "Tasks of lm_eval, whose documents are divided by a hash where nothing else is said."
    keys = [Key("kind", "lm_eval", why), Key("tasks", [*tasks.names])]
    if tasks.folder is not None:
        keys.append(Key("include_path", located(tasks.folder, folder), "The task files."))
    if tokenizer is not None:
        keys.append(Key("tokenizer", located(tokenizer, folder), "The base has none."))
    keys += _fewer(max_items)
    names = "The metrics of the tasks: their mean" + (
        ", and the worst, so that none is given up." if len(tasks.names) > 1 else "."
    )
    objectives: list[dict[str, Any]] = [{"name": "mean score"}]
    if len(tasks.names) > 1:
        objectives.append({"name": "worst task", "reduce": "worst"})
    return (*keys, Key("objectives", objectives, names))
