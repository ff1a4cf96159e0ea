"""What models make for judges: texts of a language model, and what a user's function returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators
from mergesearch.merging import InputError, MergesearchError
from tests.evaluators.items import candidate_at, opened
from tests.evaluators.texts import text_folder, text_llama

#: One of each kind that a function may return.
MAKER = """
import io
from pathlib import Path
import numpy as np
from PIL import Image

def pictures(model, prompts, seed, tint=0):
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise + np.uint8(tint))
    image.save(PATH)
    data = io.BytesIO()
    image.save(data, format="JPEG")
    return [[image, Path(PATH), data.getvalue(), prompt.upper()][n % 4] for n, prompt in
            enumerate(prompts)]

def one(model, prompts):
    return "a text"

def few(model, prompts):
    return prompts[:-1]

def odd(model, prompts):
    return [b"<svg/>"] * len(prompts)

def alone(model):
    return []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = text_folder(tmp_path_factory.mktemp("texts"))
    path = folder / "maker.py"
    path.write_text(MAKER.replace("PATH", repr(str(folder / "picture.png"))))
    return folder


def section(folder: Path, **options: Any) -> dict[str, Any]:
    own = {"tokenizer": str(folder / "tokenizer"), "max_new_tokens": 5}
    if "function" in options:
        own = {"function": f"{folder / 'maker.py'}:{options.pop('function')}"}
    return {"kind": "preference", "data": "texts", "domain": "domain", "choices": 5} | own | options


class Model:
    """Stands in for a merged model, which the functions here do not use."""

    def eval(self) -> Model:
        return self


def outputs(folder: Path, model: Any, **options: Any) -> list[Any]:
    evaluator = opened(section(folder, **options), folder=folder)
    measured = evaluator.evaluate(candidate_at([1], model), "search")
    return list(measured.exhibits["preference"].outputs)


def test_texts_are_those_of_the_generation_evaluator(folder: Path) -> None:
    from transformers import AutoTokenizer

    model = text_llama()
    made = outputs(folder, model)
    assert len(made) == 5
    assert outputs(folder, model, batch_size=2) == made
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for output in made:
        ids = tokenizer(output.prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        own = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert output.content.decode() == own


def test_a_function_makes_pictures_and_texts_of_the_same_prompts(folder: Path) -> None:
    made = outputs(folder, Model(), function="pictures")
    assert [output.kind for output in made] == ["png", "png", "jpeg", "text", "png"]
    assert [o.prompt for o in made] == [o.prompt for o in outputs(folder, text_llama())]
    assert outputs(folder, Model(), function="pictures") == made
    for changed in ({"seed": 1}, {"inputs": {"tint": 9}}):
        assert outputs(folder, Model(), function="pictures", **changed)[0] != made[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one", "expected a list of 5 outputs, one for each prompt, received str"),
        ("few", "expected a list of 5 outputs, one for each prompt, received 4"),
        ("odd", "expected a text, an image of Pillow, or the path or bytes of a PNG"),
    ],
)
def test_what_is_no_output_is_refused(folder: Path, function: str, message: str) -> None:
    with pytest.raises(MergesearchError, match=message):
        outputs(folder, Model(), function=function)


def test_a_function_that_takes_no_prompts_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="expected a function of a model, a list of prompts"):
        opened(section(folder, function="alone"), folder=folder)


def test_every_split_needs_a_prompt_for_each_choice(folder: Path) -> None:
    [spec] = parse_evaluators([section(folder, choices=9)])
    with pytest.raises(InputError, match="choices: expected at most 8, the number of search"):
        build_evaluator([spec], folder).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "one", "max_new_tokens": 8}, "max_new_tokens: expected a causal"),
        ({"seed": 3}, "seed: expected a function beside it"),
        ({"model_class": "AutoModel"}, "model_class: expected a function beside it"),
        ({"system_prompt": "Be kind."}, "system_prompt: expected chat_template: true"),
        ({"choices": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_evaluators([section(folder, **options)])
