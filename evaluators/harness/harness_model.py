"""The harness's own model class around the resident model, for tokens, prompts and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from mergesearch.evaluators.harness.rows import Options, Request
from mergesearch.evaluators.harness.tasks import quiet

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class _Recorder(HFLM):  # type: ignore[misc]  # the harness has no types
    """Records the tokens that it is asked to score, while ``recorded`` is a list."""

    recorded: list[Request] | None = None

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        if self.recorded is None:
            return super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        self.recorded += [
            Request(tuple(context), tuple(continuation)) for _, context, continuation in requests
        ]
        return [(0.0, False)] * len(requests)


class HarnessModel:
    """The parts of the harness's model class that the evaluator uses.

    Attributes:
        model: The resident model.
        lm: The harness's model object.
    """

    def __init__(self, model: Any, lm: _Recorder) -> None:
        self.model = model
        self.lm = lm

    @property
    def max_length(self) -> int:
        """Number of tokens that the model reads."""
        return int(self.lm.max_length)

    @property
    def tokenizer_name(self) -> str:
        """Name by which the harness identifies the tokenizer."""
        return str(self.lm.tokenizer_name)

    def apply_chat_template(self, history: Any, add_generation_prompt: bool = True) -> str:
        """Write a conversation as text."""
        return str(self.lm.apply_chat_template(history, add_generation_prompt))

    def choose_template(self, name: bool | str) -> None:
        """Use the chat template of that name, or with True the tokenizer's own."""
        self.lm.chat_template(name)

    def tokens_of(self, instance: Instance) -> tuple[Request, ...]:
        """Tokens that a request is scored on: one continuation, or the windows of a text."""
        self.lm.recorded = []
        try:
            getattr(self.lm, instance.request_type)([instance], disable_tqdm=True)
            return tuple(self.lm.recorded)
        finally:
            self.lm.recorded = None

    def generate(self, instances: Sequence[Instance], options: Options) -> None:
        """Answer requests that generate text, each as often as it wants."""
        self.lm.batch_size_per_gpu = self._generated_rows(instances, options)
        kinds = sorted({instance.request_type for instance in instances})
        for kind in kinds:
            repeated = [
                one
                for one in instances
                if one.request_type == kind
                for _ in range(one.repeats or 1)
            ]
            with quiet():
                answers = getattr(self.lm, kind)(repeated, disable_tqdm=True)
            for one, answer in zip(repeated, answers, strict=True):
                one.resps.append(answer)

    def _generated_rows(self, instances: Sequence[Instance], options: Options) -> int:
        """Rows of a batch that generates text, none longer than the longest of all."""
        if options.batch_tokens is None or not instances:
            return options.batch_size
        longest = max(
            len(self.lm.tok_encode(one.args[0]))
            + int(one.args[1].get("max_gen_toks", self.lm.max_gen_toks))
            for one in instances
        )
        fitting = options.batch_tokens // min(longest, self.max_length)
        return max(min(options.batch_size, fitting), 1)


def bind(model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> HarnessModel:
    """Wrap the resident model for the harness.

    Log-probabilities are in fp32 whatever the model's precision.
    """
    import torch

    with quiet():
        lm = _Recorder(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype=torch.float32,
        )
    return HarnessModel(model, lm)
