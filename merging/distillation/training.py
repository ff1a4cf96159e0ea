"""A LoRA of the pivot, trained towards targets by the Trainer of transformers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.distillation.predictions import Predictions
from mergesearch.merging.distillation.reading import padded
from mergesearch.merging.distillation.settings import Settings
from mergesearch.merging.distillation.tokenized import Tokenized

if TYPE_CHECKING:
    import torch

#: Step, steps, loss and seconds left -> None.
Report = Callable[[int, int, float, float], None]
#: Lines of progress, and checkpoints of the training, at most.
REPORTS = 20
SAVES = 4


@dataclass(frozen=True, eq=False)
class Example:
    """A text and its target.

    Attributes:
        text: In the pivot's tokens.
        target: What is expected at each of them.
    """

    text: Tokenized
    target: Predictions


def train_lora(
    model: Any,
    first: int,
    examples: Sequence[Example],
    settings: Settings,
    work: Path,
    report: Report,
) -> Any:
    """Train a LoRA of the model, and return both together.

    It goes on from the last checkpoint in ``work`` if there is one, with the same result as without
    a stop.

    Args:
        model: The pivot; it is changed.
        first: Token before every text.
        examples: Texts with targets.
        settings: Steps, batch, rate, rank, weight of the texts, seed.
        work: Folder of the training's own checkpoints.
        report: Is told of the progress.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from mergesearch.merging.models.loading import no_report

    with _libraries_seeded(settings.seed), no_report(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft
        adapted = _with_lora(model, settings)
        trainer = _trainer(adapted, first, examples, settings, work)
        trainer.add_callback(_progress(settings.steps, report))
        last = get_last_checkpoint(str(work)) if work.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
    return adapted.eval()


def held_out_losses(model: Any, first: int, texts: Sequence[Tokenized]) -> list[float]:
    """Mean loss of a model on the tokens of each text, in nats."""
    import torch

    device = next(model.parameters()).device
    losses = []
    with torch.inference_mode():
        for text in texts:
            ids, _ = padded([[first, *text.ids.tolist()]])
            logits = model(input_ids=ids.to(device), use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(device))))
    return losses


def losses(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], text_weight: float
) -> torch.Tensor:
    """``λ · L_text + (1 − λ) · L_fused`` in nats per token (FuseLLM, equation 4).

    Both are cross-entropies: of the tokens themselves, and of the targets.

    Args:
        logits: For the tokens of the batch ``(texts, tokens, vocabulary)``.
        batch: ``tokens`` and ``mask`` ``(texts, tokens)``; ``ids`` and ``shares`` of the targets
            ``(texts, tokens, kept)``.
        text_weight: λ.
    """
    import torch

    expected = torch.log_softmax(logits.float(), dim=-1)
    mask = batch["mask"].to(expected.dtype)
    own = -expected.gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1)
    fused = -(batch["shares"] * expected.gather(-1, batch["ids"])).sum(dim=-1)
    return ((text_weight * own + (1 - text_weight) * fused) * mask).sum() / mask.sum()


def collate(first: int, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch: input, mask and tokens, and targets padded with share 0."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    read, mask = padded([[first, *one.text.ids[:-1].tolist()] for one in examples])
    tokens, _ = padded([one.text.ids.tolist() for one in examples])
    ids = [torch.from_numpy(one.target.ids) for one in examples]
    shares = [torch.from_numpy(one.target.shares) for one in examples]
    width = max(row.shape[1] for row in ids)
    wide = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in ids]
    wide_shares = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in shares]
    return {
        "read": read,
        "mask": mask,
        "tokens": tokens,
        "ids": pad(wide, batch_first=True),
        "shares": pad(wide_shares, batch_first=True),
    }


def _with_lora(model: Any, settings: Settings) -> Any:
    """The model with a LoRA on every linear layer but the output."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _trainer(
    model: Any, first: int, examples: Sequence[Example], settings: Settings, work: Path
) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Distilling(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            logits = model(
                input_ids=inputs["read"], attention_mask=inputs["mask"], use_cache=False
            ).logits
            loss = losses(logits, inputs, settings.text_weight)
            return (loss, {"logits": logits}) if return_outputs else loss

    trainer = Distilling(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.rate,
            warmup_steps=max(1, settings.steps // 10),
            lr_scheduler_type="linear",
            logging_steps=max(1, settings.steps // REPORTS),
            save_steps=max(1, settings.steps // SAVES),
            save_total_limit=1,
            seed=settings.seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=list(examples),
        data_collator=lambda rows: collate(first, rows),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _progress(steps: int, report: Report) -> Any:
    """A callback of the trainer that tells of steps, loss and seconds left."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.since = monotonic()
            self.begun = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                done = max(1, state.global_step - self.begun)
                left = (monotonic() - self.since) / done * (steps - state.global_step)
                report(state.global_step, steps, float(logs["loss"]), left)

    return Progress()


@contextmanager
def _libraries_seeded(seed: int) -> Iterator[None]:
    """A context whose draws follow from a seed; the global generators are given back as they were.

    transformers and peft draw from these and take no other.
    """
    import torch

    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
