"""Sections of evaluators that score the classes which a model gives to texts and words."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ScoreSpec, TokenizedSpec

CLASS_METRICS = ("accuracy", "f1", "cross_entropy")
NUMBER_METRICS = ("spearman", "pearson", "squared_error")


class TextMetricSpec(ScoreSpec):
    """One objective of a text classification evaluator."""

    metric: Literal["accuracy", "f1", "cross_entropy", "spearman", "pearson", "squared_error"] = (
        Key(
            default="accuracy",
            description="accuracy, macro f1 or cross_entropy of classes; spearman, pearson or "
            "squared_error of numbers.",
        )
    )


class TextBoundSpec(BoundSpec, TextMetricSpec):
    """One bound of a text classification evaluator."""


class TextClassificationSpec(TokenizedSpec):
    """Classes or numbers that a model gives to texts, or to pairs of texts."""

    kind: Literal["text_classification"]
    text: str = Key(default="text", description="Column of the texts.")
    pair: str | None = Key(default=None, description="Column of the second text of each item.")
    label: str = Key(default="label", description="Column of the class numbers, or their names.")
    number: str | None = Key(
        default=None, description="Column of numbers to predict, in place of classes."
    )
    objectives: list[TextMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [TextMetricSpec()]
    )
    constraints: list[TextBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = CLASS_METRICS if self.number is None else NUMBER_METRICS
        for score in [*self.objectives, *self.constraints]:
            if score.metric not in known:
                column = "label" if self.number is None else "number"
                raise ValueError(
                    f"objectives: expected metrics among {', '.join(known)} with a column of "
                    f"{column}s, received {score.metric}"
                )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.text_classification import TextClassification

        inputs = {"text": self.text} | ({} if self.pair is None else {"pair": self.pair})
        target = {"label": self.label} if self.number is None else {"number": self.number}
        options = self._options(folder, where, None, inputs)
        options["columns"] |= target
        return TextClassification(self.tokenizer, max_length=self.max_length, **options)


class TagMetricSpec(ScoreSpec):
    """One objective of a token classification evaluator."""

    metric: Literal[
        "accuracy", "f1", "cross_entropy", "span_f1", "span_precision", "span_recall"
    ] = Key(
        default="f1",
        description="accuracy, macro f1 and cross_entropy of words; span_f1, span_precision and "
        "span_recall of whole spans, by seqeval.",
    )


class TagBoundSpec(BoundSpec, TagMetricSpec):
    """One bound of a token classification evaluator."""


class TokenClassificationSpec(TokenizedSpec):
    """Classes that a model gives to words."""

    kind: Literal["token_classification"]
    words: str = Key(default="tokens", description="Column of the words, a list for each item.")
    tags: str = Key(
        default="tags",
        description="Column of the words' class numbers, or their names; negative ones do not "
        "count.",
    )
    objectives: list[TagMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [TagMetricSpec()]
    )
    constraints: list[TagBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.token_classification import TokenClassification

        inputs = {"words": self.words, "tags": self.tags}
        options = self._options(folder, where, None, inputs)
        return TokenClassification(self.tokenizer, max_length=self.max_length, **options)
