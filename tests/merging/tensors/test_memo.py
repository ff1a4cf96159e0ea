"""Intermediate results on disk: made once, shared, and never read when damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergesearch.merging.tensors.memo
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.operators import get_operator
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.source import remembered
from tests.faults.scenario import fill, small_disk


class Counter:
    """A computation that counts how often it is done."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"numbers": torch.arange(6.0).view(2, 3).t(), "none": torch.empty(0)}


def same(one: object, other: dict[str, torch.Tensor]) -> bool:
    assert isinstance(one, dict)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)


def test_computes_once_for_a_key_and_again_for_another(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "deep" / "memo")
    compute = Counter()
    results = [memo.get(["svd", "weight", 3], compute) for _ in range(3)]
    assert compute.calls == 1
    assert all(same(result, Counter()()) for result in results)
    memo.get(["svd", "weight", 4], compute)
    assert compute.calls == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_result_is_made_again(tmp_path: Path, damage: str) -> None:
    memo = Memo(tmp_path)
    compute = Counter()
    memo.get(["key"], compute)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(
        {"flip": bytes(content), "truncate": bytes(content[:-8]), "empty": b""}[damage]
    )
    assert same(memo.get(["key"], compute), Counter()())
    assert compute.calls == 2
    assert same(memo.get(["key"], compute), Counter()())
    assert compute.calls == 2


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Memo(tmp_path).get(["key"], fail)
    assert list(tmp_path.iterdir()) == []


def test_results_are_given_where_the_disk_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as small:
        if not small:
            pytest.skip("needs the right to mount a file system")
        fill(tmp_path / "disk")
        compute = Counter()
        memo = Memo(tmp_path / "disk")
        assert all(same(memo.get(["key"], compute), Counter()()) for _ in range(2))
        assert compute.calls == 2
        assert [file.name for file in (tmp_path / "disk").iterdir()] == ["filler"]


def test_results_are_given_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert same(Memo(tmp_path / "file" / "memo").get(["key"], Counter()), Counter()())


@pytest.fixture
def sources(tmp_path: Path) -> Callable[[], tuple[Checkpoint, list[Checkpoint]]]:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two"):
        state = {"layers.0.weight": torch.randn(40, 30, generator=generator)}
        save_file(state, tmp_path / f"{name}.safetensors")

    def opened() -> tuple[Checkpoint, list[Checkpoint]]:
        memo = Memo(tmp_path / "memo")
        base, *experts = (
            open_checkpoint(str(tmp_path / f"{n}.safetensors"), n, memo)
            for n in ("base", "one", "two")
        )
        return base, experts

    return opened


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[object]]:
    """The keys under which something is worked out from now on."""
    keys: list[Sequence[object]] = []
    save = mergesearch.merging.tensors.memo._save

    def saved(tensors: mergesearch.merging.tensors.memo.Tensors, path: Path) -> None:
        keys.append(sorted(tensors))
        save(tensors, path)

    monkeypatch.setattr("mergesearch.merging.tensors.memo._save", saved)
    return keys


@pytest.mark.parametrize(
    ("operator", "first", "then"),
    [
        ("tsv", {}, {"others": "base"}),
        ("iso_cts", {"common": 0.8}, {"common": 0.5}),
        ("wudi", {}, {"time": 10.0, "keep": 0.9}),
        ("knots", {"inner": "task_arithmetic"}, {"inner": "ties", "density": 0.4}),
    ],
)
def test_other_hyperparameters_share_the_decompositions(
    sources: Callable[[], tuple[Checkpoint, list[Checkpoint]]],
    monkeypatch: pytest.MonkeyPatch,
    operator: str,
    first: dict[str, object],
    then: dict[str, object],
) -> None:
    chosen = get_operator(operator)
    made = counted(monkeypatch)
    for options, expected in ((first, True), (then, False)):
        before = len(made)
        base, experts = sources()
        chosen.prepare(base, experts, **chosen.complete(options)).rows("layers.0.weight")
        assert (len(made) > before) == expected


def test_densities_of_ties_share_the_first_read(
    sources: Callable[[], tuple[Checkpoint, list[Checkpoint]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = get_operator("ties")
    made = counted(monkeypatch)
    for density in (0.2, 0.5):
        base, experts = sources()
        chosen.prepare(base, experts, **chosen.complete({"density": density})).rows(
            "layers.0.weight"
        )
    # One histogram for each expert, and for each density and expert a threshold.
    assert sorted(map(tuple, made)) == [("counts", "kind")] * 2 + [("model",)] * 4


def test_without_a_memo_or_an_identity_nothing_is_kept() -> None:
    class Source:
        name = "x"
        names = ("w",)
        memo = None
        identity = ""

        def shape(self, name: str) -> tuple[int, ...]:
            raise AssertionError

        def read(self, name: str) -> torch.Tensor:
            raise AssertionError

    compute = Counter()
    for _ in range(2):
        remembered([Source()], ["key"], compute)
    assert compute.calls == 2
