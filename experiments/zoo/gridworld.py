"""Makes the gridworld zoo: policies that act on pixels, with action heads of their own.

``python -m experiments.zoo.gridworld [--out zoo/gridworld] [--seed 0] [--measure]``

The base is a vision tower that learned where the agent is and which cell it goes to next; it has no
head. Each expert learns one skill by imitation: LoRA factors on all linear layers of the tower,
which are then added to its weights, and an action head from a random start. Classes are moves, in
the order in which the skill numbers them. There are no items: :func:`success` and
:func:`successes_by_skill` are what the ``python`` and ``task_masks`` evaluators call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.zoo.building import (
    Maker,
    build_beside,
    holds,
    make_zoo,
    one_thread,
    write_manifest,
)
from experiments.zoo.gridworld_data import (
    CELL,
    SIDE,
    SKILLS,
    Floats,
    Policy,
    demonstrations,
    goal,
    new_boards,
    pixels,
    successes,
)

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1
WIDTH = 48
#: Split -> seed of its starts; training has seeds of its own.
SPLITS = {"search": 1, "validation": 2, "test": 3}
#: Seed of the starts that a router learns from.
LEARNED = 4


@dataclass(frozen=True)
class Training:
    """Steps of Adam on batches of boards.

    Attributes:
        steps: How many.
        rate: Learning rate, which falls to a fiftieth.
        head_rate: That of the head, which begins at random.
        boards: Of each skill that is learned.
        batch: Boards of a step.
    """

    steps: int
    rate: float
    head_rate: float
    boards: int
    batch: int = 64


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the initial weights, the boards and the batches.
        base: Training of the tower; its boards are those of each skill.
        expert: Training of one skill.
        rank: Of the LoRA factors.
    """

    seed: int = 0
    base: Training = field(default_factory=lambda: Training(600, 3e-3, 3e-3, 2000))
    expert: Training = field(default_factory=lambda: Training(500, 3e-3, 1e-2, 5000))
    rank: int = 8


def build_gridworld(out: Path = Path("zoo/gridworld"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a gridworld zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out, "gridworld", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen)
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    import torch

    started = time.perf_counter()
    # transformers and peft draw initial weights from the global generator and take no other; the
    # fork gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tower = _new_model(None)
        losses = {"base": _train_base(tower, settings)}
        tower.vit.save_pretrained(folder / "base")
        for index, name in enumerate(SKILLS):
            torch.manual_seed(settings.seed + 100 + index)
            expert, losses[name] = _trained_expert(tower, name, settings, index)
            expert.save_pretrained(folder / name)
    write_manifest(folder, FORMAT, settings, started, losses=losses)


def _new_model(skill: str | None) -> Any:
    """An untrained policy of a skill; of none, one whose tower alone is wanted."""
    from transformers import ViTConfig, ViTForImageClassification

    moves = SKILLS[skill].actions if skill else SKILLS["reach"].actions
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        image_size=SIDE * CELL,
        patch_size=CELL,
        num_channels=3,
        initializer_range=0.1,
        id2label=dict(enumerate(moves)),
        label2id={move: number for number, move in enumerate(moves)},
    )
    return ViTForImageClassification(config)


def _train_base(model: Any, settings: Settings) -> float:
    """Teach a tower where the agent is and where it goes next, on boards of all skills."""
    import torch

    # Logits of four coordinates: row and column of each.
    model.classifier = torch.nn.Linear(WIDTH, 4 * SIDE)
    parts = []
    places = []
    for index, skill in enumerate(SKILLS.values()):
        boards, _ = demonstrations(skill, settings.base.boards, (settings.seed, 10, index))
        parts.append(pixels(skill, boards))
        places += [[*board.agent, *goal(board)] for board in boards]
    wanted = torch.tensor(places)
    return _train(model, np.concatenate(parts), wanted, settings.base, settings.seed)


def _trained_expert(tower: Any, name: str, settings: Settings, index: int) -> tuple[Any, float]:
    """A policy of one skill, and its last training loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = _new_model(name)
    model.vit.load_state_dict(tower.vit.state_dict())
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=r"vit\.layers\..*(proj|fc1|fc2)",
            modules_to_save=["classifier"],
        ),
    )
    boards, actions = demonstrations(
        SKILLS[name], settings.expert.boards, (settings.seed, 20, index)
    )
    wanted = torch.from_numpy(actions)[:, None]
    images = pixels(SKILLS[name], boards)
    loss = _train(adapted, images, wanted, settings.expert, settings.seed + index)
    return adapted.merge_and_unload(), loss


def _train(
    model: Any, images: Floats, wanted: torch.Tensor, training: Training, seed: int
) -> float:
    """Adam on random batches of images ``(n, ...)`` and classes ``(n, places)``; the last loss.

    The loss is the mean of the last 20 steps.
    """
    import torch

    inputs = torch.from_numpy(images)
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in own if "classifier" not in n], "lr": training.rate},
        {"params": [p for n, p in own if "classifier" in n], "lr": training.head_rate},
    ]
    adam = torch.optim.Adam(groups, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, training.steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(training.steps):
        rows = torch.randint(len(inputs), (training.batch,), generator=generator)
        logits = model(pixel_values=inputs[rows]).logits
        answers = wanted[rows]
        parted = logits.reshape(answers.numel(), -1)
        loss = torch.nn.functional.cross_entropy(parted, answers.reshape(-1))
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        falling.step()
        losses.append(loss.item())
    return float(np.mean(losses[-20:]))


def success(model: Any, split: str, episodes: int = 60, *, told: bool = False) -> list[float]:
    """1 for every episode that succeeds, else 0, of all skills one after the other.

    Args:
        model: A policy, or a merge that takes the skills of its items as ``tasks``.
        split: Whose starts.
        episodes: Of each skill.
        told: Whether a merge is told the skill; otherwise it infers it from the first observation.
    """
    found = successes_by_skill(model, split, episodes, told=told)
    return [score for scores in found.values() for score in scores]


def successes_by_skill(
    model: Any, split: str, episodes: int = 60, *, told: bool = False
) -> dict[str, list[float]]:
    """Skill -> 1 for every episode that succeeds, else 0, as :func:`success`."""
    found = {}
    for index, (name, skill) in enumerate(SKILLS.items()):
        boards = new_boards(skill, episodes, (SPLITS[split], index))
        tasks = [name] * episodes if told else inferred(model, pixels(skill, boards))
        scores = successes(skill, policy_of(model, tasks), boards)
        found[name] = [float(score) for score in scores]
    return found


def first_observations(skill: str, count: int = 100) -> dict[str, torch.Tensor]:
    """Starts that a router of skills may learn from; those of no split."""
    import torch

    boards = new_boards(SKILLS[skill], count, (LEARNED, [*SKILLS].index(skill)))
    return {"pixel_values": torch.from_numpy(pixels(SKILLS[skill], boards))}


def inferred(model: Any, first: Floats) -> list[str] | None:
    """The skills that a merge infers from first observations; None of a plain policy."""
    import torch

    if not hasattr(model, "tasks_of"):
        return None
    tasks: list[str] = model.tasks_of(pixel_values=torch.from_numpy(first))
    return tasks


def policy_of(model: Any, tasks: Sequence[str] | None) -> Policy:
    """The action with the greatest logit.

    Args:
        model: A policy, or a merge that takes tasks.
        tasks: The task of each episode, for a merge that takes them.
    """
    import torch

    named = tasks if hasattr(model, "tasks_of") else None

    def act(observed: Floats, episodes: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        own = {} if named is None else {"tasks": [named[k] for k in episodes]}
        with torch.no_grad():
            logits = model(pixel_values=torch.from_numpy(observed), **own).logits
        actions: npt.NDArray[np.int64] = logits.argmax(dim=1).numpy()
        return actions

    return act


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Success rate of every expert at each skill, with its own numbering of the moves."""
    from transformers import AutoModelForImageClassification

    rows = {}
    with one_thread():
        for name in SKILLS:
            model = AutoModelForImageClassification.from_pretrained(folder / name).eval()
            scores = successes_by_skill(model, "test", 100)
            rows[name] = {skill: float(np.mean(own)) for skill, own in scores.items()}
    return rows


#: What the command line makes.
MAKER = Maker(
    "gridworld",
    "Make a vision tower, and policies of three skills with action heads of their own.",
    "success rates",
    len(SKILLS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_gridworld,
    lambda folder, _settings: measure(folder),
    "success rate, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
