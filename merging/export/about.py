"""What a caller knows about a merge that its recipe does not say, for the model card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A score on held-out items.

    Attributes:
        metric: Name of the objective.
        value: The score.
        error: Its standard error, where there is one.
        dataset: What the items are.
        split: Which of them were held out.
    """

    metric: str
    value: float
    error: float | None
    dataset: str
    split: str = "test"


@dataclass(frozen=True)
class About:
    """What the card says beyond the recipe.

    Attributes:
        results: Held-out scores, for the card's model-index.
        task: The hub's name of the task, such as ``text-classification``; empty where none fits.
        recipe: The recipe as one would write it; empty where it has no such form.
        commands: Lines of a shell that make the merge again, beside ``mergesearch merge``.
        dtype: Of all merged tensors, where it is not the base's own.
        settings: Digest of all that the results depend on beside the merge.
    """

    results: tuple[Result, ...] = ()
    task: str = ""
    recipe: str = ""
    commands: tuple[str, ...] = ()
    dtype: str | None = None
    settings: str = ""


#: What there is to say about a merge by hand.
NOTHING = About()
