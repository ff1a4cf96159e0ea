"""Makes the skills zoo.

``python -m experiments.zoo.skills [--out zoo/skills] [--seed 0] [--measure]``
"""

from __future__ import annotations

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
    holds,
    make_zoo,
    one_thread,
    silence_transformers,
    write_manifest,
)
from experiments.zoo.skills_data import (
    SKILLS,
    SPLITS,
    Question,
    questions,
    save_questions,
    save_sentences,
    sentences,
)
from experiments.zoo.skills_tasks import write_tasks

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1

#: Coefficients of the task-arithmetic line.
LINE = tuple(round(0.1 * step, 2) for step in range(1, 11))

#: Label of tokens that do not count, as transformers has it.
IGNORED = -100
TOKENS = 80

Weights = Mapping[str, "torch.Tensor"]
#: Token ids and labels of one training example.
Example = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Training:
    """Steps of AdamW at peak rate ``rate`` (20 steps of warm-up, then linear decay to 0)."""

    steps: int
    rate: float
    batch: int = 64


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of the questions, the initial weights and the batches.
        base: Training on text and all skills: long enough to answer a little better than chance.
        expert: Fine-tuning on one skill.
        replay: Share of an expert's batches that come from what the base was trained on, so that it
            stays near.
        questions: Of each skill in each split.
        width, blocks: Of the Llama.
    """

    seed: int = 0
    base: Training = Training(steps=350, rate=2e-3, batch=32)
    expert: Training = Training(steps=200, rate=1e-3, batch=32)
    replay: float = 0.3
    questions: Mapping[str, int] = field(
        default_factory=lambda: {"search": 300, "validation": 200, "test": 400}
    )
    training: int = 4000
    width: int = 128
    blocks: int = 4


def build_skills(
    out: Path = Path("zoo/skills"), settings: Settings | None = None, *, processes: int = 2
) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    The zoo is written beside ``out`` and renamed when complete, so a killed build leaves nothing
    half-made there. Task files name their data in full: a zoo that was moved gets new ones.

    Args:
        out: Folder to make.
        settings: What to make.
        processes: Experts trained at the same time; the weights do not depend on it. 1 starts no
            process.

    Raises:
        InputError: If ``out`` is something else than a skills zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out,
        "skills",
        lambda: is_complete(out, chosen),
        lambda fresh: _write(fresh, chosen, processes),
    )
    write_tasks(out / "tasks", out.resolve())
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def _write(folder: Path, settings: Settings, processes: int) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    _save_data(folder / "data", settings)
    save_tokenizer(folder / "base", settings)
    _make_base(folder, settings)
    if processes == 1:
        for skill in SKILLS:
            _make_expert(folder, settings, skill)
    else:
        # Spawned, for a forked torch may hang on locks that another thread held.
        with ProcessPoolExecutor(processes, get_context("spawn"), silence_transformers) as pool:
            list(pool.map(partial(_make_expert, folder, settings), SKILLS))
    write_manifest(folder, FORMAT, settings, started)


def _save_data(folder: Path, settings: Settings) -> None:
    import datasets

    counts = settings.questions
    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for skill in SKILLS:
            asked = {
                split: questions(skill, split, counts[split], settings.seed) for split in SPLITS
            }
            save_questions(folder / skill, asked, skill)
        texts = {split: sentences(split, counts[split] // 4, settings.seed) for split in SPLITS}
        save_sentences(folder / "text", texts)
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def save_tokenizer(folder: Path, settings: Settings) -> Any:
    """Train a byte-level BPE tokenizer, digits apart, on the training text, and save it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [questions(skill, "training", 500, settings.seed) for skill in SKILLS]
    texts = [f"{question.prompt} {question.target}" for rows in asked for question in rows]
    tokenizer.train_from_iterator([*texts, *sentences("training", 200, settings.seed)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=TOKENS,
    )
    fast.save_pretrained(folder)
    return fast


def _make_base(folder: Path, settings: Settings) -> None:
    tokenizer = _load_tokenizer(folder / "base")
    model = _new_model(settings, len(tokenizer))
    pools = training_pools(tokenizer, settings)
    _train(model, list(pools.values()), [1.0] * len(pools), settings.base, settings.seed + 1)
    model.save_pretrained(folder / "base")


def _make_expert(folder: Path, settings: Settings, skill: str) -> None:
    """Fine-tune and save the expert of a skill."""
    with one_thread():
        tokenizer = _load_tokenizer(folder / "base")
        model = load_model(folder / "base")
        pools = training_pools(tokenizer, settings)
        others = settings.replay / len(pools)
        weights = [others + (1 - settings.replay) * (name == skill) for name in pools]
        index = list(SKILLS).index(skill)
        _train(model, list(pools.values()), weights, settings.expert, settings.seed + 10 + index)
        model.save_pretrained(folder / skill)
        tokenizer.save_pretrained(folder / skill)


def training_pools(tokenizer: Any, settings: Settings) -> dict[str, list[Example]]:
    """Text and every skill -> examples; of a question only the answer and the end are learnt."""
    pools: dict[str, list[Example]] = {"text": []}
    for text in sentences("training", settings.training // 4, settings.seed):
        ids = tokenizer(text)["input_ids"][: TOKENS - 2]
        pools["text"].append(([1, *ids, 2], [IGNORED, *ids, 2]))
    for skill in SKILLS:
        asked = questions(skill, "training", _most(skill, settings), settings.seed)
        pools[skill] = [_example(tokenizer, question) for question in asked]
    return pools


def _most(skill: str, settings: Settings) -> int:
    """Training questions of a skill; those of knowledge are some 960 in all."""
    return min(settings.training, 900) if skill == "knowledge" else settings.training


def _example(tokenizer: Any, question: Question) -> Example:
    prompt = tokenizer(question.prompt)["input_ids"]
    whole = tokenizer(f"{question.prompt} {question.target}")["input_ids"]
    return [*whole, 2], [*([IGNORED] * len(prompt)), *whole[len(prompt) :], 2]


def _new_model(settings: Settings, tokens: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # transformers draws initial weights from the global generator and takes no other; the fork
    # gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def _train(
    model: Any,
    pools: Sequence[Sequence[Example]],
    weights: Sequence[float],
    training: Training,
    seed: int,
) -> None:
    """Train with AdamW on batches that take examples from the pools in proportion."""
    import torch

    rng = np.random.default_rng(seed)
    shares = np.array(weights) / np.sum(weights)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = (
            training.rate * min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        )
        chosen = [pools[index] for index in rng.choice(len(pools), training.batch, p=shares)]
        examples = [pool[int(rng.integers(len(pool)))] for pool in chosen]
        ids = _padded([ids for ids, _ in examples], 0)
        labels = _padded([labels for _, labels in examples], IGNORED)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    import torch

    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def load_model(folder: Path) -> Any:
    """A model of the zoo."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def measure(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Accuracy by skill of every model, of the average, and of task arithmetic along a line."""
    names = ["base", *SKILLS]
    with one_thread():
        models = {name: load_model(folder / name) for name in names}
        score = scorer(folder, split)
        rows = {name: score(model) for name, model in models.items()}
        weights = {
            name: {key: value.clone() for key, value in m.state_dict().items()}
            for name, m in models.items()
        }
        merged = models["base"]
        for coefficient in (1 / len(SKILLS), *LINE):
            merged.load_state_dict(task_arithmetic(weights, [coefficient] * len(SKILLS)))
            rows[f"coefficient {coefficient:.2f}"] = score(merged)
    return rows


def scorer(folder: Path, split: str) -> Any:
    """A function from a model to its accuracy by skill, from log-likelihoods of the choices."""
    from datasets import load_from_disk

    from mergesearch.evaluators.harness.rows import Options, Request
    from mergesearch.evaluators.harness.scoring import score_requests

    tokenizer = _load_tokenizer(folder / "base")
    options = Options(128, TOKENS, packed=True)
    asked: dict[str, tuple[list[Any], list[int]]] = {}
    for skill in SKILLS:
        requests = []
        answers = []
        for row in load_from_disk(str(folder / "data" / skill / split)):
            prompt = tokenizer(row["prompt"])["input_ids"]
            for choice in row["choices"]:
                whole = tokenizer(f"{row['prompt']} {choice}")["input_ids"]
                requests.append(Request(tuple(prompt), tuple(whole[len(prompt) :])))
            answers.append(row["answer"])
        asked[skill] = requests, answers

    def score(model: Any) -> dict[str, float]:
        accuracy = {}
        for skill, (requests, answers) in asked.items():
            sums = np.array(
                [value for value, _ in score_requests(model, requests, options)]
            ).reshape(-1, 4)
            accuracy[skill] = float(np.mean(sums.argmax(axis=1) == np.array(answers)))
        return accuracy

    return score


def task_arithmetic(
    weights: Mapping[str, Weights], coefficients: Sequence[float]
) -> dict[str, torch.Tensor]:
    """base + Σ coefficient · task vector (Ilharco 2023, "Editing Models with Task Arithmetic")."""
    pairs = list(zip(SKILLS, coefficients, strict=True))
    return {
        key: value + sum((c * (weights[skill][key] - value) for skill, c in pairs), start=0 * value)
        for key, value in weights["base"].items()
    }


#: What the command line makes.
MAKER = Maker(
    "skills",
    "Make a base, five experts, their questions and task files.",
    "accuracies",
    len(SKILLS),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_skills,
    lambda folder, _settings: measure(folder),
    "accuracy, %",
    width=11,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
