"""A model folder as one GGUF file, which llama.cpp and what is built on it load."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.gguf_format.grids import CODES, on_grid, type_of
from mergesearch.merging.export.gguf_format.models import (
    GgufModel,
    hyperparameters,
    model_of,
    rope_factors,
    rope_kind,
)
from mergesearch.merging.export.gguf_format.tokens import add_tokenizer
from mergesearch.merging.models.q4_k import BLOCK, quantised

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k", "bits"]
#: The type of a file whose matrices have the bits that a study gave their layers.
BITS = "bits"
#: Type of the matrices of a file -> the number by which llama.cpp names files of that kind.
TYPES: Mapping[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q5_1": 9,
    "q5_0": 8,
    "q4_1": 3,
    "q4_0": 2,
    "q4_k": 14,
    BITS: 3,  # most of it, in general: that of q4_1
}
NO_BITS: Mapping[str, int] = MappingProxyType({})
#: Types of blocks of 32 elements.
_SMALL_BLOCKS = frozenset({"q8_0", "q5_1", "q5_0", "q4_1", "q4_0"})


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file that was written.

    Attributes:
        file: Where it is.
        kind: Type of its matrices.
        tensors: Number of tensors.
        size: Bytes.
        wider: Matrices that are kept in a wider type, as the length of their rows asks for.
        without_tokenizer: Why there is no tokenizer in it, or None.
        types: Type -> number of tensors.
    """

    file: Path
    kind: str
    tensors: int
    size: int
    wider: tuple[str, ...]
    without_tokenizer: str | None
    types: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "file": str(self.file),
            "type": self.kind,
            "tensors": self.tensors,
            "bytes": self.size,
            "wider": list(self.wider),
            "types": dict(self.types),
            "tokenizer": self.without_tokenizer is None,
        }

    def lines(self) -> list[str]:
        """For people."""
        kind = self.kind
        if kind == BITS:
            counts = (f"{count} {one}" for one, count in sorted(self.types.items()))
            kind = f"the types of their bits ({', '.join(counts)})"
        lines = [f"GGUF of {self.tensors} tensors in {kind}, {self.size / 1e6:.1f} MB"]
        if self.wider:
            lines.append(
                f"{len(self.wider)} matrices are kept wider, as their rows are no multiple of a "
                f"block: {', '.join(self.wider[:3])}{', …' if len(self.wider) > 3 else ''}"
            )
        if self.without_tokenizer is not None:
            lines.append(f"without a tokenizer: {self.without_tokenizer}")
        return lines


def check_gguf(
    config: Mapping[str, Any],
    kind: str,
    file: Path,
    overwrite: bool,
    bits: Mapping[str, int] = NO_BITS,
) -> None:
    """Refuse what cannot be written as GGUF, before weights are read.

    Args:
        config: Of the model.
        kind: Type of the matrices.
        file: To create.
        overwrite: Replace a file.
        bits: Bits of the matrices that were rounded.

    Raises:
        InputError: If the package is missing, the model is of an unknown kind, there is no such
            type, it needs bits and there are none, or the file exists.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            "gguf: expected the package gguf, received none; install it with "
            "`pip install 'mergesearch[gguf]'`"
        ) from error
    if kind not in TYPES:
        raise InputError(f"gguf: expected a type of {', '.join(TYPES)}, received {kind!r}")
    model = model_of(config)
    if kind == BITS:
        _check_bits(bits, model)
    if file.is_dir() or (file.exists() and not overwrite):
        what = "a folder" if file.is_dir() else "one that exists"
        raise InputError(f"{file}: expected a file to create, received {what}; choose another")


def _check_bits(bits: Mapping[str, int], model: GgufModel) -> None:
    """Refuse bits where there are none, or rows are not what shares a scale."""
    if not bits:
        raise InputError(
            "gguf: expected a trial whose layers have bits of their own (space.bits) for the type "
            f"{BITS}, received one without; choose another type, such as q4_k"
        )
    if model.architecture == "gpt2":
        raise InputError(
            f"gguf: expected matrices with a row for each output for the type {BITS}, received "
            "gpt2, which has columns; choose another type, such as q8_0"
        )


def write_gguf(
    folder: Path,
    file: Path,
    kind: str = "f16",
    *,
    name: str = "",
    overwrite: bool = False,
    bits: Mapping[str, int] = NO_BITS,
) -> GgufExport:
    """Write the model of a folder as a GGUF file.

    Vectors stay in fp32. Tensors are read, changed and written one at a time.

    Args:
        folder: Of a causal language model, with its tokenizer.
        file: To create.
        kind: Type of the matrices, one of :data:`TYPES`.
        name: Of the model, as the file states it.
        overwrite: Replace a file.
        bits: Stored name -> bits of a matrix that was rounded to them.

    Raises:
        InputError: As :func:`check_gguf`, or if a tensor has no place in GGUF.
    """
    checkpoint = open_checkpoint(str(folder))
    check_gguf(checkpoint.config, kind, file, overwrite, bits)
    from gguf import GGUFWriter

    model = model_of(checkpoint.config)
    names = _names(checkpoint, model)
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    writer = GGUFWriter(part, model.architecture)
    try:
        why = _add_metadata(writer, checkpoint, folder, model, kind, name or folder.name)
        types = {
            name: _type_of(_shape(name, checkpoint, model), own, _kind_of(name, kind, bits))
            for name, own in names.items()
        }
        _write_tensors(writer, checkpoint, names, model, types, bits if kind == BITS else NO_BITS)
        writer.close()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    count = len(names) + (rope_factors(checkpoint.config) is not None)
    wider = tuple(
        own for name, own in names.items() if types[name] not in ("f32", _kind_of(name, kind, bits))
    )
    return GgufExport(file, kind, count, file.stat().st_size, wider, why, Counter(types.values()))


def _names(checkpoint: Checkpoint, model: GgufModel) -> dict[str, str]:
    """Stored name -> name in GGUF, of all tensors that are there only once.

    Raises:
        InputError: If one has no name there.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == model.architecture)
    layers = int(hyperparameters(checkpoint.config)["block_count"])
    table = get_tensor_name_map(arch, layers)
    found = {n: table.get_name(n, try_suffixes=(".weight", ".bias")) for n in checkpoint.merged}
    lost = [name for name, own in found.items() if own is None]
    if lost:
        raise InputError(
            f"gguf: expected tensors of {model.architecture}, received {lost[0]!r}, which has no "
            "place there; convert the folder of --out with llama.cpp's converter"
        )
    return {name: own for name, own in found.items() if own is not None}


def _add_metadata(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    folder: Path,
    model: GgufModel,
    kind: str,
    name: str,
) -> str | None:
    """State what the model is; returns why there is no tokenizer, or None."""
    writer.add_name(name)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(2)
    for key, value in hyperparameters(checkpoint.config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.architecture}.{key}", value)
    if rope_kind(checkpoint.config) == "linear":
        writer.add_string(f"{model.architecture}.rope.scaling.type", "linear")
    rows = max(
        checkpoint.shape(n)[0] for n in checkpoint.merged if "embed_tokens" in n or "wte" in n
    )
    return add_tokenizer(writer, folder, rows, model.pre)


def _write_tensors(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    model: GgufModel,
    kinds: Mapping[str, str],
    bits: Mapping[str, int],
) -> None:
    """Lay out the file and fill it.

    Args:
        writer: Of the file.
        checkpoint: The model.
        names: Stored name -> name in GGUF.
        model: What GGUF calls it.
        kinds: Stored name -> type.
        bits: Bits of the matrices whose values lie on grids.
    """
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    factors = rope_factors(checkpoint.config)
    types = {name: GGMLQuantizationType[kind.upper()] for name, kind in kinds.items()}
    for name, own in names.items():
        stored = quant_shape_to_byte_shape(_shape(name, checkpoint, model), types[name])
        writer.add_tensor_info(
            own, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=types[name]
        )
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        array = _array(name, checkpoint, model)
        grid = name in bits and kinds[name] in CODES
        writer.write_tensor_data(
            on_grid(array, kinds[name]) if grid else _encoded(array, types[name])
        )
    if factors is not None:
        writer.write_tensor_data(factors)


def _kind_of(name: str, kind: str, bits: Mapping[str, int]) -> str:
    """The type that is asked for a matrix; that of its bits, and f16 without any."""
    if kind != BITS:
        return kind
    return type_of(bits[name]) if name in bits else "f16"


def _type_of(shape: tuple[int, ...], own: str, kind: str) -> str:
    """The type of a tensor: vectors wide; embeddings and rows that do not divide a little wider."""
    if len(shape) == 1:
        return "f32"
    chosen = kind
    if kind == "q4_k" and (own in ("token_embd.weight", "output.weight") or shape[-1] % BLOCK):
        chosen = "q8_0"
    if chosen in _SMALL_BLOCKS and shape[-1] % 32:
        return "f16"
    return chosen


def _array(name: str, checkpoint: Checkpoint, model: GgufModel) -> npt.NDArray[np.float32]:
    tensor = checkpoint.read(name).float().numpy()
    return np.ascontiguousarray(model.change(name, tensor, checkpoint.config), np.float32)


def _shape(name: str, checkpoint: Checkpoint, model: GgufModel) -> tuple[int, ...]:
    """Shape of a tensor in GGUF, from one that takes no memory."""
    flat = np.broadcast_to(np.float32(0), checkpoint.shape(name))
    return tuple(model.change(name, flat, checkpoint.config).shape)


def _encoded(array: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == GGMLQuantizationType.Q4_K:
        return quantised(array)
    encoded: npt.NDArray[Any] = quantize(array, kind)
    return encoded
