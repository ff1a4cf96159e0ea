"""ANI's networks of energies as plain modules, and the atomic environments that they read.

Weights: package `torchani` 1.2, in the files of NeuroChem. ANI-1x (Smith 2018, "Less is more:
sampling chemical space with active learning") is an ensemble of eight networks; each of ANI-1ccx
(Smith 2019, "Approaching coupled cluster accuracy with a general-purpose neural network potential
through transfer learning") was trained on from the one of its number.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

ELEMENTS = ("H", "C", "N", "O")
MEMBERS = 8
#: Kilocalories per mole in a hartree.
KCAL = 627.5094738

#: Cutoffs in ångström, and parameters of the radial and the angular terms (files `*.params`).
RADIAL_CUTOFF = 5.2
ANGULAR_CUTOFF = 3.5
RADIAL_SHIFTS = 0.9 + 0.26875 * torch.arange(16)
ANGULAR_SHIFTS = 0.9 + 0.65 * torch.arange(4)
ANGLES = math.pi / 16 + math.pi / 8 * torch.arange(8)
ETA_RADIAL = 16.0
ETA_ANGULAR = 8.0
ZETA = 32.0
PAIRS = list(itertools.combinations_with_replacement(range(len(ELEMENTS)), 2))

#: Molecules as elements and positions in ångström.
MOLECULES: dict[str, list[tuple[str, float, float, float]]] = {
    "water": [("O", 0, 0, 0.117), ("H", 0, 0.757, -0.469), ("H", 0, -0.757, -0.469)],
    "methane": [
        ("C", 0, 0, 0),
        *(("H", 0.629 * x, 0.629 * y, 0.629 * x * y) for x in (1, -1) for y in (1, -1)),
    ],
    "ammonia": [
        ("N", 0, 0, 0.1),
        *(("H", 0, 0.938, -0.28), ("H", 0.812, -0.469, -0.28), ("H", -0.812, -0.469, -0.28)),
    ],
    "formaldehyde": [
        *(("C", 0, 0, -0.53), ("O", 0, 0, 0.68), ("H", 0, 0.94, -1.11), ("H", 0, -0.94, -1.11)),
    ],
    "methanol": [
        *(("C", -0.047, 0.664, 0), ("O", -0.047, -0.758, 0), ("H", -1.086, 0.973, 0)),
        *(("H", 0.437, 1.071, 0.891), ("H", 0.437, 1.071, -0.891), ("H", 0.876, -1.047, 0)),
    ],
    "hydrogen cyanide": [("H", 0, 0, -1.57), ("C", 0, 0, -0.5), ("N", 0, 0, 0.65)],
    "ethane": [
        *(("C", 0, 0, 0.765), ("H", 0, 1.02, 1.16), ("H", -0.883, -0.51, 1.16)),
        *(("H", 0.883, -0.51, 1.16), ("C", 0, 0, -0.765), ("H", 0, -1.02, -1.16)),
        *(("H", 0.883, 0.51, -1.16), ("H", -0.883, 0.51, -1.16)),
    ],
    "formic acid": [
        *(("C", 0, 0, 0), ("O", 1.2, 0, 0), ("O", -0.769, 1.098, 0)),
        *(("H", -0.623, -0.907, 0), ("H", -0.159, 1.852, 0)),
    ],
    "methylamine": [
        *(("C", 0, 0, 0), ("N", 1.47, 0, 0), ("H", -0.36, 1.03, 0), ("H", -0.36, -0.51, 0.89)),
        *(("H", -0.36, -0.51, -0.89), ("H", 1.8, -0.47, 0.81), ("H", 1.8, -0.47, -0.81)),
    ],
}


class Networks(nn.Module):
    """One network for each element; the energy of a molecule is the sum over its atoms."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"H": (160, 128, 96), "C": (144, 112, 96), "N": (128, 112, 96)}
        widths["O"] = widths["N"]
        for element in ELEMENTS:
            first, second, third = widths[element]
            self.add_module(
                element,
                nn.Sequential(
                    *(nn.Linear(384, first), nn.CELU(0.1), nn.Linear(first, second), nn.CELU(0.1)),
                    *(nn.Linear(second, third), nn.CELU(0.1), nn.Linear(third, 1)),
                ),
            )

    def forward(self, molecules: Molecules) -> torch.Tensor:
        """Energies in kilocalories per mole without those of free atoms, ``(molecules,)``."""
        energies = torch.zeros(molecules.count)
        for element, (environments, places) in molecules.atoms.items():
            atomic = self.get_submodule(element)(environments)[:, 0]
            energies.index_add_(0, places, atomic)
        return energies * KCAL


@dataclass(frozen=True)
class Molecules:
    """Molecules as what the networks read.

    Attributes:
        count: Their number.
        atoms: Element -> environments ``(atoms, 384)``, and the molecule of each atom.
    """

    count: int
    atoms: dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_networks(archive: Path, ensemble: str, member: int) -> dict[str, torch.Tensor]:
    """State dict of a network of an ensemble: ``1x`` or ``1ccx``."""
    state: dict[str, torch.Tensor] = {}
    with zipfile.ZipFile(archive) as opened:
        for element, layer in itertools.product(ELEMENTS, range(4)):
            name = f"torchani/resources/ani-{ensemble}_8x/train{member}/networks/ANN-{element}.nnf"
            numbers = [opened.read(f"{name}-l{layer + 1}.{kind}param") for kind in "wb"]
            weight, bias = (torch.from_numpy(np.frombuffer(n, "<f4").copy()) for n in numbers)
            state[f"{element}.{2 * layer}.weight"] = weight.view(len(bias), -1)
            state[f"{element}.{2 * layer}.bias"] = bias
    return state


def permuted(state: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """The same function with the hidden units of every layer in another order."""
    generator = torch.Generator().manual_seed(seed)
    turned = dict(state)
    for element, layer in itertools.product(ELEMENTS, (0, 2, 4)):
        count = len(turned[f"{element}.{layer}.bias"])
        order = torch.randperm(count, generator=generator)
        for name in (f"{element}.{layer}.weight", f"{element}.{layer}.bias"):
            turned[name] = turned[name][order]
        after = f"{element}.{layer + 2}.weight"
        turned[after] = turned[after][:, order]
    return turned


def shaken(count: int, seed: int, spread: float = 0.08) -> Molecules:
    """Every molecule ``count`` times, with atoms moved by ``spread`` ångström at random."""
    generator = torch.Generator().manual_seed(seed)
    environments: dict[str, list[torch.Tensor]] = {element: [] for element in ELEMENTS}
    places: dict[str, list[int]] = {element: [] for element in ELEMENTS}
    shapes = list(MOLECULES.values()) * count
    for number, atoms in enumerate(shapes):
        elements = [atom[0] for atom in atoms]
        still = torch.tensor([atom[1:] for atom in atoms], dtype=torch.float32)
        moved = still + spread * torch.randn(still.shape, generator=generator)
        for element, vector in zip(elements, atomic_environments(elements, moved), strict=True):
            environments[element].append(vector)
            places[element].append(number)
    return Molecules(
        len(shapes),
        {
            element: (torch.stack(environments[element]), torch.tensor(places[element]))
            for element in ELEMENTS
        },
    )


def atomic_environments(elements: Sequence[str], positions: torch.Tensor) -> torch.Tensor:
    """Environments of the atoms of a molecule, ``(atoms, 384)``.

    Equations 3 and 4 of Smith 2017, "ANI-1: an extensible neural network potential with DFT
    accuracy at force field computational cost", with NeuroChem's factors: 0.25 for radial terms,
    and 0.95 for the cosines of angles.
    """
    kinds = [ELEMENTS.index(element) for element in elements]
    found = []
    for atom, _ in enumerate(elements):
        vectors = positions - positions[atom]
        distances = vectors.norm(dim=-1)
        radial = torch.zeros(len(ELEMENTS), len(RADIAL_SHIFTS))
        angular = torch.zeros(len(PAIRS), len(ANGULAR_SHIFTS), len(ANGLES))
        others = [other for other, _ in enumerate(elements) if other != atom]
        for other in others:
            radial[kinds[other]] += _radial(distances[other])
        for one, two in itertools.combinations(others, 2):
            pair = PAIRS.index((min(kinds[one], kinds[two]), max(kinds[one], kinds[two])))
            angular[pair] += _angular(vectors[one], vectors[two])
        found.append(torch.cat([radial.flatten(), angular.flatten()]))
    return torch.stack(found)


def _cutoff(distance: torch.Tensor, limit: float) -> torch.Tensor:
    inside = 0.5 * torch.cos(math.pi * distance / limit) + 0.5
    return torch.where(distance < limit, inside, torch.zeros(()))


def _radial(distance: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(-ETA_RADIAL * (distance - RADIAL_SHIFTS) ** 2)
    return 0.25 * terms * _cutoff(distance, RADIAL_CUTOFF)


def _angular(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    lengths = torch.stack([one.norm(), two.norm()])
    angle = torch.acos(0.95 * (one @ two) / lengths.prod())
    angles = ((1 + torch.cos(angle - ANGLES)) / 2) ** ZETA
    shells = torch.exp(-ETA_ANGULAR * (lengths.mean() - ANGULAR_SHIFTS) ** 2)
    return 2 * shells[:, None] * angles * _cutoff(lengths, ANGULAR_CUTOFF).prod()
