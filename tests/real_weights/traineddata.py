"""Weights in Tesseract's `.traineddata`: found, read, and written back into a copy.

The container has a count of components and the offset of each, −1 where there is none
(`ccutil/tessdatamanager.cpp`). The network is a tree of layers written one after the other
(`lstm/network.cpp`, `plumbing.cpp`, `lstm.cpp`, `weightmatrix.cpp` of tesseract 4 and 5); matrices
of float models are fp64, with the bias in the last column.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

#: Number of the component that holds the network.
LSTM = 17
#: Layers that hold other layers; those that end in integers, with their number; those of a matrix.
HOLDERS = ("Series", "Parallel", "RTLReversed", "TTBReversed", "XYTranspose")
SHAPED = {"Input": 5, "Convolve": 2, "Maxpool": 2, "Reconfig": 2}
MATRICES = ("Logistic", "LinLogistic", "LinTanh", "Tanh", "Relu", "Linear", "Softmax")
GATES = ("CI", "GI", "GF1", "GO")
LAYER_RATES = 64  # a flag: each layer has a learning rate
INTEGER, DOUBLE = 1, 128  # flags of a matrix


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies in the file: ``(outputs, inputs + 1)`` numbers in fp64."""

    start: int
    shape: tuple[int, int]


class Reader:
    """Walks through the network of a file and notes its matrices."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.matrices: dict[str, Matrix] = {}
        (count,) = struct.unpack_from("<I", data)
        self.place: int = struct.unpack_from(f"<{count}q", data, 4)[LSTM]
        self._layer("")

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def _text(self) -> str:
        (size,) = self._take("I")
        self.place += size
        return self.data[self.place - size : self.place].decode()

    def _layer(self, path: str) -> None:
        assert self._take("b") == (0,)
        kind = self._text()
        _, _, flags, _, _, _ = self._take("bbiiii")  # training, backward, flags, widths, weights
        name = f"{path}{self._text()}"
        if kind in HOLDERS:
            (count,) = self._take("I")
            for number in range(count):
                self._layer(f"{name}.{number}.")
            if flags & LAYER_RATES:
                self._take(f"{self._take('I')[0]}f")
        elif kind in SHAPED:
            self._take(f"{SHAPED[kind]}i")
        elif kind in ("LSTM", "SummLSTM"):
            self._take("i")
            for gate in GATES:  # the gate of a second direction would follow, if it had one
                self._matrix(f"{name}.{gate}")
        else:
            assert kind in MATRICES, kind
            self._matrix(name)

    def _matrix(self, name: str) -> None:
        (mode,) = self._take("B")
        assert mode & DOUBLE, "a matrix of another version"
        assert not mode & INTEGER, "an integer model"
        rows, columns = self._take("II")
        self._take("d")  # what empty elements would be
        self.matrices[name] = Matrix(self.place, (rows, columns))
        self.place += 8 * rows * columns


def read_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Matrices of the network in fp64: layer -> ``(outputs, inputs)`` weights and the biases."""
    state: dict[str, torch.Tensor] = {}
    for name, matrix in Reader(data).matrices.items():
        count = matrix.shape[0] * matrix.shape[1]
        numbers = np.frombuffer(data, "<f8", count, matrix.start).reshape(matrix.shape).copy()
        whole = torch.from_numpy(numbers)
        state[f"{name}.weight"] = whole[:, :-1].contiguous()
        state[f"{name}.bias"] = whole[:, -1].contiguous()
    return state


def with_weights(data: bytes, state: Mapping[str, torch.Tensor]) -> bytes:
    """The file with other weights."""
    changed = bytearray(data)
    for name, matrix in Reader(data).matrices.items():
        weight = state[f"{name}.weight"].double()
        whole = torch.cat([weight, state[f"{name}.bias"].double()[:, None]], dim=1)
        assert tuple(whole.shape) == matrix.shape
        numbers = whole.contiguous().numpy().astype("<f8").tobytes()
        changed[matrix.start : matrix.start + len(numbers)] = numbers
    return bytes(changed)
