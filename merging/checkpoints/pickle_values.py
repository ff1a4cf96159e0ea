"""Pickles followed as data: no class is looked up, and nothing is imported, called or made.

A pickle is a program for a machine with a stack. The standard library's ``pickletools`` splits it
into opcodes and executes none. Here they move plain values only; what unpickling would have looked
up, called or made stays a note of its name (:class:`Named`, :class:`Made`, :class:`Persistent`).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from mergesearch.merging.foreign.shown import name_shown

#: Classes that are read as dictionaries.
_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict"})
#: Opcodes that push what stands beside them.
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function by its name, ``module.name``; it was not looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """What unpickling would have made: by which class or function, and of what."""

    name: str
    arguments: Any


@dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to something outside the pickle."""

    key: Any


class BrokenPickleError(ValueError):
    """A pickle that cannot be followed."""


def read_pickle(stream: IO[bytes]) -> tuple[Any, list[Persistent]]:
    """The value of the next pickle of a stream, and the references outside that it makes.

    Reads up to the end of the pickle.

    Raises:
        BrokenPickleError: If it is damaged, or has an opcode that is not known here.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop(), machine.persistents
            _STEPS[opcode.name](machine, argument)
    except KeyError as error:
        raise BrokenPickleError(
            f"expected a known opcode, received {name_shown(str(error))}"
        ) from error
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise BrokenPickleError(
            f"received a damaged pickle ({name_shown(str(error), 100)})"
        ) from error
    raise BrokenPickleError("received a pickle without an end")


class _Machine:
    """Stack, marks and memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.persistents: list[Persistent] = []

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """Take the last ``count`` values from the stack, in their order."""
        if count > len(self.stack):
            raise IndexError("its stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())

    def keep(self, place: int) -> None:
        """Remember the last value."""
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        """Push what was remembered."""
        if place not in self.memo:
            raise IndexError("it recalls what it never kept")
        self.push(self.memo[place])

    def persist(self, key: Any) -> None:
        """Push a reference to something outside."""
        self.persistents.append(Persistent(key))
        self.push(self.persistents[-1])


def _made(maker: Any, arguments: Any) -> Any:
    name = maker.name if isinstance(maker, Named | Made) else "an unnamed class"
    if name not in _MAPPINGS:
        return Made(name, arguments)
    pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        _set(mapping, [key, value])
    return mapping


def _set(target: Any, items: list[Any]) -> None:
    """Add keys and values, which alternate; only to a dictionary, and only keys that are plain."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key is None or isinstance(key, str | int | float | bytes):
                target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _append(machine: _Machine, _: Any) -> None:
    (item,) = machine.pop(1)
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    _extend(machine.stack[-1], items)


def _set_item(machine: _Machine, _: Any) -> None:
    pair = machine.pop(2)
    _set(machine.stack[-1], pair)


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    _set(machine.stack[-1], items)


def _dict_of(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.push({})
    _set(machine.stack[-1], items)


def _name_from_stack(machine: _Machine, _: Any) -> None:
    module, name = machine.pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name is no text")
    machine.push(Named(f"{module}.{name}"))


def _call(machine: _Machine, count: int) -> None:
    maker, arguments = machine.pop(count)[:2]
    machine.push(_made(maker, arguments))


def _call_to_mark(machine: _Machine, _: Any) -> None:
    maker, *arguments = machine.pop_to_mark()
    machine.push(_made(maker, tuple(arguments)))


def _instance(machine: _Machine, name: str) -> None:
    arguments = tuple(machine.pop_to_mark())
    machine.push(_made(Named(name.replace(" ", ".", 1)), arguments))


_Step = Callable[[_Machine, Any], None]
_SETS: dict[str, _Step] = {
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "ADDITEMS": _appends,
    "FROZENSET": lambda machine, _: machine.push(machine.pop_to_mark()),
}
_CONTAINERS: dict[str, _Step] = {
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "DICT": _dict_of,
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
}
_STACK: dict[str, _Step] = {
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: _forget(machine.pop(1)),
    "POP_MARK": lambda machine, _: _forget(machine.pop_to_mark()),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.keep(len(machine.memo)),
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
}
_OBJECTS: dict[str, _Step] = {
    "GLOBAL": lambda machine, name: machine.push(Named(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": _name_from_stack,
    "REDUCE": lambda machine, _: _call(machine, 2),
    "NEWOBJ": lambda machine, _: _call(machine, 2),
    "NEWOBJ_EX": lambda machine, _: _call(machine, 3),
    "OBJ": _call_to_mark,
    "INST": _instance,
    "BUILD": lambda machine, _: _forget(machine.pop(1)),
    "PERSID": lambda machine, key: machine.persist(key),
    "BINPERSID": lambda machine, _: machine.persist(machine.pop(1)[0]),
}


def _forget(_: Any) -> None:
    """Let go of values, such as the state of an object that is not made."""


#: Opcode -> what it does to the machine.
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.keep),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **_STACK,
    **_CONTAINERS,
    **_SETS,
    **_OBJECTS,
}
