"""Pickled weights written as safetensors, so that they can be merged.

Names, shapes, dtypes and numbers stay as they are, tied copies included. Tensors are copied one at
a time; the folder appears under its name only when everything in it is on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergesearch.merging.checkpoints.model_config import read_config
from mergesearch.merging.checkpoints.pipelines import STEMS, stem_in
from mergesearch.merging.checkpoints.safetensors_files import (
    COMPANIONS,
    PICKLES,
    TensorInfo,
    weight_map,
)
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.checkpoints.torch_files import StridedTensor, read_torch_file
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.foreign.paths import is_file, resolved
from mergesearch.merging.foreign.shown import path_shown, shown

#: Beginning of the names of pickled weights -> that of the safetensors files.
_PICKLED_STEMS = {
    "pytorch_model": STEMS[0],
    "diffusion_pytorch_model": STEMS[1],
    "adapter_model": "adapter_model",
}
#: Pickled files of a training that are no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*")
#: What is copied, beside what every model folder holds.
_MORE_COMPANIONS = ("adapter_config.json",)


@dataclass(frozen=True)
class Converted:
    """A converted folder.

    Attributes:
        folder: Where it is.
        tensors: Their number.
        size: Their bytes.
        left: Names of entries that are no tensors.
        warnings: What is still missing, one line each.
    """

    folder: Path
    tensors: int
    size: int
    left: tuple[str, ...]
    warnings: tuple[str, ...]


def convert(
    source: Path,
    out: Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> Converted:
    """Write the weights of a folder or file that ``torch.save`` made as a folder of safetensors.

    Configuration, tokenizer and licence beside them are copied. Nothing is unpickled.

    Args:
        source: The folder of a model or an adapter, or one file.
        out: Folder to create; may exist if it is empty.
        key: Where a file holds several state dicts, the name of the one that is meant.
        overwrite: Replace a folder that is not empty.
        shard_bytes: Size above which the weights are split over several files.

    Raises:
        CheckpointError: If there are no such weights, or they are damaged.
        InputError: If ``out`` cannot be written, or is in use.
    """
    stem, files = _files_of(source)
    target = resolved(out)
    check_target(target, (), overwrite)
    if any(resolved(file).is_relative_to(target) for file in files):
        raise InputError(f"{out}: expected another folder than that of {source}, received it")
    tensors: dict[str, StridedTensor] = {}
    left: list[str] = []
    for file in files:
        read = read_torch_file(file, key)
        tensors |= read.tensors
        left += read.left
    _check_complete(source, tensors)
    folder = source if source.is_dir() else source.parent
    companions = _companions(folder)
    warnings = _warnings(folder if companions else None)
    try:
        _write_folder(tensors, stem, folder, companions, target, shard_bytes)
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write {_size(tensors) / 1e9:.2g} GB, received: "
            f"{error.strerror or error}"
        ) from error
    return Converted(out, len(tensors), _size(tensors), tuple(left), warnings)


def _files_of(source: Path) -> tuple[str, list[Path]]:
    """Beginning of the new files' names, and the files with weights.

    Raises:
        CheckpointError: If there is none, or it is not clear which.
    """
    if source.is_file():
        if not _is_pickle(source):
            raise CheckpointError(
                f"{source}: expected one of {', '.join(PICKLES)}, received {source.name!r}"
            )
        stem = source.name.partition(".")[0]
        return _PICKLED_STEMS.get(stem, STEMS[0]), [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: expected a folder or a file, received a missing path")
    if stem_in(source) is not None:
        raise CheckpointError(
            f"{source}: expected pickled weights, received safetensors; they need no conversion"
        )
    for pickled, stem in _PICKLED_STEMS.items():
        if (source / f"{pickled}.bin").is_file():
            return stem, [source / f"{pickled}.bin"]
        if (source / f"{pickled}.bin.index.json").is_file():
            return stem, _shards(source / f"{pickled}.bin.index.json")
    found = sorted(path for pattern in PICKLES for path in source.glob(pattern))
    found = [path for path in found if _is_pickle(path)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:6]) or "none"
        remedy = "give the path of one file" if found else "give a folder with weights"
        raise CheckpointError(
            f"{source}: expected pytorch_model.bin or one file of torch, received {names}; {remedy}"
        )
    return STEMS[0], found


def _is_pickle(file: Path) -> bool:
    """Whether a file is named like pickled weights."""
    return any(file.match(p) for p in PICKLES) and not any(file.match(p) for p in _NO_WEIGHTS)


def _shards(index: Path) -> list[Path]:
    """The files that an index names, in its own folder."""
    names = sorted({*weight_map(index).values()})
    lost = [n for n in names if Path(n).name != n or not is_file(index.parent / n)]
    if lost:
        raise CheckpointError(
            f"{path_shown(index)}: expected shards in its folder, received no {shown(lost[0])}; "
            "download it again"
        )
    return [index.parent / name for name in names]


def _check_complete(source: Path, tensors: Mapping[str, StridedTensor]) -> None:
    """Refuse shards that do not hold what their index says, and weights without a tensor."""
    expected: set[str] = set()
    for pickled in _PICKLED_STEMS:
        index = source / f"{pickled}.bin.index.json"
        if index.is_file() and not (source / f"{pickled}.bin").is_file():
            expected |= {*weight_map(index)}
    missing = sorted(expected - set(tensors))
    if missing or not tensors:
        raise CheckpointError(
            f"{path_shown(source)}: expected {shown(missing[0] if missing else 'a tensor')}, "
            "received none; "
            "download it again"
        )


def _companions(folder: Path) -> list[Path]:
    """Files to copy; none where a file lies in a folder that is not a model's."""
    configs = ("config.json", *_MORE_COMPANIONS)
    if not any((folder / name).is_file() for name in configs):
        return []
    patterns = (*COMPANIONS, *_MORE_COMPANIONS)
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _write_folder(
    tensors: Mapping[str, StridedTensor],
    stem: str,
    folder: Path,
    companions: list[Path],
    target: Path,
    shard_bytes: int,
) -> None:
    with new_folder(target) as part:
        laid_out = lay_out_files(part, _as_stored(tensors), shard_bytes, stem)
        for name, tensor in tensors.items():
            write_tensor(laid_out[name], tensor.read())
        for file in companions:
            copy = part / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _as_stored(tensors: Mapping[str, StridedTensor]) -> dict[str, TensorInfo]:
    """The tensors without gaps between their elements, as the writer wants them."""
    return {
        name: replace(tensor.info, start=0, stop=tensor.size) for name, tensor in tensors.items()
    }


def _size(tensors: Mapping[str, StridedTensor]) -> int:
    return sum(tensor.size for tensor in tensors.values())


def _warnings(folder: Path | None) -> tuple[str, ...]:
    """What transformers will miss."""
    if folder is None:
        return ("no config.json beside the weights: give experts and base one of their own",)
    if not (folder / "config.json").is_file():
        return ()
    config = read_config(folder)
    if "model_type" in config or "_class_name" in config:
        return ()
    return ('config.json names no "model_type", which transformers needs: add it, such as "bert"',)
