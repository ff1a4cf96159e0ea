"""Generation by a vLLM engine that is started once and given the merged weights of every candidate.

The engine is opened on the base's folder and takes a share of the card's memory beside the resident
model. :mod:`mergesearch.evaluators.text.vllm_weights` says how weights reach it, and
:mod:`mergesearch.evaluators.text.vllm_settings` which version of vLLM is meant.

Wrong weights do not raise an error in vLLM, they only score badly. The first two candidates are
therefore checked: the log-probabilities of a prompt under the engine must be those of the resident
model. The second is the one that shows whether weights can be replaced more than once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.evaluators.text.text_items import TextItems
from mergesearch.evaluators.text.vllm_settings import VllmSettings, engine_arguments
from mergesearch.evaluators.text.vllm_weights import (
    StoredWeights,
    reload_from_folder,
    reload_in_process,
)
from mergesearch.evaluators.text.writer import Written, cut
from mergesearch.merging import InputError, MergesearchError

#: Candidates whose log-probabilities are compared with those of the resident model.
CHECKED_CANDIDATES = 2
#: Tokens of the prompt that is compared, at most.
CHECKED_TOKENS = 64
#: Mean difference of a token's log-probability that bfloat16 and other kernels may make, in nats.
#: Weights at the wrong place move it by several.
TOLERANCE = 0.25
#: Read by vLLM when the engine starts: whether its core is a process of its own, to which tensors
#: cannot be handed over.
SEPARATE_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class VllmWriter:
    """Greedy generation by an engine of its own.

    Args:
        tokenizer: Tokenizer of the prompts.
        folder: Its folder.
        model: The resident model, whose base the engine is opened on.
        max_new_tokens: New tokens at most.
        until: Strings that end a text.
        settings: How the engine is opened.
        where: Key of the study file, for messages.

    Raises:
        MergesearchError: If the engine does not start.
    """

    def __init__(
        self,
        tokenizer: Any,
        folder: str,
        model: Any,
        max_new_tokens: int,
        until: Sequence[str],
        settings: VllmSettings,
        where: str,
    ) -> None:
        os.environ.setdefault(SEPARATE_PROCESS, "0")
        from vllm import SamplingParams

        base = _folder_of_base(model, where)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self._weights = StoredWeights.of(model, base)
        self._engine = _open_engine(
            engine_arguments(settings, base, folder, model.config, dtype), where
        )
        in_process = settings.tensor_parallel_size == 1 and os.environ[SEPARATE_PROCESS] == "0"
        self._reload = reload_in_process if in_process else reload_from_folder
        self._candidates = 0
        self._room = settings.max_model_len
        self._max_new_tokens = max_new_tokens
        self._until = tuple(until)
        self._end = tokenizer.eos_token_id
        self._where = where
        self._settings = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop=list(until) or None
        )
        self._reading = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)

    def write(self, model: Any, items: TextItems) -> list[Written]:
        """Continue the prompt of each item.

        Raises:
            InputError: If prompts are too long for ``max_model_len``.
            MergesearchError: If the engine does not compute what the resident model does.
        """
        prompts = [row.tolist() for row in items.tokens]
        self._check_room(prompts, items.ids)
        self._reload(self._engine, self._weights.tensors(model))
        self._candidates += 1
        if self._candidates <= CHECKED_CANDIDATES:
            self._check_weights(model, max(prompts, key=len)[:CHECKED_TOKENS])
        answers = [one.outputs[0] for one in self._generate(prompts, self._settings)]
        return [Written(cut(one.text, self._until), self._length(one.token_ids)) for one in answers]

    def _generate(self, prompts: Sequence[list[int]], settings: Any) -> list[Any]:
        """The engine's answers to prompts of tokens, in their order."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers: list[Any] = self._engine.generate(given, settings, use_tqdm=False)
        return answers

    def _check_room(self, prompts: Sequence[list[int]], ids: Sequence[Any]) -> None:
        index = max(range(len(prompts)), key=lambda n: len(prompts[n]))
        width = len(prompts[index])
        if self._room is not None and width + self._max_new_tokens > self._room:
            raise InputError(
                f"{self._where}.vllm.max_model_len: expected room for {width} tokens of item "
                f"{ids[index]!r} and {self._max_new_tokens} more, received {self._room}; raise it"
            )

    def _check_weights(self, model: Any, prompt: list[int]) -> None:
        """Compare the log-probabilities of a prompt's tokens under engine and resident model.

        Raises:
            MergesearchError: If they differ by more than rounding.
        """
        if len(prompt) < 2:
            return  # the first token has no probability
        read = self._generate([prompt], self._reading)[0].prompt_logprobs[1:]
        engine = np.array([row[token].logprob for row, token in zip(read, prompt[1:], strict=True)])
        difference = float(np.abs(engine - _log_probabilities(model, prompt)).mean())
        if not difference <= TOLERANCE:
            raise MergesearchError(
                f"{self._where}.engine: expected log-probabilities of the resident model within "
                f"{TOLERANCE:g}, received a mean difference of {difference:.3g} for candidate "
                f"{self._candidates}: vLLM does not reload this model; use engine: transformers"
            )

    def _length(self, tokens: Sequence[int]) -> int:
        """Number of tokens without the one that ends a sequence."""
        return len(tokens) - (len(tokens) > 0 and tokens[-1] == self._end)


def _folder_of_base(model: Any, where: str) -> str:
    """The folder that the resident model was loaded from.

    Raises:
        MergesearchError: If it is gone, because the base was rebuilt for the merge.
    """
    folder = str(model.config.name_or_path)
    if not (Path(folder) / "config.json").is_file():
        raise MergesearchError(
            f"{where}.engine: expected a base that is merged as it is stored, received one whose "
            "vocabulary or tensors are changed first; use engine: transformers"
        )
    return folder


def _open_engine(arguments: dict[str, Any], where: str) -> Any:
    """A running engine.

    Raises:
        MergesearchError: If it does not start.
    """
    from vllm import LLM

    try:
        return LLM(**arguments)
    except Exception as error:  # whatever vLLM raises: no memory, no card, a model it lacks
        text = " ".join(str(error).split())[:200]
        raise MergesearchError(
            f"{where}.engine: expected a vLLM engine on {arguments['model']}, received "
            f"{type(error).__name__}: {text}; lower vllm.max_model_len or change "
            "vllm.gpu_memory_utilization"
        ) from error


def _log_probabilities(model: Any, prompt: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-probabilities of all tokens but the first ``(tokens - 1,)`` under the resident model."""
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].double()
        chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
    found: np.ndarray[Any, np.dtype[np.float64]] = chosen[:, 0].cpu().numpy()
    return found
