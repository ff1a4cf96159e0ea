"""Whether a second score agrees with the recorded one: exactly, or as far as devices differ.

On the recorded device the values must be equal. On another one sums run in another order, so every
item's score moves by a few roundings, and an item whose answer was nearly a tie may flip. What is
allowed there (``docs/guarantees.md``):

1. An item *flips* if its score moves by more than ``r`` of its scale, where ``r`` is 1e-3, or 4 eps
   of the dtype that rounds most: the model's, or TF32. The scale of an item is its own score or the
   mean size of all, whichever is larger. At most 2 % of the items may flip, and always one.
2. A value may move by ``r`` of itself and by two standard errors of what flips cause, which are as
   likely to raise it as to lower it. With weights ``w`` and moves ``d`` of the flipped items that
   is 2 sqrt(sum (w d)^2). Without single items, a flip of 2 % of them moves a mean by
   sqrt(2 * 0.02) = 0.2 of its standard error, of which two are allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement
from mergesearch.search.record.trial_record import Score
from mergesearch.search.workers.devices import Device

Array = npt.NDArray[np.float64]

#: Share of the items that may flip between devices.
FLIPS = 0.02
#: Least relative move of an item's score that is a flip.
RELATIVE = 1e-3
#: Machine epsilon of the dtypes that models have; ``tf32`` has the mantissa of float16.
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "tf32": 2.0**-10}
#: Settings that say that two devices compute the same bits; the number of cards does not.
SAME = ("name", "capability", "driver", "cuda", "tf32", "deterministic", "attention", "dtype")


@dataclass(frozen=True)
class Agreement:
    """How a second score compares with the recorded one.

    Attributes:
        identical: Whether all values are equal to the last bit.
        agrees: Whether they are as close as the devices allow; equal ones always are.
        reason: What was compared, on which devices, and what moved; empty on the same device.
    """

    identical: bool
    agrees: bool
    reason: str = ""


def compare_scores(
    recorded: Score,
    again: Measurement,
    devices: Iterable[Device],
    here: Device,
    *,
    prepared_on_card: bool = False,
) -> Agreement:
    """Compare a score with the record.

    Args:
        recorded: The score in the record.
        again: The same model, scored here.
        devices: Those that the record may have been measured on; none where that is not known.
        here: The present device.
        prepared_on_card: Whether rows were prepared on a card, where an export prepares on the CPU.
    """
    identical = dict(again.values) == dict(recorded.values)
    known = list(devices)
    others = known if prepared_on_card else [d for d in known if not same_device(d, here)]
    if identical or not others:
        return Agreement(identical, identical)
    relative = max(relative_tolerance(device) for device in (*others, here))
    checks = [_Check.of(name, recorded, again, relative) for name in sorted({*recorded.values})]
    where = f"recorded on {_listed(others)}, scored again on {here}{_settings(others[0], here)}"
    return Agreement(
        identical,
        {*again.values} == {*recorded.values} and all(check.holds for check in checks),
        f"{where}: {'; '.join(str(check) for check in checks)}",
    )


def same_device(recorded: Device, here: Device) -> bool:
    """Whether a device must give the recorded bits; settings of cards do not concern the CPU."""
    if recorded.name is None and here.name is None:
        return True
    return all(getattr(recorded, name) == getattr(here, name) for name in SAME)


def relative_tolerance(device: Device) -> float:
    """How far an item's score may move between this device and another, relative to its scale."""
    rounding = [EPS.get(device.dtype or "", 0.0), EPS["tf32"] if device.tf32 else 0.0]
    return max(RELATIVE, 4 * max(rounding))


@dataclass(frozen=True)
class _Check:
    """One objective: how far its value moved, how many items flipped, and what is allowed."""

    name: str
    moved: float
    bound: float
    flips: int | None
    allowed: int
    items: int

    @classmethod
    def of(cls, name: str, recorded: Score, again: Measurement, relative: float) -> _Check:
        """Compare one objective."""
        before = recorded.values[name]
        after = again.values.get(name, np.nan)
        old, new = recorded.items.get(name), again.items.get(name)
        flipped = None if old is None or new is None else flipped_moves(old, new, relative)
        weights = again.weights.get(name)
        if flipped is not None and weights is not None:
            spread = 2 * float(np.sqrt(np.sum((weights * flipped) ** 2)))
        else:
            spread = 2 * float(np.sqrt(2 * FLIPS)) * recorded.errors.get(name, 0.0)
        count = 0 if flipped is None else len(flipped)
        return cls(
            name,
            abs(after - before),
            relative * abs(before) + spread,
            None if flipped is None else int(np.count_nonzero(flipped)),
            max(1, int(FLIPS * count)),
            count,
        )

    @property
    def holds(self) -> bool:
        """Whether it moved no further than is allowed."""
        return self.moved <= self.bound and (self.flips is None or self.flips <= self.allowed)

    def __str__(self) -> str:
        moved = f"{self.name} moved by {self.moved:.3g}, at most {self.bound:.3g} is allowed"
        if self.flips is None:
            return moved
        return f"{moved}, {self.flips} of {self.items} items differ, at most {self.allowed} may"


def flipped_moves(old: Array, new: Array, relative: float) -> Array:
    """By how much each item's score moved ``(items,)``; 0 for those that only rounded otherwise.

    An item that has a score on one side alone moved endlessly far, as do all where their number
    differs.
    """
    if old.shape != new.shape:
        return np.full(len(new), np.inf)
    both = np.isnan(old) & np.isnan(new)
    with np.errstate(invalid="ignore"):
        moves = np.where(both | (old == new), 0.0, new - old)
    moves = np.where(np.isnan(moves), np.inf, moves)
    finite = np.abs(old[np.isfinite(old)])
    mean = finite.mean() if finite.size else 0.0
    scale = np.maximum(np.nan_to_num(np.abs(old), posinf=0.0), mean)
    return np.where(np.abs(moves) <= relative * scale, 0.0, moves)


def _settings(recorded: Device, here: Device) -> str:
    """The settings that differ between two devices of one name."""
    if recorded.name != here.name:
        return ""
    changed = [
        f"{name} {getattr(recorded, name)} -> {getattr(here, name)}"
        for name in SAME
        if getattr(recorded, name) != getattr(here, name)
    ]
    return f" with {', '.join(changed)}"


def _listed(devices: Iterable[Device]) -> str:
    return " and ".join(dict.fromkeys(str(device) for device in devices))
