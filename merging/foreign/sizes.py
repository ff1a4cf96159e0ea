"""Numbers that are slips: sizes that no machine holds, and times that overflow a clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The most of anything that has no limit of its own: trials, items, seconds.
MOST = 10**9
#: Seeds are bounded by what generators take.
SEED = 2**63 - 1


def sized(value: Any, name: str | None, most: Mapping[str, int]) -> Any:
    """A number of a section as it is, unless it is above the limit of its key.

    Limits stand here rather than in the declarations of keys: they are no part of what a key means.

    Args:
        value: Any value; what is no number is passed on.
        name: The key.
        most: Key -> its limit, where it is not ``MOST``.

    Raises:
        PydanticCustomError: If the number is above it.
    """
    limit = most.get(name or "", SEED if name == "seed" else MOST)
    if isinstance(value, int | float) and abs(value) > limit:
        from pydantic_core import PydanticCustomError

        raise PydanticCustomError("too_large", "expected at most {limit}", {"limit": limit})
    return value
