"""Packs: what they hold, what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.packing import PackSettings, pack_experts
from mergesearch.merging.export.restoring import recipe_from_pack, restore_expert
from mergesearch.merging.recipe_file import load_recipe
from tests.merging.lineage import twins

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 (tied embeddings, vectors) and three experts of it."""
    folder = tmp_path_factory.mktemp("zoo")
    base = twins.build("gpt2", 1).state_dict()
    twins.save(folder / "base", "gpt2", base)
    for seed, name in enumerate(NAMES):
        twins.save(folder / name, "gpt2", twins.changed(base, twins.fine_tuned, seed))
    return folder


def _pack(zoo: Path, out: Path, settings: PackSettings, names: tuple[str, ...] = NAMES) -> object:
    paths = {name: str(zoo / name) for name in names}
    return pack_experts(str(zoo / "base"), paths, out, settings)


def _numbers(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(str(path))
    return {n: checkpoint.read(n).double().numpy() for n in checkpoint.merged}


def test_masks_are_those_of_the_paper_in_a_bit_each(zoo: Path, tmp_path: Path) -> None:
    pack = _pack(zoo, tmp_path / "pack", PackSettings(thresholds={"two": 0.6}))
    base = _numbers(zoo / "base")
    experts = {name: _numbers(zoo / name) for name in NAMES}
    stored = load_file(tmp_path / "pack" / "pack.safetensors")
    for name, threshold in zip(NAMES, (0.4, 0.6, 0.4), strict=True):
        given = _numbers(tmp_path / "pack" / name)
        for tensor, origin in base.items():
            total = sum(experts[one][tensor] - origin for one in NAMES)
            own = experts[name][tensor] - origin
            mask = np.abs(own) > threshold * np.abs(total - own)
            wanted = origin + np.where(mask, total, 0)
            # Numbers next to the threshold may fall on either side in fp32.
            near = np.abs(given[tensor] - wanted) < 1e-5
            assert near.mean() > 0.999
    size = sum(array.size for array in base.values())
    bits = sum(stored[f"mask/{tensor}"].size for tensor in base)
    assert bits <= len(NAMES) * (size / 8 + len(base))
    assert sum(stored[f"sum/{tensor}"].size for tensor in base) == size
    files = [path for path in (tmp_path / "pack").rglob("*") if path.is_file()]
    assert pack.size == sum(path.stat().st_size for path in files)
    assert set(pack.forms) == {"masked"}


def test_a_single_masked_expert_comes_back_whole(zoo: Path, tmp_path: Path) -> None:
    pack = _pack(zoo, tmp_path / "pack", PackSettings(), ("one",))
    assert pack.forms.keys() <= {"masked", "whole"}
    given = _numbers(tmp_path / "pack" / "one")
    for name, wanted in _numbers(zoo / "one").items():
        np.testing.assert_allclose(given[name], wanted, atol=1e-6)


def test_low_rank_loses_what_the_singular_values_say(zoo: Path, tmp_path: Path) -> None:
    pack = _pack(zoo, tmp_path / "pack", PackSettings(rank=4))
    base = _numbers(zoo / "base")
    expert = _numbers(zoo / "two")
    given = _numbers(tmp_path / "pack" / "two")
    lost = 0.0
    whole = 0.0
    for name, form in json.loads((tmp_path / "pack" / "pack.json").read_text())["forms"].items():
        change = expert[name] - base[name]
        whole += float(np.sum(change**2))
        if form == "whole":
            np.testing.assert_array_equal(given[name], expert[name])
            continue
        tail = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)[4:]
        missing = float(np.sum((given[name] - expert[name]) ** 2))
        assert missing == pytest.approx(float(np.sum(tail**2)), rel=1e-3)
        lost += missing
    assert pack.errors["two"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert set(pack.forms) == {"whole", "factors"}


def test_a_basis_of_all_directions_loses_nothing_and_one_of_fewer_does(
    zoo: Path, tmp_path: Path
) -> None:
    """Exact from K − 1 directions on (Alipour and Amiri 2025)."""
    factors = _pack(zoo, tmp_path / "factors", PackSettings(rank=4))
    both = _pack(zoo, tmp_path / "both", PackSettings(rank=4, directions=2))
    single = _pack(zoo, tmp_path / "single", PackSettings(rank=4, directions=1))
    assert both.forms["basis"] > 3
    for name in NAMES:
        assert both.errors[name] == pytest.approx(factors.errors[name], rel=1e-3)
        assert single.errors[name] > 1.02 * factors.errors[name]
    with pytest.raises(InputError, match="expected at most 2"):
        _pack(zoo, tmp_path / "more", PackSettings(rank=4, directions=3))


def test_an_expert_is_restored_as_a_model_of_its_own(zoo: Path, tmp_path: Path) -> None:
    _pack(zoo, tmp_path / "pack", PackSettings(rank=64))
    restored = restore_expert(tmp_path / "pack", "three", tmp_path / "three")
    assert restored.expert.error < 1e-5
    assert (tmp_path / "three" / "config.json").read_text() == (
        zoo / "three" / "config.json"
    ).read_text()
    answers = []
    for path in (tmp_path / "three", zoo / "three"):
        stored = open_checkpoint(str(path))
        model = twins.build("gpt2", 0)
        model.load_state_dict({n: stored.read(n) for n in stored.tensors}, strict=False)
        with torch.no_grad():
            answers.append(model(twins.TOKENS)[0])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="--expert: expected one of"):
        restore_expert(tmp_path / "pack", "four", tmp_path / "four")


def test_a_merge_of_a_pack_is_the_merge_of_what_it_restores(zoo: Path, tmp_path: Path) -> None:
    _pack(zoo, tmp_path / "pack", PackSettings())
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {zoo / 'base'}\noperator: ties\ncoefficients: 0.7\n"
        f"experts: {{two: {zoo / 'two'}, one: {zoo / 'one'}}}\n"
    )
    merge = recipe_from_pack(load_recipe(file), tmp_path / "pack")
    export_model(merge, tmp_path / "merged")
    for name in ("one", "two"):
        restore_expert(tmp_path / "pack", name, tmp_path / name)
    file.write_text(file.read_text().replace(f": {zoo}/two", f": {tmp_path}/two"))
    file.write_text(file.read_text().replace(f": {zoo}/one", f": {tmp_path}/one"))
    export_model(load_recipe(file), tmp_path / "by hand")
    fingerprints = [
        open_checkpoint(str(tmp_path / name)).fingerprint() for name in ("merged", "by hand")
    ]
    assert fingerprints[0] == fingerprints[1]
    file.write_text(file.read_text().replace("{two:", "{other:"))
    with pytest.raises(RecipeError, match="expected experts of the pack"):
        recipe_from_pack(load_recipe(file), tmp_path / "pack")


def test_shards_hold_the_same(zoo: Path, tmp_path: Path) -> None:
    paths = {name: str(zoo / name) for name in NAMES}
    settings = PackSettings(rank=4)
    pack_experts(str(zoo / "base"), paths, tmp_path / "one file", settings)
    pack_experts(str(zoo / "base"), paths, tmp_path / "shards", settings, shard_bytes=40_000)
    assert len([*(tmp_path / "shards").glob("pack-*.safetensors")]) > 2
    first = _numbers(tmp_path / "one file" / "two")
    for name, numbers in _numbers(tmp_path / "shards" / "two").items():
        np.testing.assert_array_equal(numbers, first[name])


def test_a_pack_that_does_not_fit_is_refused_in_one_line(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    _pack(zoo, out, PackSettings())
    with pytest.raises(CheckpointError, match="received a pack of"):
        open_checkpoint(str(out))
    manifest = json.loads((out / "pack.json").read_text())
    for change, message in (
        ({"format": 9}, "which this version reads"),
        ({"forms": dict.fromkeys(manifest["forms"], "folded")}, "expected forms"),
        ({"base": {"path": str(tmp_path / "gone"), "fingerprint": ""}}, "missing path"),
        ({"rank": "4"}, "a whole number"),
        ({"forms": dict.fromkeys(manifest["forms"], "whole")}, "pack it again"),
        ({"experts": manifest["experts"][:1]}, "expected one of its experts"),
    ):
        (out / "pack.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(out / "two"))
    other = {"path": str(zoo / "one"), "fingerprint": manifest["base"]["fingerprint"]}
    (out / "pack.json").write_text(json.dumps(manifest | {"base": other}))
    with pytest.raises(CheckpointError, match="expected the base that"):
        restore_expert(out, "two", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
