"""Makes the zoo of models of several shapes: a Llama, and two sources that it could not merge with.

``python -m experiments.zoo.shapes [--out zoo/shapes] [--seed 0] [--measure]``

The pivot (a Llama with a byte-level BPE tokenizer of all languages) knows one well and two a
little. Each source knows one of these two well: a GPT-2 with a byte-level tokenizer of its own, and
a GPT-NeoX with a unigram tokenizer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.zoo.building import Maker, build_beside, holds, make_zoo, write_manifest
from experiments.zoo.shapes_data import HOME, LANGUAGES, LENGTH, exact_losses, texts

#: Raised when the same settings begin to mean another zoo.
FORMAT = 1
SPLITS = ("search", "validation", "test")
#: Tokens of a text at most, with the first.
TOKENS = 96
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What the zoo follows from.

    Attributes:
        seed: Seed of texts, initial weights and batches.
        steps: Of training of the pivot and of each source.
        hints: Texts of each foreign language that the pivot is trained on.
        transfer: Texts of each foreign language to distil on.
        items: Texts of every language in each split.
        width: Of all models.
    """

    seed: int = 0
    steps: int = 250
    hints: int = 150
    transfer: int = 160
    items: int = 200
    width: int = 64


def build_shapes(out: Path = Path("zoo/shapes"), settings: Settings | None = None) -> Path:
    """Make the zoo in ``out``, or reuse it if it is there with the same settings.

    Raises:
        InputError: If ``out`` is something else than a zoo.
    """
    chosen = settings or Settings()
    build_beside(
        out, "shapes", lambda: is_complete(out, chosen), lambda fresh: _write(fresh, chosen)
    )
    return out


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether ``out`` holds the zoo of ``settings``."""
    return holds(out, FORMAT, settings)


def _write(folder: Path, settings: Settings) -> None:
    """Train and save everything; the manifest comes last."""
    started = time.perf_counter()
    _save_data(folder, settings)
    for index, (name, shape) in enumerate(SHAPES.items()):
        seed = [settings.seed, 1, index]
        if name == "pivot":
            found = texts(HOME, 3000, seed)
            for foreign in LANGUAGES:
                found += texts(foreign, settings.hints, seed)
        else:
            found = texts(name, 6000, seed)
        tokenizer = shape.tokenizer([*found[:2000], *texts_of_all(seed, name)])
        model = shape.model(len(tokenizer), settings)
        _train(model, tokenizer, found, settings, index)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_manifest(folder, FORMAT, settings, started)


def texts_of_all(seed: Sequence[int], name: str) -> list[str]:
    """Texts from which the pivot's tokenizer learns the words of all languages; none for others."""
    if name != "pivot":
        return []
    return [text for foreign in LANGUAGES for text in texts(foreign, 1000, seed)]


def _save_data(folder: Path, settings: Settings) -> None:
    """Three splits of every language as a ``datasets`` folder, and texts to distil on."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for name in (HOME, *LANGUAGES):
        made = {}
        for index, split in enumerate(SPLITS):
            rows = texts(name, settings.items, [settings.seed, 2, index])
            made[split] = datasets.Dataset.from_dict({"text": rows})
        datasets.DatasetDict(made).save_to_disk(str(folder / "data" / name))
        rows = texts(name, settings.transfer, [settings.seed, 3])
        (folder / "transfer").mkdir(exist_ok=True, parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / "transfer" / f"{name}.jsonl").write_text(lines)
    if not silenced:
        datasets.enable_progress_bars()


def byte_tokenizer(found: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of some texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(found), trainer)
    return _fast(tokenizer)


def unigram_tokenizer(found: Sequence[str], size: int) -> Any:
    """A unigram tokenizer with ▁ for spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(found), trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=TOKENS,
    )


def _llama(tokens: int, settings: Settings) -> Any:
    return _made(
        "Llama",
        settings,
        vocab_size=tokens,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )


def _gpt2(tokens: int, settings: Settings) -> Any:
    return _made(
        "GPT2",
        settings,
        "GPT2LMHeadModel",
        vocab_size=tokens,
        n_embd=settings.width,
        n_layer=2,
        n_head=2,
        n_positions=TOKENS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _neox(tokens: int, settings: Settings) -> Any:
    return _made(
        "GPTNeoX",
        settings,
        vocab_size=tokens,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )


def _made(family: str, settings: Settings, model: str = "", **options: Any) -> Any:
    """A model of a family with initial weights that follow from the seed."""
    import torch
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**options, **special)
    # transformers draws initial weights from the global generator and takes no other; the fork
    # gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return getattr(transformers, model or f"{family}ForCausalLM")(config)


def _train(
    model: Any, tokenizer: Any, found: Sequence[str], settings: Settings, index: int
) -> None:
    """Train with AdamW on random batches of 32 texts."""
    import torch

    rng = np.random.default_rng([settings.seed, 4, index])
    rows = [torch.tensor([1, *ids]) for ids in tokenizer(list(found))["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    pad = torch.nn.utils.rnn.pad_sequence
    model.train()
    for step in range(settings.steps):
        share = min(1.0, (step + 1) / 20) * (1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * share
        batch = [rows[one] for one in rng.integers(len(rows), size=32)]
        loss = model(
            input_ids=pad(batch, batch_first=True),
            labels=pad(batch, batch_first=True, padding_value=IGNORED),
            use_cache=False,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@dataclass(frozen=True)
class Shape:
    """How a model of the zoo is made.

    Attributes:
        tokenizer: Of its texts.
        model: Of a number of tokens.
    """

    tokenizer: Callable[[Sequence[str]], Any]
    model: Callable[[int, Settings], Any]


#: Name -> shape; a source is called as its language.
SHAPES: Mapping[str, Shape] = {
    "pivot": Shape(lambda found: byte_tokenizer(found, 560), _llama),
    "hill": Shape(lambda found: byte_tokenizer(found, 400), _gpt2),
    "shore": Shape(lambda found: unigram_tokenizer(found, 160), _neox),
}


def word_losses(model: Any, tokenizer: Any, found: Sequence[str]) -> list[float]:
    """Loss of a model on each text, in nats per word, which does not depend on its tokens."""
    import torch

    losses = []
    with torch.inference_mode():
        for ids in tokenizer(list(found))["input_ids"]:
            row = torch.tensor([[1, *ids]])
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            total = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            losses.append(float(total) / LENGTH)
    return losses


def load(folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def split_texts(folder: Path, name: str, split: str) -> list[str]:
    """Texts of a split of a language."""
    from datasets import load_from_disk

    return list(load_from_disk(str(folder / "data" / name / split))["text"])


def measure(folder: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Nats per word, over 100, of every model on every language, and of who knows the tables."""
    found = {name: split_texts(folder, name, split) for name in (HOME, *LANGUAGES)}
    rows = {}
    for shape in SHAPES:
        model, tokenizer = load(folder / shape)
        rows[shape] = {
            name: float(np.mean(word_losses(model, tokenizer, own))) / 100
            for name, own in found.items()
        }
    rows["exact"] = {
        name: float(np.mean(exact_losses(name, own))) / 100 for name, own in found.items()
    }
    return rows


#: What the command line makes.
MAKER = Maker(
    "shapes",
    "Make a pivot, two sources of other shapes, and texts of three made languages.",
    "losses",
    len(LANGUAGES),
    lambda seed: Settings(seed=seed),
    is_complete,
    build_shapes,
    lambda folder, _settings: measure(folder),
    "nats per word",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    make_zoo(MAKER, arguments)


if __name__ == "__main__":
    main()
