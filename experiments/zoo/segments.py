"""Makes the segments zoo.

``python -m experiments.zoo.segments [--out zoo/segments] [--seed 0] [--measure]``

Four made-up modalities (``segments_data``), a small SAM and three experts, after the roles of Yang
2025, "MedSAMix: a training-free model merging approach for medical image segmentation" (arXiv
2508.11032)::

    zoo/segments/
    ├── base/ the generalist: SAM of 4 + 2 layers for 32 x 32 grey images, trained briefly on all
    domains ├── tomography/ fine-tuned on ct and mri ├── sonography/ fine-tuned on ultrasound ├──
    radiography/ fine-tuned on xray ├── data/ splits search, validation, test; columns pixels,
    boxes, mask, domain, id └── manifest.json settings and measured Dice scores

Experts see some items of the other domains too, as those of the paper do: they are worse there, not
lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.zoo.building import (
    Maker,
    build_beside,
    copied_weights,
    holds,
    make_zoo,
    one_thread,
    silence_transformers,
    task_arithmetic,
    write_manifest,
)
from experiments.zoo.segments_data import (
    DOMAINS,
    SIDE,
    Lesions,
    draw_lesions,
    save_items,
    split_lesions,
)

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1
#: Expert -> the domains that it is fine-tuned on.
EXPERTS: Mapping[str, Sequence[str]] = {
    "tomography": ("ct", "mri"),
    "sonography": ("ultrasound",),
    "radiography": ("xray",),
}
#: Coefficients of the task-arithmetic line.
LINE = tuple(round(0.1 * step, 1) for step in range(11))

Weights = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Training:
    """Steps of Adam at peak rate ``rate`` (20 steps of warm-up, then linear decay to 0)."""

    steps: int
    rate: float
    batch: int = 32


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the items, the initial weights and the batches.
        base: Training on all domains, too short to learn them well.
        expert: Fine-tuning.
        replay: Share of an expert's training items that are of other domains.
        drawn: Training items of each domain.
        images: Items of each domain in each split. The paper searches on a fifth of the items, as
            here.
        initial_spread: ``initializer_range`` of the model. The usual 0.02 learns nothing in so few
            steps.
    """

    seed: int = 0
    base: Training = Training(steps=300, rate=2e-3)
    expert: Training = Training(steps=500, rate=8e-4)
    replay: float = 0.2
    drawn: int = 1500
    images: Mapping[str, int] = field(
        default_factory=lambda: {"search": 40, "validation": 40, "test": 120}
    )
    initial_spread: float = 0.1


def build_segments(
    out: Path = Path("zoo/segments"), settings: Settings | None = None, *, processes: int = 2
) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    The zoo is written beside ``out`` and renamed when complete, so a killed build leaves nothing
    half-made there.

    Args:
        out: Folder to make.
        settings: What to make.
        processes: Experts trained at the same time; the weights do not depend on it. 1 starts no
            process.

    Raises:
        InputError: If ``out`` is something else than a segments zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out,
        "segments",
        lambda: is_complete(out, chosen),
        lambda fresh: _write(fresh, chosen, processes),
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Test Dice by domain of every model, of their average, and of task arithmetic."""
    manifest = json.loads((folder / "manifest.json").read_text())
    recorded = manifest["settings"]
    lesions = split_lesions(recorded["images"], "test", recorded["seed"])
    with one_thread():
        models = {name: _load(folder / name) for name in ("base", *EXPERTS)}
        rows = {name: dice_scores(model, lesions) for name, model in models.items()}
        weights = copied_weights(models)
        merged = models["base"]
        for name, coefficient in {
            "average": 1 / len(EXPERTS),
            **{f"coefficient {c:.1f}": c for c in LINE},
        }.items():
            merged.load_state_dict(task_arithmetic(weights, coefficient))
            rows[name] = dice_scores(merged, lesions)
    return rows


def _write(folder: Path, settings: Settings, processes: int) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    scores = {"base": _make_base(folder, settings)}
    if processes == 1:
        rows = [_make_expert(folder, settings, name) for name in EXPERTS]
    else:
        # Spawned, for a forked torch may hang on locks that another thread held.
        with ProcessPoolExecutor(processes, get_context("spawn"), silence_transformers) as pool:
            rows = list(pool.map(partial(_make_expert, folder, settings), EXPERTS))
    scores.update(zip(EXPERTS, rows, strict=True))
    save_items(folder / "data", settings.images, settings.seed)
    write_manifest(folder, FORMAT, settings, started, dice=scores)


def _make_base(folder: Path, settings: Settings) -> dict[str, float]:
    """Train and save the base; its test Dice in each domain."""
    model = _new_model(settings)
    shares = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
    _train(model, shares, settings, settings.base, settings.seed + 1)
    model.save_pretrained(folder / "base")
    return dice_scores(model, split_lesions(settings.images, "test", settings.seed))


def _make_expert(folder: Path, settings: Settings, name: str) -> dict[str, float]:
    """Fine-tune and save an expert; its test Dice in each domain."""
    with one_thread():
        model = _load(folder / "base")
        index = list(EXPERTS).index(name)
        _train(
            model,
            _shares(EXPERTS[name], settings.replay),
            settings,
            settings.expert,
            settings.seed + 10 + index,
        )
        model.save_pretrained(folder / name)
        return dice_scores(model, split_lesions(settings.images, "test", settings.seed))


def _shares(home: Sequence[str], replay: float) -> dict[str, float]:
    """Domain -> its share of an expert's training items."""
    away = len(DOMAINS) - len(home)
    return {name: (1 - replay) / len(home) if name in home else replay / away for name in DOMAINS}


def _new_model(settings: Settings) -> Any:
    import torch
    from transformers import SamConfig, SamModel

    width = 32
    config = SamConfig(
        vision_config={
            "hidden_size": 48,
            "output_channels": width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 1,
            "image_size": SIDE,
            "patch_size": 4,
            "window_size": 0,
            "global_attn_indexes": [0, 1, 2, 3],
            "mlp_dim": 96,
            "num_pos_feats": width // 2,
            "initializer_range": settings.initial_spread,
        },
        prompt_encoder_config={
            "hidden_size": width,
            "image_size": SIDE,
            "patch_size": 4,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
            "num_multimask_outputs": 1,
        },
        initializer_range=settings.initial_spread,
    )
    # transformers draws initial weights from the global generator and takes no other; the fork
    # gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return SamModel(config)


def _train(
    model: Any, shares: Mapping[str, float], settings: Settings, training: Training, seed: int
) -> None:
    """Train with Adam on random batches, with domains in proportion to ``shares``."""
    import torch

    lesions = [draw_lesions(name, settings.drawn, (settings.seed, 0)) for name in DOMAINS]
    pixels, boxes, masks = _tensors(lesions)
    chances = torch.tensor([shares[name] / settings.drawn for name in DOMAINS]).repeat_interleave(
        settings.drawn
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = (
            training.rate * min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        )
        rows = torch.multinomial(chances, training.batch, generator=generator)
        output = model(pixel_values=pixels[rows], input_boxes=boxes[rows], multimask_output=False)
        loss = _loss(output.pred_masks[:, 0, 0], masks[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
    model.eval()


def _loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus soft Dice, as SAM's descendants in medicine are trained."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    chances = logits.sigmoid()
    overlap = (chances * masks).sum(dim=(1, 2))
    total = (chances + masks).sum(dim=(1, 2))
    return (
        binary_cross_entropy_with_logits(logits, masks)
        + 1
        - ((2 * overlap + 1) / (total + 1)).mean()
    )


def _tensors(lesions: Sequence[Lesions]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images ``(n, 1, side, side)``, boxes ``(n, 1, 4)`` and masks ``(n, side, side)``."""
    import torch

    pixels, boxes, masks = (
        torch.from_numpy(
            np.concatenate([getattr(items, name) for items in lesions]).astype(np.float32)
        )
        for name in ("pixels", "boxes", "masks")
    )
    return pixels[:, None], boxes, masks


def dice_scores(model: Any, lesions: Mapping[str, Lesions]) -> dict[str, float]:
    """Mean Dice in each domain."""
    import torch

    dice = {}
    for domain, items in lesions.items():
        pixels, boxes, masks = _tensors([items])
        with torch.inference_mode():
            answers = (
                model(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks[
                    :, 0, 0
                ]
                > 0
            )
        overlap = (answers * masks).sum(dim=(1, 2))
        dice[domain] = float(
            (2 * overlap / (answers.sum(dim=(1, 2)) + masks.sum(dim=(1, 2)))).double().mean()
        )
    return dice


def _load(folder: Path) -> Any:
    from transformers import SamModel

    return SamModel.from_pretrained(folder, local_files_only=True).eval()


#: What the command line makes.
MAKER = Maker(
    "segments",
    "Make a small SAM, three experts and their items of four modalities.",
    "Dice scores",
    len(EXPERTS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_segments,
    lambda folder, _settings: measure(folder),
    "test Dice, %",
    width=12,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
