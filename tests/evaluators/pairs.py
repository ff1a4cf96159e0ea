"""Small encoder-decoders, encoders and recognisers, and their items in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluators.items import DOMAINS
from tests.evaluators.language import make_tokenizer, sentence

#: Samples of a recording at least.
SAMPLES = 400
#: Bands of a frame.
BANDS = 8


def pair_rows(count: int = 30) -> list[dict[str, Any]]:
    """Rows for every kind of evaluator of pairs and of audio."""
    rng = np.random.default_rng([5, 41])
    rows = []
    for index in range(count):
        one, two = (" ".join([*sentence(rng, int(rng.integers(2, 6))), f"x{index}"]) for _ in "ab")
        rows.append(
            {
                "text": one,
                "target": two,
                "pair": two,
                "query": one,
                "document": two,
                "chosen": one,
                "rejected": two,
                "score": float(rng.uniform(0, 5)),
                "audio": rng.standard_normal(SAMPLES + 40 * (index % 3)).round(4).tolist(),
                "label": int(rng.integers(3)),
                "domain": DOMAINS[index % 2],
                "id": str(index),
            }
        )
    return rows


def pair_folder(folder: Path, count: int = 30) -> Path:
    """``pairs.jsonl``, ``tokenizer`` and ``letters`` in ``folder``."""
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pair_rows(count)))
    make_tokenizer(folder / "tokenizer")
    letter_tokenizer(folder / "letters")
    return folder


def letter_tokenizer(folder: Path) -> Any:
    """A tokenizer of single letters for connectionist temporal classification."""
    from transformers import Wav2Vec2CTCTokenizer

    letters = ["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None,
        eos_token=None,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def seeded(make: Callable[[], Any], seed: int, std: float = 0.4) -> Any:
    """A model from a seed of its own, with weights that make its answers differ."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model


def pico_t5(seed: int = 0) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return seeded(lambda: T5ForConditionalGeneration(config), seed)


def pico_encoder(seed: int = 0) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    return seeded(lambda: BertModel(config), seed)


def pico_wav2vec(task: str, seed: int = 0) -> Any:
    """A Wav2Vec2 of one block with ``ctc`` or three classes as its head."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2ForCTC,
        Wav2Vec2ForSequenceClassification,
    )

    config = Wav2Vec2Config(
        vocab_size=39, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(8, 8),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, pad_token_id=0,
        classifier_proj_size=8, mask_time_prob=0.0,
    )  # fmt: skip
    made = {"ctc": Wav2Vec2ForCTC, "classes": Wav2Vec2ForSequenceClassification}[task]
    return seeded(lambda: made(config), seed)


def pico_whisper(seed: int = 0) -> Any:
    """A Whisper of one block that reads 20 frames of 8 bands."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=BANDS,
        max_source_positions=10, max_target_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return seeded(lambda: WhisperForConditionalGeneration(config), seed)


def spoken_rows(count: int = 15) -> list[dict[str, Any]]:
    """Recordings that are long enough for their texts, as samples and as frames."""
    rng = np.random.default_rng([6, 41])
    return [
        {
            "text": f"{'ab' * (1 + index % 3)} x{index}",
            "audio": rng.standard_normal(1600 + 300 * (index % 3)).round(4).tolist(),
            "frames": rng.standard_normal((BANDS, 20)).round(4).tolist(),
            "id": str(index),
        }
        for index in range(count)
    ]
