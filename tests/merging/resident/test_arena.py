"""Arenas: written once, whole or not at all, prepared again when damaged or outdated."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import CheckpointError, Field, Recipe, RecipeError, RunFolderError, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.resident.arena import Arenas, open_arenas
from tests.merging.arenas import decoded
from tests.waiting import PATIENT

# Experts count their steps and batches; that merges say so is tested with the policies for special
# tensors.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

Pico = Callable[[str], Any]


def recipe_of(family: Any, operator: str = "task_arithmetic") -> Recipe:
    experts = tuple(Source(path.name, str(path)) for path in family.experts)
    special = (("batch_norm", "merge"),) if "resnet" in str(family.base) else ()
    return Recipe(
        Source("base", str(family.base)),
        experts,
        operator,
        Field.constant(1, [0.0, 0.0]),
        special=special,
    )


def arena_file(folder: Path) -> Path:
    (file,) = folder.glob("*.arena")
    return file


def holds(arenas: Arenas, recipe: Recipe) -> bool:
    """Whether the arenas hold what their sources and operator say.

    Between the tensors are zeros.
    """
    base, *experts = (open_checkpoint(source.path) for source in (recipe.base, *recipe.experts))
    base_row, rows = decoded(arenas)
    expected = np.zeros((1 + len(experts), arenas.layout.size), base_row.dtype)
    for spec in arenas.layout.tensors:
        tensors = [source.read(spec.name).to(torch.float64) for source in (base, *experts)]
        terms = (
            tensors
            if arenas.form == "interpolation"
            else [tensors[0], *(t - tensors[0] for t in tensors[1:])]
        )
        flat = torch.stack([term.reshape(-1) for term in terms]).numpy()
        expected[:, spec.start : spec.stop] = flat
    return bool(np.array_equal(base_row, expected[0]) and np.array_equal(rows, expected[1:]))


@pytest.mark.parametrize("operator", ["average", "task_arithmetic"])
@pytest.mark.parametrize("name", ["vit", "llama_bf16", "resnet"])
def test_holds_base_and_basis_with_zero_padding(
    pico: Pico, tmp_path: Path, name: str, operator: str
) -> None:
    recipe = recipe_of(pico(name), operator)
    arenas = open_arenas(recipe, tmp_path / "deep" / "arenas")
    assert holds(arenas, recipe)
    base, rows = decoded(arenas)
    assert base.dtype == np.float32
    assert rows.shape == (2, arenas.layout.size)
    assert arena_file(tmp_path / "deep" / "arenas").name.startswith(recipe.basis_key)


def test_is_read_only(pico: Pico, tmp_path: Path) -> None:
    arenas = open_arenas(recipe_of(pico("vit")), tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        arenas.memory[0] = 1


def test_is_written_once_whatever_the_coefficients(pico: Pico, tmp_path: Path) -> None:
    recipe = recipe_of(pico("vit"))
    open_arenas(recipe, tmp_path)
    written = arena_file(tmp_path).stat()
    open_arenas(recipe.with_field(Field.constant(5, [0.1, 0.9])), tmp_path)
    assert (arena_file(tmp_path).stat().st_ino, arena_file(tmp_path).stat().st_mtime_ns) == (
        written.st_ino,
        written.st_mtime_ns,
    )
    open_arenas(recipe_of(pico("vit"), "average"), tmp_path)
    assert len(list(tmp_path.glob("*.arena"))) == 2  # another basis lies beside it


_OPEN = """
import os, sys, json, numpy as np
from pathlib import Path
from mergesearch.merging import Recipe
from mergesearch.merging.resident.arena import open_arenas
arenas = open_arenas(Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]))
(file,) = Path(sys.argv[2]).glob("*.arena")
print(file.name, file.stat().st_ino, int(arenas.memory.sum(dtype=np.int64)))
"""


def start(recipe: Recipe, folder: Path, code: str = _OPEN) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, json.dumps(recipe.to_dict()), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_concurrent_callers_wait_for_one_writer(pico: Pico, tmp_path: Path) -> None:
    recipe = recipe_of(pico("vit"))
    with (tmp_path / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        callers = [start(recipe, tmp_path) for _ in range(2)]
        with pytest.raises(subprocess.TimeoutExpired):
            callers[0].wait(timeout=3)
        assert not list(tmp_path.glob("*.arena"))
    answers = {caller.communicate(timeout=PATIENT)[0] for caller in callers}
    assert all(caller.returncode == 0 for caller in callers)
    assert len(answers) == 1  # one file, one inode, one content
    assert next(iter(answers)).startswith(arena_file(tmp_path).name)


def test_what_a_killed_writer_left_is_removed(pico: Pico, tmp_path: Path) -> None:
    recipe = recipe_of(pico("vit"))
    killed = start(
        recipe,
        tmp_path,
        "import os, mergesearch.merging.resident.arena as a\na.hash_file = lambda path: "
        "os.kill(os.getpid(), 9)\n" + _OPEN,
    )
    assert killed.wait(timeout=PATIENT) == -signal.SIGKILL
    assert [file.suffix for file in tmp_path.iterdir() if file.name != "lock"] == [".part"]
    assert holds(open_arenas(recipe, tmp_path), recipe)
    assert not list(tmp_path.glob("*.part"))


def truncate(folder: Path) -> None:
    os.truncate(arena_file(folder), 100)


def remove(folder: Path) -> None:
    arena_file(folder).unlink()


def tear_sheet(folder: Path) -> None:
    (sheet,) = folder.glob("*.json")
    sheet.write_text(sheet.read_text()[:40])


def empty_sheet(folder: Path) -> None:
    (sheet,) = folder.glob("*.json")
    sheet.write_text("[]")


@pytest.mark.parametrize("damage", [truncate, remove, tear_sheet, empty_sheet])
def test_damage_is_repaired(pico: Pico, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    recipe = recipe_of(pico("vit"))
    open_arenas(recipe, tmp_path)
    damage(tmp_path)
    assert holds(open_arenas(recipe, tmp_path), recipe)


def test_a_flipped_bit_is_found_and_the_arena_prepared_again(pico: Pico, tmp_path: Path) -> None:
    recipe = recipe_of(pico("vit"))
    open_arenas(recipe, tmp_path)
    with arena_file(tmp_path).open("r+b") as file:
        file.seek(1234)
        file.write(b"\xff")
    assert not holds(open_arenas(recipe, tmp_path, verify=False), recipe)
    assert holds(open_arenas(recipe, tmp_path), recipe)


def test_changed_sources_are_prepared_again(
    pico: Pico, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    family = pico("vit")
    expert = copy_of(family.experts[0])
    recipe = replace(
        recipe_of(family),
        experts=(Source("one", str(expert)), Source("two", str(family.experts[1]))),
    )
    folder = tmp_path / "arenas"
    old = open_arenas(recipe, folder)
    before = np.array(old.memory)
    weights = expert / "model.safetensors"
    save_file(
        {name: t * 2 for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    new = open_arenas(recipe, folder)
    assert holds(new, recipe)
    assert not np.array_equal(new.memory, before)
    assert np.array_equal(old.memory, before)  # a running study keeps what it has mapped
    arena_file(folder)  # the old one is gone


def test_fingerprints_name_the_content(
    pico: Pico, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    family = pico("vit")
    moved = copy_of(family.base)
    stamp = {
        path: open_checkpoint(str(path)).fingerprint() for path in (family.base, *family.experts)
    }
    experts = tuple(Source(path.name, str(path), stamp[path]) for path in family.experts)
    recipe = replace(
        recipe_of(family),
        base=Source("base", str(family.base), stamp[family.base]),
        experts=experts,
    )
    open_arenas(recipe, tmp_path / "arenas")
    inode = arena_file(tmp_path / "arenas").stat().st_ino
    open_arenas(replace(recipe, base=replace(recipe.base, path=str(moved))), tmp_path / "arenas")
    assert arena_file(tmp_path / "arenas").stat().st_ino == inode
    other = replace(recipe, base=Source("base", str(family.base), "0" * 64))
    with pytest.raises(
        RecipeError, match=r"source 'base'.*expected weights 000000000000, received"
    ):
        open_arenas(other, tmp_path / "arenas")


def test_refuses_a_recipe_of_another_layout(pico: Pico, tmp_path: Path) -> None:
    recipe = recipe_of(pico("vit"))
    layout = open_arenas(recipe, tmp_path).layout
    assert open_arenas(replace(recipe, layout=layout.digest), tmp_path).layout == layout
    with pytest.raises(RecipeError, match=f"expected layout {layout.digest}.*received 0123"):
        open_arenas(replace(recipe, layout="0123"), tmp_path)


def test_refuses_experts_of_another_family_before_writing(pico: Pico, tmp_path: Path) -> None:
    recipe = replace(recipe_of(pico("vit")), experts=(Source("other", str(pico("bert").base)),))
    with pytest.raises(CheckpointError, match="other"):
        open_arenas(recipe, tmp_path / "arenas")
    assert not (tmp_path / "arenas").exists()


def test_a_folder_that_cannot_be_written_is_named(pico: Pico, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        RunFolderError, match=r"file: expected a writable folder with .* GB free for arenas"
    ):
        open_arenas(recipe_of(pico("vit")), tmp_path / "file")


def test_float64_bases_get_float64_arenas(
    pico: Pico, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    family = pico("vit")
    base = copy_of(
        family.base, lambda tensors: {name: t.double() + 1e-12 for name, t in tensors.items()}
    )
    recipe = replace(recipe_of(family), base=Source("base", str(base)))
    arenas = open_arenas(recipe, tmp_path / "arenas")
    assert decoded(arenas)[0].dtype == np.float64
    assert holds(arenas, recipe)
