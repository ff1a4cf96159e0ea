"""Tesseract models of four fonts, which have one origin, read out of their binary and merged.

Packages `glyphive-ocrmodel-*`: the float English model of Tesseract, trained on for the letters of
one font each. Their base is not in them; the mean of the four stands for it.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergesearch import Study
from tests.real_weights.conftest import Wheels
from tests.real_weights.lettering import FONTS, Page, error_rates, render
from tests.real_weights.traineddata import read_weights, with_weights
from tests.real_weights.wheels import unpack
from tests.search.cli.test_cli import mergesearch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_weights")]

#: Split -> lines of each font, and the seed of their letters.
SPLITS = {"search": (8, 1), "validation": (8, 2), "test": (16, 3)}


@pytest.fixture(scope="module")
def models(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The four files."""
    folder = tmp_path_factory.mktemp("glyphive")
    found = {}
    for font in FONTS:
        name = f"glyphive_ocrmodel_{font}/"
        unpacked = unpack(wheels(f"glyphive-ocrmodel-{font}==0.1.0"), name, folder)
        found[font] = (unpacked / f"glyphive{font}.traineddata").read_bytes()
    return found


@pytest.fixture(scope="module")
def states(models: Mapping[str, bytes]) -> dict[str, dict[str, torch.Tensor]]:
    """Their weights."""
    return {font: read_weights(data) for font, data in models.items()}


def module_of(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module with the names and shapes of a state dict, which computes nothing."""
    root = nn.Module()
    for name in state:
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            parent = root
            *outer, last = path.split(".")
            for part in outer:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            rows, columns = state[name].shape
            parent.add_module(last, nn.Linear(columns, rows, dtype=state[name].dtype))
    return root


def mean_of(states: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    first = next(iter(states.values()))
    return {name: torch.stack([state[name] for state in states.values()]).mean(0) for name in first}


def test_weights_are_read_whole_and_written_back_to_the_bit(
    models: Mapping[str, bytes], states: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    for font, data in models.items():
        assert sum(tensor.numel() for tensor in states[font].values()) == 1_461_007
        assert with_weights(data, states[font]) == data


def test_fonts_come_from_one_base(
    states: Mapping[str, Mapping[str, torch.Tensor]], tmp_path: Path
) -> None:
    for font, state in states.items():
        save_file(dict(state), tmp_path / f"{font}.safetensors")
    for one, other in itertools.combinations(FONTS, 2):
        files = (tmp_path / f"{name}.safetensors" for name in (one, other))
        code, out, err = mergesearch("compare-weights", *files, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["kind"] == "fine-tuned"
        assert all(0.99 < role["cosine"] < 1 for role in found["roles"].values())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Page]]:
    """Blurred lines of every font, for every split."""
    if shutil.which("tesseract") is None:
        pytest.skip("tesseract is not installed (Debian: tesseract-ocr)")
    missing = [file for file in FONTS.values() if not Path(file).is_file()]
    if missing:
        pytest.skip(f"fonts are not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("pages")
    return {
        split: [
            render(folder / f"{split}-{font}.png", file, count, seed)
            for font, file in FONTS.items()
        ]
        for split, (count, seed) in SPLITS.items()
    }


def test_a_search_over_fonts(
    models: Mapping[str, bytes],
    states: Mapping[str, Mapping[str, torch.Tensor]],
    pages: Mapping[str, list[Page]],
    tmp_path: Path,
) -> None:
    """Character error rates through Tesseract itself, which reads what is merged."""
    template = models["ocrb"]
    file = tmp_path / "merged.traineddata"
    base = mean_of(states)

    def evaluate(model: nn.Module, split: str) -> list[float]:
        file.write_bytes(with_weights(template, model.state_dict()))
        return [rate for page in pages[split] for rate in error_rates(file, page)]

    study = Study(
        name="fonts",
        run=tmp_path / "run",
        base=base,
        experts=dict(states),
        evaluate=evaluate,
        model_class=lambda: module_of(base),
        objectives={"error": "minimize"},
        space={"granularity": "task"},
        budget={"trials": 24},
    )
    study.run(progress="quiet")
    print(study.summary())
    shown = json.loads(mergesearch("show", tmp_path / "run", "--json")[1])
    error = {row["name"]: row["scores"]["test"]["values"]["error"] for row in shown["result"]}
    (winner,) = (row["name"] for row in shown["result"] if row["winner"])
    assert error[winner] < max(error[f"expert {font}"] for font in FONTS)
    exported = study.export(tmp_path / "exported")
    assert exported["agrees"]
