"""Cross-entropy of the tokens of a batch, with a graph where gradients are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.by_item import wide
from mergesearch.evaluators.model_items import ModelItems, padded, run_model
from mergesearch.evaluators.text.token_scores import Wanted, positions_at_once, score_tokens
from mergesearch.evaluators.transfer import to_device

if TYPE_CHECKING:
    import torch

#: Label of tokens that do not count, the one of transformers.
IGNORED = -100


def token_losses(model: Any, items: ModelItems, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each token ``(items, width)``, 0 where the label is :data:`IGNORED`.

    All logits are computed at once where gradients are wanted, and where they fit into the memory
    for them; otherwise those of some positions after the other.

    Args:
        model: A causal language model.
        items: Items with ``input_ids``.
        labels: The token that each of an item's tokens should predict ``(items, width)``; none of
            the last tokens, where it is narrower than the input.
    """
    import torch

    room = positions_at_once(model)
    # Cross-entropy over all positions needs a transposed copy beside logits and logarithms.
    if torch.is_grad_enabled() or room is None or 2 * labels.numel() <= room:
        return _whole(model, items, labels)
    counted = labels != IGNORED
    lines, columns = counted.nonzero(as_tuple=True)
    device = next(model.parameters()).device
    chosen = Wanted(*(to_device(one, device) for one in (lines, columns, labels[counted])))
    arguments = {**items.arguments(model), "use_cache": False}
    log_p = score_tokens(model, arguments, chosen).log_p
    losses = log_p.new_zeros(labels.shape)
    return losses.index_put((lines.to(log_p.device), columns.to(log_p.device)), -log_p)


def target_losses(
    model: Any, arguments: Mapping[str, torch.Tensor], targets: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean nats of the tokens of each item's target ``(items,)``, by teacher forcing.

    Args:
        model: An encoder-decoder, which reads the target one token behind.
        arguments: What its encoder reads.
        targets: Tokens of each target ``(tokens,)``.
    """
    from torch.nn.functional import cross_entropy

    labels = to_device(padded(list(targets), IGNORED), next(model.parameters()).device)
    logits = wide(model(**arguments, labels=labels, use_cache=False).logits)
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)


def _whole(model: Any, items: ModelItems, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    output, _ = run_model(model, items)
    logits = wide(output.logits)[:, : labels.shape[1]]
    return cross_entropy(
        logits.transpose(1, 2),
        to_device(labels, logits.device),
        reduction="none",
        ignore_index=IGNORED,
    )
