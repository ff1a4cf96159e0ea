"""The second tier: the harness's own loop over its own task objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.harness.prompt import Prompt, evaluation_arguments
from mergesearch.evaluators.harness.tasks import SplitTask, quiet

if TYPE_CHECKING:
    from mergesearch.evaluators.harness.harness_model import HarnessModel


def score_by_harness(
    harness: HarnessModel, source: SplitTask, documents: Sequence[int], prompt: Prompt
) -> list[dict[str, Any]]:
    """Let the harness evaluate a task on some documents.

    Args:
        harness: The harness's view of the resident model.
        source: The task.
        documents: Indices of the documents among those of the task on its split.
        prompt: How prompts are made.

    Returns:
        Of each document, metric -> score.
    """
    import lm_eval

    indices = [source.document_indices[document] for document in documents]
    if prompt.apply_chat_template:
        harness.choose_template(prompt.apply_chat_template)
    name = source.task.task_name
    with quiet():
        results = lm_eval.evaluate(
            lm=harness.lm,
            task_dict={"tasks": {name: source.task}, "groups": {}, "group_map": {}},
            samples={name: indices},
            bootstrap_iters=0,
            **evaluation_arguments(prompt),
        )
    by_index = {
        entry["doc_id"]: entry
        for entry in results["samples"][name]
        if entry["filter"] == source.filter
    }
    return [
        {metric: by_index[index][metric] for metric in by_index[index]["metrics"]}
        for index in indices
    ]
