"""Generated weights for our operators and other packages: the same bits everywhere.

Only uniform numbers of a counter-based generator are added and multiplied: no logarithm, no matrix
product, so that no library can round differently.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

#: ``aligned``: experts share half of their direction. ``rivals``: what one expert adds, the next
#: takes away in part. ``adapters``: every task vector of a matrix has rank 1, as a small LoRA
#: adapter's. ``mirrored``: two experts that cancel exactly, at every position.
Kind = Literal["aligned", "rivals", "adapters", "mirrored"]

HIDDEN = 10
INNER = 20
VOCABULARY = 30
CLASSES = 6
BLOCKS = 3

#: A square, a tall and a wide matrix in every block, vectors, an embedding and a head. Sizes are
#: multiples of ten, so that a share of 0.1, 0.2, ... is a whole number of elements.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{
        f"encoder.layers.{block}.{name}": shape
        for block in range(BLOCKS)
        for name, shape in {
            "layer_norm.weight": (HIDDEN,),
            "layer_norm.bias": (HIDDEN,),
            "attention.weight": (HIDDEN, HIDDEN),
            "mlp.fc1.weight": (INNER, HIDDEN),
            "mlp.fc1.bias": (INNER,),
            "mlp.fc2.weight": (HIDDEN, INNER),
        }.items()
    },
    "head.weight": (CLASSES, HIDDEN),
}

#: How far each expert moved: no two are alike.
SCALES = (1.0, 0.7, 1.4, 0.9)


def weights(experts: int = 3, kind: Kind = "aligned") -> tuple[Weights, dict[str, Weights]]:
    """The base and its experts by name (``one``, ``two``, ...), float32."""
    base = {name: _base(name, kind) for name in SHAPES}
    names = ("one", "two", "three", "four")[:experts]
    return (
        {name: tensor.astype(np.float32) for name, tensor in base.items()},
        {
            expert: {
                name: (base[name] + _task_vector(name, place, kind)).astype(np.float32)
                for name in SHAPES
            }
            for place, expert in enumerate(names)
        },
    )


def tokens(expert: str, samples: int = 12, length: int = 5) -> npt.NDArray[np.int64]:
    """Inputs ``(samples, length)`` of one expert's task."""
    return _generator(f"tokens {expert}").integers(0, VOCABULARY, (samples, length))


def digest() -> str:
    """Changes when any generated number does; golden files carry it."""
    found = hashlib.sha256()
    for kind in get_args(Kind):
        base, experts = weights(4, kind)
        for state in (base, *experts.values()):
            found.update(b"".join(tensor.tobytes() for tensor in state.values()))
    return found.hexdigest()[:16]


def _base(name: str, kind: Kind) -> npt.NDArray[np.float64]:
    base = 0.17 * _bell(f"base {name}", SHAPES[name])
    return _rounded(base) if kind == "mirrored" else base


def _rounded(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """To multiples of 1/1024, whose sums and differences float32 holds exactly."""
    return np.round(values * 1024) / 1024


def _task_vector(name: str, place: int, kind: Kind) -> npt.NDArray[np.float64]:
    shape = SHAPES[name]
    if kind == "adapters":
        return 0.12 * SCALES[place] * _rank_one(f"{place} {name}", shape)
    if kind == "mirrored":
        return (1 - 2 * place) * _rounded(0.1 * _bell(f"mirror {name}", shape))
    own = _bell(f"{place} {name}", shape)
    shared = _bell(f"shared {name}", shape)
    if kind == "rivals":
        # Cosines below 0 on average: each expert takes back what the one before it added.
        return 0.07 * SCALES[place] * (own - 0.9 * _bell(f"{(place + 1) % 3} {name}", shape))
    return 0.05 * SCALES[place] * (own + 1.3 * shared)


def _rank_one(key: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    if len(shape) == 1:
        return _bell(key, shape)
    return _bell(f"{key} left", shape[:1])[:, None] * _bell(f"{key} right", shape[1:])[None, :]


def _bell(key: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Bell-shaped numbers of unit variance: the sum of four uniform ones, exact in float64."""
    uniform = _generator(key).random((4, *shape))
    return (uniform[0] + uniform[1] + uniform[2] + uniform[3] - 2.0) * 1.7320508075688772


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
