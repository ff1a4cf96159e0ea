"""What a distillation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from mergesearch.merging.distillation.weights import FUSIONS
from mergesearch.merging.errors import InputError, did_you_mean

#: How tokens of a source become the pivot's (:mod:`mergesearch.merging.distillation.token_maps`).
ALIGNMENTS = ("edit", "frequency", "starts")


@dataclass(frozen=True)
class Settings:
    """Of a distillation.

    Attributes:
        alignment: One of ``ALIGNMENTS``.
        fusion: A key of ``FUSIONS``.
        text_weight: Weight λ of the loss on the texts themselves; the rest is that on the targets.
        steps: Of training.
        batch: Texts of a step.
        rate: Peak rate of AdamW; it warms up over the first tenth and falls linearly.
        rank: Of the LoRA.
        length: Tokens of a text at most, in the pivot's tokens.
        kept: Tokens of a prediction that are kept.
        held_out: Part of the texts that is only measured.
        seed: Of the LoRA, of the order of texts, and of what is held out.
    """

    alignment: str = "frequency"
    fusion: str = "mince"
    text_weight: float = 0.9
    steps: int = 200
    batch: int = 8
    rate: float = 2e-4
    rank: int = 16
    length: int = 512
    kept: int = 10
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: In one line.
        """
        for key, received, known in (
            ("alignment", self.alignment, ALIGNMENTS),
            ("fusion", self.fusion, tuple(FUSIONS)),
        ):
            if received not in known:
                raise InputError(
                    f"{key}: expected {', '.join(known)}, received {received!r}"
                    f"{did_you_mean(received, known)}"
                )
        for key in ("steps", "batch", "rank", "length", "kept"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"{key}: expected at least 1, received {getattr(self, key)}; give a larger one"
                )
        for key, low, high in (("text_weight", 0.0, 1.0), ("held_out", 0.0, 0.5)):
            if not low <= getattr(self, key) <= high:
                raise InputError(
                    f"{key}: expected {low:g} to {high:g}, received {getattr(self, key):g}"
                )
        if not self.rate > 0:
            raise InputError(f"rate: expected a positive number, received {self.rate:g}")
