"""Weights in files of ``torch.save``, read without unpickling anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.checkpoints.torch_files import read_torch_file
from mergesearch.merging.errors import CheckpointError

FORMATS = [(True, 2), (True, 4), (False, 2), (False, 4)]


def state() -> dict[str, Any]:
    """Tensors as they come: views, ties, all dtypes, and what is none."""
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    plain = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    return {
        "whole": whole,
        "tied": whole,
        "turned": whole.t(),
        "every_second": whole[1:3, ::2],
        "parameter": torch.nn.Parameter(whole),
        "expanded": torch.arange(5).expand(1, -1),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        **{str(dtype): torch.arange(3).to(dtype) for dtype in plain},
    }


def save(value: Any, file: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return file


def refusal(file: Path, key: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(file, key)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: expected a state dict as torch.save writes it, received ")
    return message


@pytest.mark.parametrize(("zipped", "protocol"), FORMATS)
def test_tensors_are_those_that_torch_reads(zipped: bool, protocol: int, tmp_path: Path) -> None:
    file = save(state() | {"steps": 3}, tmp_path / "weights.bin", zipped, protocol)
    read = read_torch_file(file)
    expected = torch.load(file, weights_only=False)
    assert read.left == ("steps",)
    assert [*read.tensors] == [name for name in expected if name != "steps"]
    for name, tensor in read.tensors.items():
        assert tensor.read().dtype == expected[name].dtype
        assert torch.equal(tensor.read(), expected[name])
        assert tensor.size == expected[name].numel() * expected[name].element_size()


def test_state_dicts_beside_other_things(tmp_path: Path) -> None:
    model = {"w": torch.ones(2)}
    average = {"w": torch.zeros(2)}
    extra = {"epoch": 3, "where": Path("x"), "state": {0: {"m": torch.ones(2)}}}
    one = save({**extra, "state_dict": model}, tmp_path / "one.ckpt")
    assert torch.equal(read_torch_file(one).tensors["w"].read(), model["w"])
    two = save({**extra, "model": model, "ema": average}, tmp_path / "two.ckpt")
    assert refusal(two).endswith("received several (there are: ema, model); name one with --key")
    assert torch.equal(read_torch_file(two, "ema").tensors["w"].read(), average["w"])
    assert "received none of the name 'best' (there are: ema, model)" in refusal(two, "best")


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(("zipped", "protocol"), FORMATS)
def test_nothing_is_executed(zipped: bool, protocol: int, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    beside = save({"a": torch.ones(2), "b": {"c": bomb}}, tmp_path / "a.pt", zipped, protocol)
    assert read_torch_file(beside).left == ("b",)
    for value in (bomb, {"a": torch.ones(2), "b": bomb}):
        file = save(value, tmp_path / "bomb.pt", zipped, protocol)
        assert "mkdir" in refusal(file)
    assert not (tmp_path / "exploded").exists()
    torch.load(beside, weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    assert "received an object of torch.nn." in refusal(
        save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    )
    assert "received no tensors" in refusal(save({"a": 1}, tmp_path / "numbers.pt"))
    assert r"received a name that cannot be printed, 'a\x1fb'" in refusal(
        save({"a\x1fb": torch.ones(2)}, tmp_path / "name.pt")
    )
    assert "received an object of list" in refusal(save([torch.ones(2)], tmp_path / "list.pt"))
    scripted = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    assert "received an archive of TorchScript" in refusal(scripted)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": np.ones(2)}))
    assert "received another pickle" in refusal(tmp_path / "plain.pkl")
    (tmp_path / "empty.bin").touch()
    assert "received an empty file" in refusal(tmp_path / "empty.bin")
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(tmp_path / "lfs.bin")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("notes.txt", "x")
    assert "received another archive" in refusal(tmp_path / "other.pt")
    assert "received an error: No such file" in refusal(tmp_path / "missing.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    file = save(state(), tmp_path / "weights.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(file) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as two:
        for member in one.infolist():
            two.writestr(member.filename, one.read(member))
    assert "received compressed 'weights/data.pkl'" in refusal(packed)


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_refused_in_one_line_or_changes_numbers_only(
    zipped: bool, tmp_path: Path
) -> None:
    data = save(state(), tmp_path / "whole.pt", zipped).read_bytes()
    rng = np.random.default_rng(0)
    names = {*state()}
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.1:
            damaged = damaged[: rng.integers(len(data))]
        file = tmp_path / "damaged.pt"
        file.write_bytes(damaged)
        try:
            read = read_torch_file(file)
        except CheckpointError:
            refused += 1
        else:
            assert len({*read.tensors} ^ names) <= 2
            assert all(tensor.read().shape == tensor.info.shape for tensor in read.tensors.values())
    assert refused > 20
