"""Log-probabilities of chosen tokens, without logits of all positions.

The body of the model runs once over a batch. Hidden states are taken at the positions that are
scored, and the head is applied to a few of them at a time, so that logits ``(positions,
vocabulary)`` and their logarithms stay within :func:`head_bytes`.

How the head is applied depends on what the model does with logits afterwards, which is tried once
for each model:

* **head**: nothing, so the head is called alone (Llama, Qwen, Mistral, GPT-2).
* **forward**: something, such as a cap or a scale (Gemma 2, Cohere, Granite). The model's own
  forward pass then runs on a single token for each part, and the hidden states replace that token's
  at the head.
* **whole**: the head cannot be found. All logits are computed at once, and memory has no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from mergesearch.evaluators.by_item import wide

if TYPE_CHECKING:
    import torch

#: Memory for logits and their logarithms on the CPU, in bytes.
CPU_HEAD_BYTES = 64 * 2**20
#: The same on an accelerator, where some hundred positions at a time keep it busy.
ACCELERATOR_HEAD_BYTES = 512 * 2**20
#: Largest logit that models are tried with; caps are below it.
LARGEST_LOGIT = 100.0

HeadPath = Literal["head", "forward", "whole"]
_PATHS: WeakKeyDictionary[Any, HeadPath] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Wanted:
    """The tokens of a batch that are scored.

    Attributes:
        lines, columns: Where each of them is predicted in the batch ``(n,)``.
        tokens: The tokens ``(n,)``.
    """

    lines: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of tokens, on the model's device.

    Attributes:
        log_p: Log-probability of each token in nats ``(n,)``, fp32 or fp64.
        likeliest: Whether no other token is more likely ``(n,)``.
    """

    log_p: torch.Tensor
    likeliest: torch.Tensor


def head_bytes(device: str) -> int:
    """Memory for logits and their logarithms on a type of device, in bytes."""
    return CPU_HEAD_BYTES if device == "cpu" else ACCELERATOR_HEAD_BYTES


def bytes_per_position(vocabulary: int, dtype: torch.dtype) -> int:
    """Memory that one position takes: logits and their logarithms, in fp32 unless wider."""
    return 2 * vocabulary * max(dtype.itemsize, 4)


def score_tokens(model: Any, arguments: Mapping[str, Any], wanted: Wanted) -> TokenScores:
    """Score chosen tokens of a batch.

    Gradients must not be needed.

    Args:
        model: A causal language model.
        arguments: Its arguments, among them ``input_ids`` ``(rows, width)``.
        wanted: What to score.
    """
    size = positions_at_once(model)
    if size is None or len(wanted.tokens) <= size:
        return _scores(_logits_at(model, arguments, wanted), wanted.tokens)
    path = head_path(model)
    if path == "whole":
        return _scores(_logits_at(model, arguments, wanted), wanted.tokens)
    hidden = _hidden_at(model, arguments, wanted)
    apply: Callable[[torch.Tensor], torch.Tensor] = (
        model.get_output_embeddings()
        if path == "head"
        else partial(_by_forward, model, arguments["input_ids"][:1, :1])
    )
    return _in_parts(apply, hidden, wanted.tokens, size)


def positions_at_once(model: Any) -> int | None:
    """Positions whose logits fit into the memory for them; None where the head has no weight."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        return None
    room = head_bytes(weight.device.type)
    return max(room // bytes_per_position(len(weight), weight.dtype), 1)


def head_path(model: Any) -> HeadPath:
    """How the head of a model is applied to parts; tried when it is first asked for.

    The head's answer is replaced by numbers of all sizes: a model that returns them as they are
    does nothing with logits after its head, whatever its weights.
    """
    if model not in _PATHS:
        _PATHS[model] = _tried_path(model)
    return _PATHS[model]


def _tried_path(model: Any) -> HeadPath:
    import torch

    head = model.get_output_embeddings()
    given: list[torch.Tensor] = []

    def replace(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not inputs or inputs[0].shape[:2] != (1, 1) or output.shape[:2] != (1, 1):
            return None
        ramp = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, output.shape[-1], device=output.device)
        given.append(ramp.to(output.dtype).expand(output.shape))
        return given[0]

    if head is None:
        return "whole"
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    hook = head.register_forward_hook(replace)
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(given) != 1 or given[0].shape != logits.shape:
        return "whole"
    return "head" if torch.equal(wide(given[0]), wide(logits)) else "forward"


def _in_parts(
    apply: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    size: int,
) -> TokenScores:
    """Apply a head to hidden states ``(n, width)``, ``size`` positions at a time."""
    import torch

    parts = [
        _scores(apply(states[None])[0], own)
        for states, own in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True)
    ]
    return TokenScores(
        torch.cat([part.log_p for part in parts]), torch.cat([part.likeliest for part in parts])
    )


def _scores(logits: torch.Tensor, tokens: torch.Tensor) -> TokenScores:
    """Scores of tokens ``(n,)`` from logits ``(n, vocabulary)``."""
    logits = wide(logits)
    tokens = tokens.to(logits.device)
    log_p = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    return TokenScores(log_p, logits.argmax(dim=-1) == tokens)


def _logits_at(model: Any, arguments: Mapping[str, Any], wanted: Wanted) -> torch.Tensor:
    """Logits ``(n, vocabulary)`` at chosen positions.

    The head is given these positions alone, whatever the model does after it.
    """
    with _positions_for_head(model, arguments, wanted, keep=None) as taken:
        logits: torch.Tensor = model(**arguments).logits
    if taken:
        return logits[0]
    device = logits.device
    return logits[wanted.lines.to(device), wanted.columns.to(device)]


def _hidden_at(model: Any, arguments: Mapping[str, Any], wanted: Wanted) -> torch.Tensor:
    """Hidden states ``(n, width)`` that the head would get at chosen positions.

    The head itself gets only the first of them.
    """
    with _positions_for_head(model, arguments, wanted, keep=1) as taken:
        model(**arguments)
    return taken[0]


@contextmanager
def _positions_for_head(
    model: Any, arguments: Mapping[str, Any], wanted: Wanted, keep: int | None
) -> Iterator[list[torch.Tensor]]:
    """Give the head the first ``keep`` of the chosen positions, as one row.

    Yields:
        A list that then holds the hidden states ``(n, width)`` of all of them, unless the head
        does not get one state for each token.
    """
    head = model.get_output_embeddings()
    size = arguments["input_ids"].shape
    taken: list[torch.Tensor] = []

    def choose(module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not given or given[0].shape[:2] != size:
            return None
        device = given[0].device
        taken.append(given[0][wanted.lines.to(device), wanted.columns.to(device)])
        return (taken[0][None, :keep], *given[1:])

    hook = None if head is None else head.register_forward_pre_hook(choose)
    try:
        yield taken
    finally:
        if hook is not None:
            hook.remove()


def _by_forward(model: Any, token: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Logits ``(1, n, vocabulary)`` of hidden states ``(1, n, width)``, as the model makes them.

    Args:
        model: The model.
        token: Any token ``(1, 1)``, for its body.
        states: What the head gets instead of that token's state.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, given: (states,))
    try:
        logits: torch.Tensor = model(input_ids=token, use_cache=False).logits
    finally:
        hook.remove()
    return logits
