"""The base among models: by what they say, by their class, by their weights, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.search.init.finding_base import Origin, find_base, unique_names
from tests.search.conftest import write_checkpoint


def models(folder: Path, shared: float = 0.0, count: int = 2) -> list[Path]:
    """A base ``b`` and experts whose changes have a part in common."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(64, 64, generator=generator)

    base = noise()
    common = noise()
    made = [
        write_checkpoint(
            folder / f"expert{index}",
            {"layers.0.mlp.weight": base + 0.1 * (noise() + shared * common)},
        )
        for index in range(count)
    ]
    return [write_checkpoint(folder / "b", {"layers.0.mlp.weight": base}), *made]


def found(paths: list[Path], base: str | None = None) -> Origin:
    return find_base([open_checkpoint(str(path)) for path in paths], base)


@pytest.mark.parametrize("count", [2, 4])
def test_by_weights(tmp_path: Path, count: int) -> None:
    base, *experts = models(tmp_path, 0.3, count)
    origin = found([base, *experts] if count == 2 else [*experts, base])
    assert origin.base.name == "b"
    assert origin.reason.startswith("told from the weights")
    assert sorted(expert.name for expert in origin.experts) == [
        f"expert{index}" for index in range(count)
    ]


def test_experts_alone_are_not_taken_for_a_base(tmp_path: Path) -> None:
    paths = models(tmp_path, 0.0, 4)
    with pytest.raises(InputError, match="nothing tells that it is the base"):
        found([path for path in paths if path.name != "b"])
    with pytest.raises(InputError, match="nothing tells that it is the base"):
        found(models(tmp_path / "near", 2.0))


def test_by_the_card_and_by_name(tmp_path: Path) -> None:
    base, expert, other = models(tmp_path)
    (expert / "README.md").write_text(f"---\nbase_model: {base}\n---\nA poet.")
    assert found([expert, base]).reason == "its experts name it as their origin"
    assert found([expert]).base.path == str(base)
    assert found([base, expert, other], str(expert)).base.path == str(expert)


def test_the_model_of_adapters(pico_models: Path) -> None:
    adapters = [pico_models / "adapters" / name for name in ("left", "right")]
    alone = found(adapters)
    assert alone.base.path == str(pico_models / "base")
    assert len(alone.experts) == 2
    assert len(found([pico_models / "base", *adapters]).experts) == 2


@pytest.mark.parametrize(
    ("names", "base"),
    [
        (("base", "poet"), "base"),
        (("poet", "bert-base", "critic"), "bert-base"),
        (("llama-8b-chat", "llama-8b", "llama-8b-code"), "llama-8b"),
    ],
)
def test_by_name(tmp_path: Path, names: tuple[str, ...], base: str) -> None:
    weights = {"w": torch.ones(2, 2)}
    origin = found([write_checkpoint(tmp_path / name, weights) for name in names])
    assert origin.base.name == base
    assert origin.reason.startswith("told from ")


def test_an_expert_on_the_way_to_another_is_not_taken_for_the_base(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base, near, far = (torch.randn(64, 64, generator=generator) for _ in range(3))
    # Cosines: 0.6 from the base, 0.2 from the nearer expert, whose change is 0.8 as large.
    far_change = 0.1 * near
    near_change = 0.08 * (0.6 * near + 0.8 * far)
    weights = {"a": base, "b": base + near_change, "c": base + far_change}
    paths = [write_checkpoint(tmp_path / name, {"w": value}) for name, value in weights.items()]
    with pytest.raises(InputError, match="nothing tells that it is the base"):
        found(paths)


def test_names_are_unique() -> None:
    assert unique_names(["a/model", "b/model", "c"], ["", "", ""]) == ["a-model", "b-model", "c"]
    assert unique_names(["a/model", "b/model"], ["poet", ""]) == ["poet", "model"]
    with pytest.raises(InputError, match="received 'x' twice"):
        unique_names(["a", "b"], ["x", "x"])
