"""Packs: several experts of one base in a folder, compressed together.

``pack.json`` names the base, the experts and how each tensor is held; ``pack.safetensors`` (or
shards with an index) holds the numbers; a folder for each expert has its configuration and
tokenizer. A tensor of K experts is held in one of these forms:

========  ==========================================================================================
base      nothing: all experts have the base's
whole     the experts' tensors ``(K, ...)``
masked    the sum of the task vectors ``(...)`` and a bit for each weight and expert
factors   low-rank task vectors, ``left (K, m, r)`` times ``right (K, r, n)``
basis     the same, whose rows (columns) of r numbers are a mean and P directions of their own:
          ``mean (m, r)``, ``directions (m, P, r)``, ``shares (m, P, K)``
========  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergesearch.merging.checkpoints.safetensors_files import (
    ITEMSIZE,
    TensorInfo,
    read_header,
    weight_map,
)
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import is_file
from mergesearch.merging.foreign.shown import path_shown, shown

MANIFEST = "pack.json"
STEM = "pack"
FORMAT = 1
FORMS = ("base", "whole", "masked", "factors", "basis")
Shape = tuple[int, ...]
#: Manifests list every tensor of a model.
_LIMIT = 1 << 28


@dataclass(frozen=True)
class PackedExpert:
    """An expert of a pack.

    Attributes:
        name: Its name, and that of its folder.
        path: Where it was when it was packed.
        fingerprint: Of its weights then.
        error: Length of what its task vector lost over the task vector's.
        dtypes: Tensors whose dtype is not the base's -> the dtype.
        threshold: λ of its masks; None where there are none.
    """

    name: str
    path: str
    fingerprint: str
    error: float
    dtypes: Mapping[str, str]
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack, seen through its manifest and headers.

    Attributes:
        folder: Where it is.
        base: Path of the base.
        base_fingerprint: Of its weights.
        experts: In order.
        forms: Tensor -> how it is held.
        rank: Terms r of low-rank task vectors; 0 where there are none.
        directions: Directions P of a basis; 0 where there are none.
        tensors: What the files hold.
    """

    folder: Path
    base: str
    base_fingerprint: str
    experts: tuple[PackedExpert, ...]
    forms: Mapping[str, str]
    rank: int
    directions: int
    tensors: Mapping[str, TensorInfo]

    @property
    def names(self) -> list[str]:
        """Names of the experts."""
        return [expert.name for expert in self.experts]

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse a pack that does not hold what its manifest says of a base's tensors.

        Raises:
            CheckpointError: Naming the first tensor that is missing or of another shape.
        """
        if {*shapes} != {*self.forms}:
            odd = sorted({*shapes} ^ {*self.forms})[0]
            raise self._damaged(f"tensors of its base, received another set ({shown(odd)})")
        for name, form in self.forms.items():
            held = held_shapes(
                form, name, shapes[name], len(self.experts), self.rank, self.directions
            )
            for key, shape in held.items():
                found = self.tensors.get(key)
                if found is None or found.shape != shape:
                    received = "none" if found is None else str(list(found.shape))
                    raise self._damaged(f"{shown(key)} of shape {list(shape)}, received {received}")

    def _damaged(self, expected: str) -> CheckpointError:
        return CheckpointError(f"{path_shown(self.folder)}: expected {expected}; pack it again")


def held_shapes(
    form: str, name: str, shape: Shape, experts: int, rank: int, directions: int
) -> dict[str, Shape]:
    """Names and shapes of what is stored for a tensor.

    Args:
        form: One of :data:`FORMS`.
        name: Of the tensor.
        shape: Its shape.
        experts: K.
        rank: r, at most the smaller dimension of the matrix.
        directions: P.
    """
    if form == "base":
        return {}
    if form == "whole":
        return {f"whole/{name}": (experts, *shape)}
    if form == "masked":
        count = math.prod(shape)
        return {f"sum/{name}": shape, f"mask/{name}": (experts, (count + 7) // 8)}
    m = shape[0]
    n = math.prod(shape[1:])
    r = min(rank, m, n)
    if form == "factors":
        return {f"left/{name}": (experts, m, r), f"right/{name}": (experts, r, n)}
    return {
        key: size
        for side, count in (("left", m), ("right", n))
        for key, size in (
            (f"{side}.mean/{name}", (count, r)),
            (f"{side}.directions/{name}", (count, directions, r)),
            (f"{side}.shares/{name}", (count, directions, experts)),
        )
    }


def held_bytes(shapes: Mapping[str, Shape], dtype: str) -> int:
    """Bytes of what is stored for a tensor."""
    return sum(math.prod(shape) * ITEMSIZE[held_dtype(key, dtype)] for key, shape in shapes.items())


def held_dtype(key: str, dtype: str) -> str:
    """The dtype of a stored tensor: bits are packed into bytes, all else is the tensor's own."""
    return "uint8" if key.startswith("mask/") else dtype


def pack_around(folder: Path) -> Path | None:
    """The pack whose expert a folder is, or None."""
    return folder.parent if is_file(folder.parent / MANIFEST) else None


def is_pack(folder: Path) -> bool:
    """Whether a folder is a pack."""
    return is_file(folder / MANIFEST)


def read_pack(folder: Path) -> Pack:
    """Read manifest and headers of a pack.

    Raises:
        CheckpointError: If they are missing or damaged.
    """
    file = folder / MANIFEST
    data = Node(read_json(file, CheckpointError, limit=_LIMIT), path_shown(file), CheckpointError)
    if data.at("format").integer() != FORMAT:
        raise data.at("format").wrong(f"{FORMAT}, which this version reads")
    forms = {name: node.text() for name, node in data.at("forms").members()}
    odd = next((form for form in forms.values() if form not in FORMS), None)
    if odd is not None:
        raise CheckpointError(
            f"{path_shown(file)}: expected forms {', '.join(FORMS)}, received {shown(odd)}"
        )
    return Pack(
        folder,
        data.at("base").at("path").text(),
        data.at("base").at("fingerprint").text(),
        tuple(_experts(data.at("experts").elements())),
        forms,
        data.at("rank").integer(),
        data.at("directions").integer(),
        _stored(folder),
    )


def _experts(nodes: Sequence[Node]) -> Iterator[PackedExpert]:
    for node in nodes:
        yield PackedExpert(
            node.at("name").text(),
            node.at("path").text(),
            node.at("fingerprint").text(),
            node.at("error").number(),
            {name: _dtype(one) for name, one in node.at("dtypes").members()},
            node.at("threshold").number() if node.has("threshold") else None,
        )


def _dtype(node: Node) -> str:
    if node.text() not in ITEMSIZE:
        raise node.wrong(f"one of {', '.join(ITEMSIZE)}")
    return node.text()


def _stored(folder: Path) -> dict[str, TensorInfo]:
    single = folder / f"{STEM}.safetensors"
    if is_file(single):
        return read_header(single)
    shards = sorted({*weight_map(folder / f"{STEM}.safetensors.index.json").values()})
    found: dict[str, TensorInfo] = {}
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(
                f"{path_shown(folder)}: expected shards in its folder, received {shown(name)}"
            )
        found |= read_header(folder / name)
    return found
