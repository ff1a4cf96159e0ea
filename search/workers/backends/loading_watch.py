"""How Ray workers that load tell their driver how far they are: a note under a key of the cluster.

A worker that loads answers no calls, so it leaves its word in the key-value store of the cluster.
The alternative would be one more process that takes messages.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from mergesearch.merging.foreign.json_text import parse_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import decode
from mergesearch.merging.foreign.shown import printable
from mergesearch.search.grammar import counted
from mergesearch.search.workers.backends.cluster import import_ray
from mergesearch.search.workers.loading import Loading, describe_loading
from mergesearch.search.workers.messages import Notice

_NAMESPACE = b"mergesearch"


class LoadingWatch:
    """Announces how far workers are that load.

    Args:
        notify: Called when there is something new.
    """

    def __init__(self, notify: Callable[[Notice], None]) -> None:
        self._notify = notify
        self._shown: Loading | None = None

    def show(self, keys: Sequence[str]) -> None:
        """Announce what the furthest of the workers with these keys does."""
        heard = [word for key in keys if (word := read_loading(key)) is not None]
        if not heard:
            return
        # One prepares, the others wait for it: the one that knows a total speaks for all.
        latest = max(heard, key=lambda word: (word.total > 0, word.done, word.seconds))
        if latest != self._shown:
            self._shown = latest
            text = f"{counted(len(heard), 'worker')}, {describe_loading(latest)}"
            self._notify(Notice("loading", text, latest.done, latest.total))


def send_loading(key: str, loading: Loading) -> None:
    """Leave word for the driver; a worker that cannot goes on without."""
    with contextlib.suppress(Exception):
        import_ray().experimental.internal_kv._internal_kv_put(
            key, json.dumps(asdict(loading)), namespace=_NAMESPACE
        )


def read_loading(key: str) -> Loading | None:
    """What a worker left last; None where it has left nothing."""
    with contextlib.suppress(Exception):
        store = import_ray().experimental.internal_kv
        text = store._internal_kv_get(key, namespace=_NAMESPACE)
        return None if text is None else _loading(text)
    return None


def _loading(text: bytes) -> Loading:
    """What a worker said; it may be of another version.

    Raises:
        InputError: If it is damaged.
    """
    node = Node(parse_json(decode(text, "note"), "note"), "note")
    return Loading(
        printable(node.at("phase").text()),
        node.get("done", 0).integer(),
        node.get("total", 0).integer(),
        node.get("size", 0).integer(),
        node.get("seconds", 0.0).number(),
    )


def forget_loading(key: str) -> None:
    """Remove what a worker left."""
    with contextlib.suppress(Exception):
        import_ray().experimental.internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
