"""How unlikely a model of images and texts finds the answer to a question about a picture.

The answer is an assistant's turn of the processor's chat template after the question, as in
supervised fine-tuning; its tokens, and what ends the turn, are scored by teacher forcing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.by_item import wide
from mergesearch.evaluators.text.token_losses import IGNORED
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


def said(processor: Any, question: str, answer: str | None = None) -> str:
    """A question about a picture, and an answer if there is one, in the chat template's words."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text: str = processor.apply_chat_template(turns, add_generation_prompt=answer is None)
    return text


def taught(processor: Any, question: str, answer: str, where: str) -> tuple[str, int]:
    """Question and answer as one text, and how many of its last tokens are the answer's.

    Where the template does not end the answer, the tokenizer's end of text does.

    Args:
        processor: A processor with a chat template.
        question: What is asked.
        answer: What should be answered.
        where: Key of the study file, for messages.

    Raises:
        InputError: If the chat template leaves the answer out.
    """
    from jinja2 import TemplateError

    try:
        whole = said(processor, question, answer).rstrip()
    except (TemplateError, TypeError):
        whole = ""
    if answer.strip() not in whole.removeprefix(said(processor, question)):
        raise InputError(
            f"{where}.tokenizer: expected a chat template with assistant's turns, which "
            f"cross_entropy scores, received one that leaves {answer!r} out; mend the template"
        )
    if whole.endswith(answer.strip()):
        whole += processor.tokenizer.eos_token or ""
    asked, every = (
        processor.tokenizer(text)["input_ids"] for text in (said(processor, question), whole)
    )
    # Tokens may reach over the place where the answer begins.
    same = next(
        (n for n, (one, two) in enumerate(zip(asked, every, strict=False)) if one != two),
        min(len(asked), len(every)),
    )
    return whole, len(every) - same


def answer_losses(
    model: Any, arguments: Mapping[str, torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """Mean nats of the answer's tokens ``(items,)``.

    Args:
        model: A model that writes behind what it reads.
        arguments: Its inputs, padded on either side.
        counts: How many of the last tokens of each item are scored.
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids = arguments["input_ids"].cpu()
    mask = arguments["attention_mask"].cpu()
    ends = (mask * torch.arange(1, mask.shape[1] + 1)).max(dim=1).values.tolist()
    labels = torch.full_like(ids, IGNORED)
    for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
        labels[row, end - count : end] = ids[row, end - count : end]
    first = min(end - count for end, count in zip(ends, counts, strict=True)) - 1
    last = max(ends) - 1
    logits = _logits(model, arguments, first, last)
    wanted = to_device(labels[:, first + 1 : last + 1], logits.device)
    losses = cross_entropy(
        wide(logits).transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED
    )
    return losses.sum(dim=1) / (wanted != IGNORED).sum(dim=1)


def _logits(
    model: Any, arguments: Mapping[str, torch.Tensor], first: int, last: int
) -> torch.Tensor:
    """Logits ``(items, last − first, vocabulary)`` at some positions, and no others if possible."""
    import torch

    device = next(model.parameters()).device
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep = torch.arange(first, last, device=device)
        logits: torch.Tensor = model(**arguments, use_cache=False, logits_to_keep=keep).logits
        return logits
    logits = model(**arguments, use_cache=False).logits
    return logits[:, first:last]
