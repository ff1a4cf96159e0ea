"""The metadata of a model card, which the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.export.about import About, Result
from mergesearch.merging.foreign.shown import printable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def metadata(
    name: str,
    parents: Sequence[str],
    tags: Sequence[str],
    library: str | None,
    licence: str | None,
    about: About,
) -> str:
    """YAML of the front matter, with the results as a model-index.

    Args:
        name: Name of the model in its model-index.
        parents: Names of base and experts on the hub, as far as they are known.
        tags: The card's tags.
        library: What loads the model, if anything does.
        licence: The licence that all parents declare, or None.
        about: Held-out results and their task.
    """
    from huggingface_hub import ModelCardData

    results = [each for result in about.results for each in _evaluations(result, about.task)]
    relation: Mapping[str, str] = {"base_model_relation": "merge"} if parents else {}
    data = ModelCardData(
        base_model=list(parents) or None,
        library_name=library,
        license=licence,
        tags=list(tags),
        pipeline_tag=about.task or None,
        model_name=name if results else None,
        eval_results=results or None,
        **relation,
    )
    return str(data.to_yaml())


def _evaluations(result: Result, task: str) -> list[EvalResult]:
    """A score as the hub has it, and its standard error as a metric beside it."""
    from huggingface_hub import EvalResult

    values = {result.metric: result.value}
    if result.error is not None:
        values[f"{result.metric}_stderr"] = result.error
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type="custom",
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type=metric.replace(" ", "_"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in values.items()
    ]


def checked_card(front: str, text: str) -> str:
    """The card, once ``huggingface_hub`` has read it; what hides or turns text is escaped.

    Raises:
        ValueError: If its metadata are none.
    """
    from huggingface_hub import ModelCard

    card = printable(f"---\n{front}\n---\n\n{text}\n", keep="\n\t")
    ModelCard(card)
    return card
