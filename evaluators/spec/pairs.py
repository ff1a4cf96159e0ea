"""Sections of evaluators of texts that come in pairs: rewards, translations, similar texts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field as Key
from pydantic import field_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ScoreSpec, TokenizedSpec

#: Documents and temperature of the loss of retrieval; the temperature is that of
#: sentence-transformers.
CANDIDATES = 64
TEMPERATURE = 0.05


class RewardMetricSpec(ScoreSpec):
    """One objective of a reward evaluator."""

    metric: Literal["accuracy", "cross_entropy"] = "accuracy"


class RewardBoundSpec(BoundSpec, RewardMetricSpec):
    """One bound of a reward evaluator."""


class RewardSpec(TokenizedSpec):
    """Pairs of texts of which a reward model should prefer the first."""

    kind: Literal["reward"]
    chosen: str = Key(default="chosen", description="Column of the better texts.")
    rejected: str = Key(default="rejected", description="Column of the worse texts.")
    objectives: list[RewardMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [RewardMetricSpec()]
    )
    constraints: list[RewardBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.reward import Reward

        inputs = {"text": self.chosen, "pair": self.rejected}
        options = self._options(folder, where, None, inputs)
        return Reward(self.tokenizer, max_length=self.max_length, **options)


class WrittenMetricSpec(ScoreSpec):
    """One objective of a sequence-to-sequence evaluator."""

    metric: Literal["chrf", "rouge_l", "exact_match", "cross_entropy"] = Key(
        default="chrf", description="Means over items; chrf by sacrebleu, rouge_l by rouge_score."
    )


class WrittenBoundSpec(BoundSpec, WrittenMetricSpec):
    """One bound of a sequence-to-sequence evaluator."""


class SequenceToSequenceSpec(TokenizedSpec):
    """What an encoder-decoder writes for texts."""

    kind: Literal["sequence_to_sequence"]
    text: str = Key(default="text", description="Column of the texts.")
    target: str = Key(default="target", description="Column of what should be written.")
    prefix: str = Key(default="", description="Said before every text.")
    max_new_tokens: int = Key(default=64, ge=1, description="Tokens that are written at most.")
    objectives: list[WrittenMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [WrittenMetricSpec()]
    )
    constraints: list[WrittenBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.sequence_to_sequence import SequenceToSequence

        inputs = {"text": self.text, "target": self.target}
        own = self.model_dump(include={"max_length", "prefix", "max_new_tokens"})
        return SequenceToSequence(
            self.tokenizer, **own, **self._options(folder, where, None, inputs)
        )


class SimilarityMetricSpec(ScoreSpec):
    """One objective of a similarity evaluator."""

    metric: Literal["spearman", "pearson", "squared_error"] = "spearman"


class SimilarityBoundSpec(BoundSpec, SimilarityMetricSpec):
    """One bound of a similarity evaluator."""


class EmbeddingSpec(TokenizedSpec):
    """Texts that an encoder embeds."""

    pooling: Literal["mean", "first", "last"] = Key(
        default="mean", description="Tokens that make the embedding of a text."
    )


class SimilaritySpec(EmbeddingSpec):
    """Pairs of texts, and how similar people find them."""

    kind: Literal["similarity"]
    text: str = Key(default="text", description="Column of the first texts.")
    pair: str = Key(default="pair", description="Column of the second texts.")
    number: str = Key(default="score", description="Column of the similarities.")
    scale: tuple[float, float] = Key(
        default=(0.0, 1.0), description="Numbers that stand for cosines of 0 and 1."
    )
    objectives: list[SimilarityMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [SimilarityMetricSpec()]
    )
    constraints: list[SimilarityBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise ValueError(f"expected two numbers that rise, received {list(scale)}")
        return scale

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.similarity import Similarity

        inputs = {"text": self.text, "pair": self.pair}
        own = self.model_dump(include={"max_length", "pooling", "scale"})
        options = self._options(folder, where, None, inputs)
        options["columns"] |= {"number": self.number}
        return Similarity(self.tokenizer, **own, **options)


class RetrievalMetricSpec(ScoreSpec):
    """One objective of a retrieval evaluator."""

    metric: Literal["recall", "ndcg", "cross_entropy"] = Key(
        default="ndcg",
        description="recall or ndcg of the first k documents, among all of a split and domain; "
        "cross_entropy of the right one among some candidates (InfoNCE).",
    )


class RetrievalBoundSpec(BoundSpec, RetrievalMetricSpec):
    """One bound of a retrieval evaluator."""


class RetrievalSpec(EmbeddingSpec):
    """Queries, each with the document that answers it."""

    kind: Literal["retrieval"]
    query: str = Key(default="query", description="Column of the queries.")
    document: str = Key(default="document", description="Column of their documents.")
    k: int = Key(default=10, ge=1, description="How many of the first documents count.")
    query_prefix: str = Key(default="", description="Said before every query.")
    document_prefix: str = Key(default="", description="Said before every document.")
    candidates: int = Key(
        default=CANDIDATES,
        ge=1,
        # Sections of older studies read, and hash, as they did.
        exclude_if=lambda candidates: candidates == CANDIDATES,
        description="Documents of a domain that cross_entropy compares with the right one.",
    )
    temperature: float = Key(
        default=TEMPERATURE,
        gt=0,
        exclude_if=lambda temperature: temperature == TEMPERATURE,
        description="What cross_entropy divides cosines by.",
    )
    objectives: list[RetrievalMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [RetrievalMetricSpec()]
    )
    constraints: list[RetrievalBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.retrieval import Retrieval

        inputs = {"text": self.query, "pair": self.document}
        keys = {"max_length", "pooling", "k", "query_prefix", "document_prefix"}
        own = self.model_dump(include=keys)
        own |= {"candidates": self.candidates, "temperature": self.temperature}
        return Retrieval(self.tokenizer, **own, **self._options(folder, where, None, inputs))
