"""How unlikely a speech recogniser finds the text of a recording, in nats for each of its tokens.

Models of connectionist temporal classification are scored by the loss of Graves 2006,
"Connectionist Temporal Classification", equation (12): −log p(text), over all alignments.
Encoder-decoders are scored by teacher forcing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.by_item import wide
from mergesearch.evaluators.model_items import ModelItems, run_model
from mergesearch.evaluators.text.token_losses import target_losses
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: Methods of models that tell how many moments an input of some length has.
LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


def known_tokens(tokenizer: Any, text: str, *, ignore_case: bool) -> torch.Tensor:
    """Tokens of a text ``(tokens,)`` that the tokenizer knows; all others are left out.

    Args:
        tokenizer: Of a model of connectionist temporal classification.
        text: What is said.
        ignore_case: Whether the case may be that which the tokenizer knows best.
    """
    import torch

    spellings = (text, text.upper(), text.lower()) if ignore_case else (text,)
    rows = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in spellings]
    known = [[token for token in row if token != tokenizer.unk_token_id] for row in rows]
    return torch.tensor(max(known, key=len), dtype=torch.int64)


def alignment_losses(
    model: Any, items: ModelItems, targets: Sequence[torch.Tensor], where: str, *, lenient: bool
) -> torch.Tensor:
    """Loss of connectionist temporal classification for each token of a text ``(items,)``.

    Args:
        model: A model that answers at every moment; its padding token is the blank.
        items: Recordings.
        targets: Tokens of each text ``(tokens,)``.
        where: Key of the study file, for messages.
        lenient: Whether texts that do not fit their recordings lose 0, and have no gradient.

    Raises:
        InputError: If a text has tokens that the model has not or, unless ``lenient``, more than
            fit its recording.
    """
    import torch
    from torch.nn.functional import ctc_loss

    output, batch = run_model(model, items)
    logits = wide(output.logits)
    largest = max((int(target.max()) for target in targets if len(target)), default=0)
    if largest >= logits.shape[2]:
        raise InputError(
            f"{where}.tokenizer: expected token numbers below {logits.shape[2]}, as the model has "
            f"that many, received {largest}; name the tokenizer that the model was trained with"
        )
    moments = _moments(model, batch, logits.shape[1], where)
    counts = torch.tensor([len(target) for target in targets])
    # On the CPU, as the gradient of CUDA's own form differs from run to run.
    losses = ctc_loss(
        logits.log_softmax(dim=2).transpose(0, 1).cpu(),
        torch.cat(list(targets)),
        moments,
        counts,
        blank=int(getattr(model.config, "pad_token_id", None) or 0),
        reduction="none",
        zero_infinity=lenient,
    )
    _check_fit(losses.detach(), logits, moments, counts, where)
    return (losses / counts.clamp(min=1)).to(logits.device)


def _check_fit(
    losses: torch.Tensor,
    logits: torch.Tensor,
    moments: torch.Tensor,
    counts: torch.Tensor,
    where: str,
) -> None:
    """Refuse texts that no alignment fits, whose loss is infinite though the answers are not."""
    import torch

    finite = torch.isfinite(logits).all(dim=2).all(dim=1).cpu()
    long = torch.isposinf(losses) & finite
    if bool(long.any()):
        index = int(long.int().argmax())
        raise InputError(
            f"{where}.data: expected texts that fit their recordings, received "
            f"{int(counts[index])} tokens for a recording of {int(moments[index])} moments; "
            "remove it, or measure wer or cer"
        )


def forced_losses(model: Any, items: ModelItems, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean nats of the tokens of each text ``(items,)``, by teacher forcing.

    Args:
        model: An encoder-decoder.
        items: Recordings.
        targets: Tokens of each text ``(tokens,)``. The one that starts the decoder is left out, as
            the model adds it.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    rows = [
        target[1:] if len(target) > 1 and int(target[0]) == start else target for target in targets
    ]
    return target_losses(model, items.arguments(model), rows)


def _moments(model: Any, batch: Mapping[str, torch.Tensor], most: int, where: str) -> torch.Tensor:
    """Moments of each recording ``(items,)``, without those of padding."""
    import torch

    mask = batch.get("attention_mask")
    if mask is None:
        return torch.full((len(next(iter(batch.values()))),), most)
    method = next((getattr(model, name) for name in LENGTHS if hasattr(model, name)), None)
    if method is None:
        raise InputError(
            f"{where}.batch_size: expected 1 with {type(model).__name__}, which does not tell "
            "where recordings end in a batch, received recordings of different lengths; set "
            "batch_size: 1"
        )
    moments: torch.Tensor = method(mask.sum(dim=-1)).to("cpu", torch.int64)
    return moments.clamp(max=most)
