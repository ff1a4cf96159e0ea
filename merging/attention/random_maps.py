"""Random maps of heads that cancel, which move a model away from its relatives.

MergeLock (Wang 2025, "Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing",
arXiv 2509.01548) multiplies the features of queries and keys, and of values and outputs, by random
invertible matrices. The paper does so for whole projections; here every group of heads has maps of
its own, as heads must stay apart, and singular values are bounded, so that rounding does no harm.
"""

from __future__ import annotations

import math

import numpy as np

from mergesearch.merging.attention.head_maps import Freedom, Matrix, block_map

#: Singular values lie between this and its inverse.
LARGEST = 2.0


def random_maps(
    freedom: Freedom, groups: int, width: int, generator: np.random.Generator
) -> Matrix:
    """A map for each group of heads ``(groups, width, width)``."""
    return np.stack([_random_map(freedom, width, generator) for _ in range(groups)])


def _random_map(freedom: Freedom, width: int, generator: np.random.Generator) -> Matrix:
    couples = len(freedom.one)
    # A turn by more than a quarter: averages of turned and other features cancel.
    angles = generator.uniform(math.pi / 2, 3 * math.pi / 2, couples)
    sizes = _sizes(couples, generator)
    turned = np.stack((sizes * np.cos(angles), sizes * np.sin(angles)))
    return block_map(freedom, width, turned, _mixed(len(freedom.rest), generator))


def _mixed(count: int, generator: np.random.Generator) -> Matrix:
    """A random matrix ``U diag(s) V`` with bounded singular values."""
    if count == 0:
        return np.zeros((0, 0))
    left = np.linalg.qr(generator.standard_normal((count, count)))[0]
    right = np.linalg.qr(generator.standard_normal((count, count)))[0]
    return np.asarray(left * _sizes(count, generator) @ right)


def _sizes(count: int, generator: np.random.Generator) -> Matrix:
    most = math.log(LARGEST)
    return np.exp(generator.uniform(-most, most, count))
