"""The models that are judged by one objective on the prompts of one split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergesearch.evaluators import Split
from mergesearch.evaluators.preference.pairing import Slot, digest, pair_digest
from mergesearch.evaluators.preference.strengths import (
    PRIOR_SD,
    Comparison,
    Strength,
    fit_strengths,
)


def prompt_digest(prompt: str) -> str:
    """Digest of a prompt."""
    return digest(prompt.encode("utf-8", "surrogatepass"))


class Panel:
    """Models with their outputs and the comparisons that they need.

    Merges whose outputs are all the same are one model.

    Args:
        objective: What is judged.
        split: Whose prompts.
        question: What the page asks.
        base: The model whose strength is 0.

    Attributes:
        prompts: Digest -> prompt.
        outputs: Model -> digest of prompt -> digest of output, in the order in which they came.
        model_of: Digest of a merge -> its model.
    """

    def __init__(self, objective: str, split: Split, question: str, base: str) -> None:
        self.objective = objective
        self.split = split
        self.question = question
        self.base = base
        self.prompts: dict[str, str] = {}
        self.outputs: dict[str, dict[str, str]] = {}
        self.model_of: dict[str, str] = {}
        self._slots: dict[str, tuple[Slot, ...]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in the recorded registration of a merge.

        Raises:
            ValueError: If it is compared with outputs that nothing has.
        """
        model = event["model"]
        self.model_of[event["recipe"]] = model
        if model in self.outputs:
            return
        outputs = {}
        for row in event["outputs"]:
            prompt = prompt_digest(row["prompt"])
            self.prompts[prompt] = row["prompt"]
            outputs[prompt] = row["output"]
        slots = tuple(Slot(prompt, opponent) for prompt, opponent in event["slots"])
        if any(
            slot.prompt not in outputs or slot.prompt not in self.outputs.get(slot.opponent, ())
            for slot in slots
        ):
            raise ValueError("a comparison with outputs that are not recorded before it")
        self._slots[model] = slots
        self.outputs[model] = outputs

    def pairs_of(self, model: str) -> Iterator[tuple[str, str, str, str]]:
        """Pair, prompt and both outputs of each comparison of a model that is not a tie by itself.

        Equal outputs are one.
        """
        for slot in self._slots[model]:
            one = self.outputs[model][slot.prompt]
            other = self.outputs[slot.opponent][slot.prompt]
            if one != other:
                yield pair_digest(self.objective, slot.prompt, one, other), slot.prompt, one, other

    def open_pairs(
        self, model: str, choices: Mapping[str, str | None]
    ) -> Iterator[tuple[str, str, str, str]]:
        """Those of a model's pairs for which there is no choice."""
        return (pair for pair in self.pairs_of(model) if pair[0] not in choices)

    def pairs(self) -> set[str]:
        """All pairs of all models."""
        return {pair for model in self.outputs for pair, *_ in self.pairs_of(model)}

    def strengths(self, choices: Mapping[str, str | None]) -> dict[str, Strength]:
        """Model -> its strength by what is chosen so far; without any choice, the prior.

        Args:
            choices: Pair -> preferred output, None for neither.
        """
        fitted = fit_strengths(self._comparisons(choices), self.base).of
        return {model: fitted.get(model, Strength(0.0, PRIOR_SD)) for model in self.outputs}

    def _comparisons(self, choices: Mapping[str, str | None]) -> Iterator[Comparison]:
        for model, slots in self._slots.items():
            for slot in slots:
                one = self.outputs[model][slot.prompt]
                other = self.outputs[slot.opponent][slot.prompt]
                pair = pair_digest(self.objective, slot.prompt, one, other)
                if one == other:
                    yield Comparison(model, slot.opponent, None)
                elif pair in choices:
                    preferred = choices[pair]
                    who = {one: model, other: slot.opponent, None: None}[preferred]
                    yield Comparison(model, slot.opponent, who)
