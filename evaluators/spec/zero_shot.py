"""Sections of evaluators of images and texts: class prompts, and questions about pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.data.item_files import item_files
from mergesearch.evaluators.spec.base import BoundSpec, ItemSpec, ScoreSpec
from mergesearch.evaluators.spec.data import item_files_of


class ZeroShotMetricSpec(ScoreSpec):
    """One objective of a zero-shot evaluator."""

    metric: Literal["accuracy", "cross_entropy", "entropy"] = "accuracy"


class ZeroShotBoundSpec(BoundSpec, ZeroShotMetricSpec):
    """One bound of a zero-shot evaluator."""


class ZeroShotSpec(ItemSpec):
    """Images and the prompts of their classes, for CLIP, SigLIP and their kin."""

    kind: Literal["zero_shot"]
    image: str = Key(default="image", description="Column of the images: pictures or pixels.")
    label: str = Key(default="label", description="Column of the class numbers, or their names.")
    prompts: list[str] | dict[str, list[str]] = Key(
        default_factory=lambda: ["a photo of a {}."],
        min_length=1,
        description="Texts with {} for the name of a class, for all domains or for each.",
    )
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    transductive: bool = Key(
        default=False,
        description="Search on the test items themselves, without their labels, as some papers do.",
    )
    batch_size: int = Key(default=64, ge=1, description="Items of a forward pass.")
    objectives: list[ZeroShotMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [ZeroShotMetricSpec()]
    )
    constraints: list[ZeroShotBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.images.zero_shot import ZeroShot

        options = self._options(folder, where, None, {"pixel_values": self.image})
        options["columns"] |= {"label": self.label}
        options["data"] = item_files_of(self.data, folder, named=True)
        prompts = self.prompts if isinstance(self.prompts, dict) else {"": self.prompts}
        return ZeroShot(self.tokenizer, prompts, transductive=self.transductive, **options)


class QuestionMetricSpec(ScoreSpec):
    """One objective of an evaluator of questions about pictures."""

    metric: Literal["accuracy", "cross_entropy"] = Key(
        default="accuracy",
        description="accuracy of what is written; cross_entropy of the wanted answer's tokens.",
    )


class QuestionBoundSpec(BoundSpec, QuestionMetricSpec):
    """One bound of an evaluator of questions about pictures."""


class VisualQuestionsSpec(ItemSpec):
    """Questions about pictures, which a model of images and texts answers in writing."""

    kind: Literal["visual_questions"]
    image: str = Key(default="image", description="Column of the pictures: paths or bytes.")
    question: str = Key(default="question", description="Column of the questions.")
    answer: str | None = Key(default=None, description="Column of the one right answer.")
    answers: str | None = Key(
        default=None, description="Column of the answers of several people, a list for each item."
    )
    instruction: str = Key(default="", description="Said after every question.")
    prompt: str | None = Key(
        default=None,
        # Sections without it read, and hash, as those of older studies.
        exclude_if=lambda prompt: prompt is None,
        description="Text with {} for the question, for models without a chat template.",
    )
    tokenizer: str | None = Key(
        default=None, description="Folder of the processor; by default the base's."
    )
    max_new_tokens: int = Key(default=16, ge=1, description="Tokens of an answer at most.")
    batch_size: int = Key(default=8, ge=1, description="Items of a forward pass.")
    objectives: list[QuestionMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [QuestionMetricSpec()]
    )
    constraints: list[QuestionBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if (self.answer is None) == (self.answers is None):
            raise ValueError("expected a column of answer or of answers, received neither or both")
        return self

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if self.prompt is None:
            return self
        if self.prompt.count("{}") != 1:
            raise ValueError(
                f"prompt: expected {{}} once, where the question goes, received {self.prompt!r}"
            )
        if any(score.metric != "accuracy" for score in [*self.objectives, *self.constraints]):
            raise ValueError(
                "objectives: expected accuracy beside prompt, received cross_entropy, which needs "
                "a chat template"
            )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.images.questions import VisualQuestions

        right = {"answers": self.answers} if self.answer is None else {"target": self.answer}
        inputs = {"picture": self.image, "text": self.question}
        options = self._options(folder, where, None, inputs)
        options["columns"] |= right
        files = item_files(options["data"])
        options["data"] = replace(files, checkpoint=files.checkpoint or self.tokenizer)
        own = self.model_dump(include={"max_new_tokens", "instruction", "prompt"})
        return VisualQuestions(self.tokenizer, **own, **options)
