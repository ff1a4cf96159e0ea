"""Seeded mutations of nested values: one place of them, by kind of what stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from tests.fuzz.nasty import NASTY_KEYS, NASTY_VALUES

Place = tuple[str | int, ...]


def places(value: Any) -> list[Place]:
    """The paths of all values inside a nested value; the whole is ``()``."""
    found: list[Place] = [()]
    waiting: list[tuple[Place, Any]] = [((), value)]
    while waiting:
        path, held = waiting.pop()
        inner: Sequence[tuple[Any, Any]] = ()
        if isinstance(held, dict):
            inner = list(held.items())
        elif isinstance(held, list):
            inner = list(enumerate(held))
        for key, each in inner:
            found.append((*path, key))
            waiting.append(((*path, key), each))
    return found


def replaced(value: Any, path: Sequence[str | int], new: Any) -> Any:
    """A copy of a nested value with ``new`` at ``path``; what is beside the path is shared."""
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def reached(value: Any, path: Sequence[str | int]) -> Any:
    """What stands at ``path``."""
    for key in path:
        value = value[key]
    return value


def nasty(draw: Random) -> Any:
    """A value that readers do not expect."""
    return draw.choice(NASTY_VALUES)


def mutated_value(value: Any, draw: Random) -> Any:
    """Change a nested value at one place, or at two or three."""
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
        path = draw.choice(places(value))
        held = reached(value, path)
        if draw.random() < 0.2:
            new = reached(value, draw.choice(places(value)))
        else:
            new = _changed(held, draw)
        value = replaced(value, path, new)
    return value


def _changed(held: Any, draw: Random) -> Any:
    """Another value than the one that stands somewhere, often like it."""
    if draw.random() < 0.3:
        return nasty(draw)
    if isinstance(held, dict):
        return draw.choice(_MAPPINGS)(held, draw)
    if isinstance(held, list):
        return draw.choice(_LISTS)(held, draw)
    if isinstance(held, int | float) and not isinstance(held, bool):
        return _other_number(held, draw)
    return _other_type(held, draw)


def _without_key(held: Mapping[Any, Any], draw: Random) -> Any:
    gone = draw.choice([*held]) if held else None
    return {key: each for key, each in held.items() if key != gone}


def _with_key(held: Mapping[Any, Any], draw: Random) -> Any:
    return {**held, draw.choice(NASTY_KEYS): draw.choice([nasty(draw), *held.values()])}


def _other_key(held: Mapping[Any, Any], draw: Random) -> Any:
    """One key renamed, or written with an odd character in it."""
    if not held:
        return {draw.choice(NASTY_KEYS): 1}
    old = draw.choice([*held])
    odd = draw.choice(NASTY_KEYS)
    new = draw.choice((odd, f"{old}{odd[:3]}", f"{odd[:3]}{old}", str(old).upper()))
    return {new if key == old else key: each for key, each in held.items()}


def _exchanged(held: Mapping[Any, Any], draw: Random) -> Any:
    """The values of two keys exchanged."""
    if not held:
        return [held]
    one = draw.choice([*held])
    other = draw.choice([*held])
    return {**held, one: held[other], other: held[one]}


def _as_list(held: Mapping[Any, Any], draw: Random) -> Any:
    """The same facts as a list."""
    return draw.choice(([*held], [*held.values()], [[*each] for each in held.items()], [held]))


def _longer(held: Sequence[Any], draw: Random) -> Any:
    return [*held, draw.choice([*held, nasty(draw)])]


def _shorter(held: Sequence[Any], draw: Random) -> Any:
    return [*held[:-1]] if draw.random() < 0.5 else [*held[1:]]


def _repeated(held: Sequence[Any], draw: Random) -> Any:
    return [*held] * draw.choice((2, 3, 300))


def _one_of_other_type(held: Sequence[Any], draw: Random) -> Any:
    """The same elements, one of which is of another type."""
    if not held:
        return [nasty(draw)]
    at = draw.randrange(len(held))
    return [*held[:at], _other_type(held[at], draw), *held[at + 1 :]]


def _as_mapping(held: Sequence[Any], draw: Random) -> Any:
    """The same elements by their places, which are texts."""
    return {str(index): each for index, each in enumerate(held)}


def _nested(held: Any, draw: Random) -> Any:
    return draw.choice(([held], [[held]], [held, [held]], {"value": held}))


def _other_type(held: Any, draw: Random) -> Any:
    """Nearly the same in another type."""
    text = draw.choice((str, repr))(held)[:2_000]
    return draw.choice(
        (text, [held], {"value": held}, bool(held), None, len(text), float(len(text)))
    )


def _other_number(held: float, draw: Random) -> Any:
    """A number near by, one far away, or a text of it."""
    power = draw.choice((10, 16, 19, 40, 308, 400))
    near = (-held, held + 1, held - 1, str(held), held * 3 // 2)
    far = (10**power, -(10**power), 2**53 + 1, 2**63, 2**64, 5e-324, -1e308)
    return draw.choice((*near, *far, _other_type(held, draw)))


_MAPPINGS: tuple[Callable[[Mapping[Any, Any], Random], Any], ...] = (
    _without_key,
    _without_key,
    _with_key,
    _other_key,
    _exchanged,
    _as_list,
    _nested,
)
_LISTS: tuple[Callable[[Sequence[Any], Random], Any], ...] = (
    _longer,
    _shorter,
    _repeated,
    _one_of_other_type,
    _one_of_other_type,
    _as_mapping,
    _nested,
)
