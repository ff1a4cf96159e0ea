"""Makes the zoo of a mixture of experts: one small Mixtral that answers the skills' questions.

``python -m experiments.zoo.moe [--out zoo/moe] [--seed 0] [--measure]``

Every block has eight experts, of which a token uses two. Experiment 19 also makes a model whose
experts began as copies of one. The skills are those of :mod:`experiments.zoo.skills_data`; the
calibration items are training questions, padded to one length, with a mask.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.zoo.building import Maker, build_beside, holds, make_zoo, write_manifest
from experiments.zoo.skills import (
    IGNORED,
    TOKENS,
    Example,
    Training,
    save_tokenizer,
    scorer,
    training_pools,
)
from experiments.zoo.skills import Settings as SkillSettings
from experiments.zoo.skills_data import SKILLS, SPLITS, questions, save_questions
from experiments.zoo.skills_tasks import write_tasks

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the questions, the initial weights and the batches.
        training: Steps on all skills at once.
        questions: Of each skill in each split.
        examples: Training questions of each skill, at most.
        calibration: Calibration items of each skill.
        width, inner, blocks: Features, features inside an expert, and blocks of the model.
        experts, used: Experts of a block, and how many of them a token uses.
        balance: Weight of the loss that keeps the router from using few experts.
        upcycled: Steps at the beginning in which each block has one expert, of which all others
            then begin as copies (Komatsuzaki 2023, "Sparse Upcycling"); 0: experts begin apart.
    """

    seed: int = 0
    training: Training = field(default_factory=lambda: Training(steps=1500, rate=3e-3, batch=32))
    questions: Mapping[str, int] = field(
        default_factory=lambda: {"search": 100, "validation": 100, "test": 300}
    )
    examples: int = 4000
    calibration: int = 60
    width: int = 64
    inner: int = 96
    blocks: int = 3
    experts: int = 8
    used: int = 2
    balance: float = 0.01
    upcycled: int = 0


def build_moe(out: Path = Path("zoo/moe"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    chosen = settings or Settings()
    build_beside(out, "MoE", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen))
    write_tasks(out / "tasks", out.resolve())
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    skills = SkillSettings(seed=settings.seed, training=settings.examples)
    tokenizer = save_tokenizer(folder / "base", skills)
    pools = training_pools(tokenizer, skills)
    _save_data(folder / "data", pools, settings)
    model = new_model(settings, len(tokenizer))
    begun = settings.upcycled
    if begun:
        single = replace(settings, experts=1, used=1)
        dense = new_model(single, len(tokenizer))
        train(dense, list(pools.values()), single, begun, 2)
        upcycle(model, dense)
    train(model, list(pools.values()), settings, settings.training.steps - begun, 1)
    model.save_pretrained(folder / "base")
    write_manifest(folder, FORMAT, settings, started)


def _save_data(folder: Path, pools: Mapping[str, Sequence[Example]], settings: Settings) -> None:
    """Save the questions of all skills, and the calibration items."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for skill in SKILLS:
            asked = {
                split: questions(skill, split, settings.questions[split], settings.seed)
                for split in SPLITS
            }
            save_questions(folder / skill, asked, skill)
        save_calibration(folder / "calibration", pools, settings)
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def save_calibration(
    folder: Path, pools: Mapping[str, Sequence[Example]], settings: Settings
) -> None:
    """Save training questions as token ids and masks, ``(items, TOKENS)`` each."""
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng([settings.seed, 77])
    rows = []
    for pool in pools.values():
        chosen = rng.permutation(len(pool))[: settings.calibration]
        rows += [pool[int(index)][0][:TOKENS] for index in chosen]
    columns = {
        "input_ids": [ids + [0] * (TOKENS - len(ids)) for ids in rows],
        "attention_mask": [[1] * len(ids) + [0] * (TOKENS - len(ids)) for ids in rows],
    }
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(folder))


def new_model(settings: Settings, tokens: int) -> Any:
    """An untrained Mixtral of the settings' sizes."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tokens,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.used,
        max_position_embeddings=TOKENS,
        router_aux_loss_coef=settings.balance,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # transformers draws initial weights from the global generator and takes no other; the fork
    # gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return MixtralForCausalLM(config)


def upcycle(model: Any, dense: Any) -> None:
    """Give all experts of a block the weights of the only one of another model's block."""
    weights = dense.state_dict()
    own = model.state_dict()
    begun = {
        name: value if name.endswith("gate.weight") else weights[name].expand_as(value).clone()
        for name, value in own.items()
    }
    model.load_state_dict(begun)


def train(
    model: Any, pools: Sequence[Sequence[Example]], settings: Settings, steps: int, stream: int
) -> None:
    """Train with AdamW on batches that take examples from all pools alike.

    Args:
        model: Trained in place.
        pools: Examples by skill.
        settings: Rate, sizes of batches, and the seed.
        steps: Their number.
        stream: Which of the seed's streams of batches is taken.
    """
    import torch

    training = settings.training
    rng = np.random.default_rng([settings.seed, stream])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = training.rate * warm * (1 - step / steps)
        chosen = [pools[index] for index in rng.integers(len(pools), size=training.batch)]
        examples = [pool[int(rng.integers(len(pool)))] for pool in chosen]
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, examples, balanced=True))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def loss_of(model: Any, examples: Sequence[Example], *, balanced: bool = False) -> torch.Tensor:
    """Cross-entropy of the answers, with the loss of the router's balance if that is wanted."""
    ids = _padded([ids for ids, _ in examples], 0)
    labels = _padded([labels for _, labels in examples], IGNORED)
    mask = _padded([[1] * len(ids) for ids, _ in examples], 0)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        use_cache=False,
        output_router_logits=balanced,
    )
    loss: torch.Tensor = output.loss
    return loss


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    import torch

    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def load_model(folder: Path) -> Any:
    """A model of the zoo."""
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def measure(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Accuracy of the model by skill."""
    return {"base": scorer(folder, split)(load_model(folder / "base"))}


#: What the command line makes.
MAKER = Maker(
    "moe",
    "Train a small mixture of experts and make its questions.",
    "accuracies",
    0,
    lambda seed: Settings(seed=seed),
    is_complete,
    build_moe,
    lambda folder, _settings: measure(folder),
    "accuracy, %",
    width=11,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
