"""Results of one pass over many tensors, kept for each tensor by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.reading import decode
from mergesearch.merging.tensors.memo import Tensors, laid_out
from mergesearch.merging.tensors.source import remembered

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.source import TensorSource


#: Results for single tensors: (tensor name, its result).
Pieces = Iterable[tuple[str, Tensors]]


def memoised_per_tensor(
    sources: Sequence[TensorSource], key: Sequence[Any] | None, compute: Callable[[], Pieces]
) -> Callable[[str], Tensors]:
    """The results of one pass over many tensors, by tensor name.

    Names that the pass gives no result for have an empty one.

    The pass is made here and now, unless the memo has all of it. With a memo each result is written
    as soon as it is there and read when asked for; without one all are held.

    Args:
        sources: What the result depends on; the memo is that of the first.
        key: What else it depends on, as for :func:`remembered`; None to hold everything.
        compute: The pass.
    """
    if key is None or sources[0].memo is None or not all(source.identity for source in sources):
        held = {name: laid_out(tensors) for name, tensors in compute()}
        return lambda name: held.get(name, {})
    prefix = key  # not None, also in the functions below

    def write_all() -> Tensors:
        names = []
        for name, tensors in compute():
            remembered(sources, [*prefix, "piece", name], partial(dict, tensors))
            names.append(name)
        return {"names": _as_bytes(names)}

    kept = remembered(sources, [*prefix, "names"], write_all)
    names = _from_bytes(kept)
    if names is None:  # whole by its checksum, but no list of names: of another version
        names = frozenset(_from_bytes(write_all()) or ())
    one_pass = Lock()

    def recompute(name: str) -> Tensors:
        # Only after a result was lost; the model cannot serve two passes at once.
        with one_pass:
            return dict(compute())[name]

    def get(name: str) -> Tensors:
        return (
            remembered(sources, [*prefix, "piece", name], partial(recompute, name))
            if name in names
            else {}
        )

    return get


def _as_bytes(names: Sequence[str]) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def _from_bytes(kept: Tensors) -> frozenset[str] | None:
    """The names that :func:`_as_bytes` wrote, None where something else stands there."""
    text = kept.get("names")
    if text is None or str(text.dtype) != "torch.uint8" or text.ndim != 1:
        return None
    try:
        names = parse_json(decode(bytes(text.tolist()), "memo"), "memo")
    except InputError:
        return None
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return frozenset(names) if listed else None
