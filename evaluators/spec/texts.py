"""Sections of evaluators of texts: what a model writes, and its perplexity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ItemSpec, ScoreSpec, Section
from mergesearch.evaluators.spec.routing import DESCRIPTION, RoutingSpec, no_routing
from mergesearch.evaluators.text.vllm_settings import VllmSettings


class GenerationMetricSpec(ScoreSpec):
    """One objective of a generation evaluator."""

    metric: Literal["score", "tokens"] = "score"


class GenerationBoundSpec(BoundSpec, GenerationMetricSpec):
    """One bound of a generation evaluator."""


class VllmSpec(Section):
    """How a vLLM engine is opened; the names are those of vLLM."""

    max_model_len: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of a prompt and its prediction; by default as many as the model has "
        "room for.",
    )
    gpu_memory_utilization: float = Key(
        default=0.4,
        gt=0,
        le=1,
        description="Share of each card's memory for the engine, beside the resident model.",
    )
    tensor_parallel_size: int = Key(
        default=1, ge=1, description="Cards over which the engine splits the model."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Key(
        default=None, description="Of the engine's weights; by default the model's."
    )
    enforce_eager: bool | None = Key(
        default=None,
        description="Run without CUDA graphs; by default where reloading weights needs it.",
    )
    seed: int = Key(default=0, ge=0, description="Of the engine; predictions are greedy.")


class GenerationSpec(ItemSpec):
    """What a causal language model writes after prompts, judged by a function."""

    kind: Literal["generation"]
    prompt: str = Key(default="prompt", description="Column of the prompts.")
    target: str | None = Key(
        default=None, description="Column of what is expected; by default nothing is."
    )
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    scorer: str = Key(
        default="exact_match",
        description="exact_match, contains, prefix, or module:function, called with prediction, "
        "target, prompt.",
    )
    direction: Literal["maximize", "minimize"] = Key(
        default="maximize", description="Where a better score is; minimised scores are called loss."
    )
    max_new_tokens: int = Key(default=64, ge=1, description="Tokens of a prediction at most.")
    until: list[Annotated[str, Key(min_length=1)]] = Key(
        default_factory=list, description="Strings that end a prediction."
    )
    chat_template: bool = Key(
        default=False, description="Say the prompt as a user's turn of a conversation."
    )
    system_prompt: str | None = Key(
        default=None, description="Said before it; needs chat_template."
    )
    engine: Literal["transformers", "vllm"] = Key(
        default="transformers",
        description="Who generates: the resident model, or a vLLM engine beside it.",
    )
    vllm: VllmSpec | None = Key(
        default=None, description="How the engine is opened; needs engine: vllm."
    )
    batch_size: int = Key(default=32, ge=1, description="Items of a forward pass.")
    batch_tokens: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of prompts and predictions of a batch at most, with padding; by "
        "default 32,768 on a GPU, and no limit on the CPU.",
    )
    objectives: list[GenerationMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [GenerationMetricSpec()]
    )
    constraints: list[GenerationBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )
    routing: RoutingSpec | None = Key(default=None, exclude_if=no_routing, description=DESCRIPTION)

    @property
    def runs_code(self) -> bool:
        """Whether the scorer is a function of the user's."""
        return ":" in self.scorer

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from mergesearch.evaluators.text.generation import SCORERS

        if self.vllm is not None and self.engine != "vllm":
            raise ValueError(f"vllm: expected engine: vllm beside it, received {self.engine}")
        if self.routing is not None and self.engine != "transformers":
            raise ValueError(
                f"routing: expected engine: transformers beside it, received {self.engine}, which "
                "is not merged for each prompt"
            )
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt: expected chat_template: true beside it, received false"
            )
        if ":" not in self.scorer and self.scorer not in SCORERS:
            raise ValueError(
                f"scorer: expected module:function or one of {sorted(SCORERS)}, received "
                f"{self.scorer!r}"
            )
        if self.scorer in SCORERS and self.target is None:
            raise ValueError(
                f"target: required key is missing: {self.scorer} compares with a column of targets"
            )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.generation import Generation

        keys = {
            "scorer",
            "max_new_tokens",
            "until",
            "chat_template",
            "system_prompt",
            "engine",
            "batch_tokens",
        }
        inputs = {"prompt": self.prompt} | ({} if self.target is None else {"target": self.target})
        options = self._options(folder, where, None, inputs)
        if self.vllm is not None:
            options["vllm"] = VllmSettings(**self.vllm.model_dump())
        if self.direction == "minimize":
            options["metrics"] = [
                replace(m, metric={"score": "loss"}.get(m.metric, m.metric))
                for m in options["metrics"]
            ]
        own = self.model_dump(include=keys)
        if self.routing is None:
            return Generation(self.tokenizer, **own, **options)
        from mergesearch.evaluators.routing.texts import WRITTEN

        made = WRITTEN[self.routing.method]
        return made(tokenizer=self.tokenizer, **own, **self.routing.rules, **options)


class PerplexityMetricSpec(ScoreSpec):
    """One objective of a perplexity evaluator."""

    metric: Literal["perplexity", "log_perplexity"] = Key(
        default="perplexity",
        description="Of all texts of a domain together, or the mean over texts of its logarithm.",
    )


class PerplexityBoundSpec(BoundSpec, PerplexityMetricSpec):
    """One bound of a perplexity evaluator."""


class PerplexitySpec(ItemSpec):
    """Perplexity of a causal language model on texts."""

    kind: Literal["perplexity"]
    text: str = Key(default="text", description="Column of the texts.")
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    max_length: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of a window; by default as many as the model has room for.",
    )
    stride: int | None = Key(
        default=None,
        ge=1,
        description="Tokens from one window to the next; by default windows do not overlap.",
    )
    batch_size: int = Key(
        default=16, ge=1, description="Windows of a forward pass, and texts that share some."
    )
    batch_tokens: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of a forward pass at most, with padding; by default 32,768 on a GPU, "
        "and no limit on the CPU.",
    )
    objectives: list[PerplexityMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [PerplexityMetricSpec()]
    )
    constraints: list[PerplexityBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.perplexity import Perplexity

        options = self._options(folder, where, None, {"text": self.text})
        keys = {"max_length", "stride", "batch_tokens"}
        return Perplexity(self.tokenizer, **self.model_dump(include=keys), **options)
