"""Questions to models without a chat template, which are encoder-decoders too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.images.questions import plain
from mergesearch.merging import InputError
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.vocabulary import SIDE, save_processor
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.pairs import seeded


def picture() -> Any:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def section(folder: Path, answer: str, **options: Any) -> dict[str, Any]:
    """One question about one picture in every split, with its right answer."""
    import pyarrow as pa
    from pyarrow import parquet

    stream = io.BytesIO()
    picture().save(stream, format="png")
    (folder / "items").mkdir()
    for split in ("search", "validation", "test"):
        row = {"image": stream.getvalue(), "question": "what is", "answer": answer, "id": split}
        parquet.write_table(pa.Table.from_pylist([row]), folder / "items" / f"{split}.parquet")
    return {
        "kind": "visual_questions",
        "data": str(folder / "items"),
        "answer": "answer",
        "id": "id",
        "tokenizer": str(folder / "processor"),
        "max_new_tokens": 3,
        **options,
    }


@pytest.mark.parametrize("name", ["blip2", "florence2"])
def test_the_answer_is_all_that_an_encoder_decoder_writes(name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    save_processor(tmp_path / "processor", name)
    processor = AutoProcessor.from_pretrained(tmp_path / "processor")
    batch = processor(text=["what is it"], images=[[picture()]], return_tensors="pt")
    answer = ""
    for seed in range(20):  # some say nothing
        model = seeded(ARCHITECTURES[name].build, seed)
        rows = model.generate(**batch, max_new_tokens=3, do_sample=False)
        [answer] = processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        if plain(answer):
            break
    assert plain(answer)

    evaluator = opened(section(tmp_path, answer, prompt="{} it"))
    assert evaluator.evaluate(candidate_at([0.0], model), "search").values == {"accuracy": 1.0}


def test_prompts_that_cannot_be_said(tmp_path: Path) -> None:
    save_processor(tmp_path / "processor", "blip2")
    written = section(tmp_path, "red")
    with pytest.raises(InputError, match=r"add its chat_template.jinja, or set .*\.prompt"):
        build(written).check()
    with pytest.raises(ValueError, match=r"expected \{\} once, where the question goes"):
        build(written | {"prompt": "what"})
    with pytest.raises(ValueError, match=r"expected accuracy beside prompt"):
        build(written | {"prompt": "{}", "objectives": [{"metric": "cross_entropy"}]})
