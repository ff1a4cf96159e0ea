"""Distillations end to end, with models of three shapes and as many tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.distillation.distilling import RECORD, distill, divided
from mergesearch.merging.distillation.settings import Settings
from mergesearch.merging.distillation.training import losses
from tests.merging.distillation.models import save_models

SHORT = Settings(steps=8, batch=4, rate=1e-2, rank=4, length=24, text_weight=0.5, held_out=0.2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("shapes")
    return folder, save_models(folder)


def run(zoo: tuple[Path, list[str]], out: Path, *sources: str, **more: object) -> object:
    folder, texts = zoo
    paths = [str(folder / name) for name in sources or ("hill", "shore")]
    return distill(str(folder / "pivot"), paths, texts, out, SHORT, **more)  # type: ignore[arg-type]


def test_a_stopped_distillation_goes_on_to_the_same_model_in_the_shape_of_the_pivot(
    zoo: tuple[Path, list[str]], tmp_path: Path
) -> None:
    steps = []
    done = run(zoo, tmp_path / "whole", report=lambda step, *_: steps.append(step))
    assert steps == list(range(1, 9))

    def stop(step: int, *_: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(zoo, tmp_path / "stopped", report=stop)
    assert not (tmp_path / "stopped").exists()
    later: list[int] = []
    run(zoo, tmp_path / "stopped", report=lambda step, *_: later.append(step))
    assert later == [5, 6, 7, 8]
    one = load_file(tmp_path / "whole" / "model.safetensors")
    two = load_file(tmp_path / "stopped" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    pivot = open_checkpoint(str(zoo[0] / "pivot"))
    made = open_checkpoint(str(tmp_path / "whole"))
    assert {name: (i.shape, i.dtype) for name, i in made.tensors.items()} == {
        name: (i.shape, i.dtype) for name, i in pivot.tensors.items()
    }
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    assert done.gain[0] > done.gain[1] > 0  # type: ignore[attr-defined]
    assert all(0 < one <= 1 for one in done.covered)  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "whole" / RECORD).read_text())
    assert record["after"] < record["before"]
    assert not [*tmp_path.glob(".*")]  # nothing is left beside


@pytest.mark.slow
def test_an_adapter_is_what_a_checkpoint_opens(zoo: tuple[Path, list[str]], tmp_path: Path) -> None:
    run(zoo, tmp_path / "adapter", "shore", adapter=True)
    opened = open_checkpoint(f"{zoo[0] / 'pivot'}+{tmp_path / 'adapter'}")
    pivot = open_checkpoint(str(zoo[0] / "pivot"))
    changed = [n for n in pivot.tensors if not torch.equal(opened.read(n), pivot.read(n))]
    assert len(changed) == 14  # the seven linear layers of both blocks


def test_the_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": torch.tensor([[1, 3, 0]]),
        "mask": torch.tensor([[1, 1, 0]]),  # the last is padding
        "ids": torch.tensor([[[1, 2], [3, 0], [0, 0]]]),
        "shares": torch.tensor([[[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]]]),
    }
    nats = -logits.log_softmax(-1)[0]
    own = (nats[0, 1] + nats[1, 3]) / 2
    fused = (0.25 * nats[0, 1] + 0.75 * nats[0, 2] + nats[1, 3]) / 2
    torch.testing.assert_close(losses(logits, batch, 0.9), 0.9 * own + 0.1 * fused)


def test_what_is_held_out_follows_from_the_seed() -> None:
    texts = [f"text {n}" for n in range(20)] + ["  "]
    kept, held = divided(texts, Settings(held_out=0.25))
    assert (len(kept), len(held)) == (15, 5)
    assert sorted([*kept, *held]) == sorted(texts[:20])
    assert divided(texts, Settings(held_out=0.25)) == (kept, held)
    with pytest.raises(InputError, match=r"expected at least 21 texts .* received 20; give more"):
        divided(texts, Settings(held_out=0.25, batch=16))
