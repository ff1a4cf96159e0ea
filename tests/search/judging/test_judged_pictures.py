"""Pictures of a diffusers pipeline around each merged denoiser, judged over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.denoisers import DENOISERS, INSTALLED
from tests.architectures.evaluations import EXPERTS
from tests.architectures.trial import make_family
from tests.search.judging.test_judged_study import lines, run_judged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="needs diffusers"),
]

#: A prompt is the number of a class, which is what this kind of pipeline draws.
DRAW = """
def pictures(model, prompts, seed, steps):
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4).eval()
    draw = DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler())
    draw.set_progress_bar_config(disable=True)
    return [
        draw(
            [int(prompt)],
            guidance_scale=1.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for prompt in prompts
    ]
"""


def test_pictures_of_a_pipeline_are_judged(tmp_path: Path) -> None:
    from PIL import Image

    make_family(DENOISERS["diffusers_dit"], tmp_path)
    (tmp_path / "draw.py").write_text(DRAW)
    rows = [
        {"prompt": str(number), "split": split}
        for number, split in enumerate(
            ("search", "search", "validation", "validation", "test", "test")
        )
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data: dict[str, Any] = {
        "name": "pictures",
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in EXPERTS},
        "allow_code": True,
        "anchors": "none",
        "space": {"granularity": "global"},
        "strategy": "sobol",
        "evaluators": [
            {
                "kind": "preference",
                "data": {"file": str(tmp_path / "prompts.jsonl"), "split": "split"},
                "choices": 2,
                "question": "Which picture is better?",
                "function": str(tmp_path / "draw.py") + ":pictures",
                "inputs": {"steps": 2},
            }
        ],
        "budget": {"trials": 2},
        "selection": {"leaders": 1, "repeats": 0},
    }
    folder = tmp_path / "run"
    run, views = run_judged(data, folder)
    assert run is not None
    assert len(views) == len(lines(folder, "choice")) > 0
    for view in views:
        for side in ("left", "right"):
            assert view[side]["kind"] == "png"
            content = (folder / "judging" / view[side]["text"]).read_bytes()
            assert Image.open(io.BytesIO(content)).size == (8, 8)
