"""A Ray actor of a pool, as its driver sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mergesearch.search.workers.backends.cards import Card
from mergesearch.search.workers.backends.cluster import nodes_of
from mergesearch.search.workers.messages import Task


@dataclass(eq=False)
class WorkerActor:
    """A worker in a process of its own, or the process that holds what workers of a card share.

    Attributes:
        handle: The Ray actor.
        arrived: Object reference that is pending until the process exists; then where it is.
        loaded: Object reference that is pending until the worker has loaded; None until it may.
        key: Where it leaves word of its loading.
        card: The GPUs that it has; None for workers without.
        holds: Whether it only holds the weights of its card; it is sent no tasks, and once it has
            loaded, ``loaded`` is pending as long as it lives.
        node: Id of its node, once the process exists.
        sent: Object references and tasks that it has been sent, oldest first.
    """

    handle: Any
    arrived: Any
    key: str
    loaded: Any = None
    card: Card | None = None
    holds: bool = False
    node: str = ""
    sent: deque[tuple[Any, Task]] = field(default_factory=deque)

    @property
    def card_id(self) -> str:
        """Id of its card, empty for workers without one."""
        return "" if self.card is None else self.card.id


def is_node_lost(ray: Any, actor: WorkerActor, error: Exception) -> bool:
    """Whether a dead actor's node is gone too."""
    # Ray may report the loss of an actor before that of its node, and says so in words only.
    alive = actor.node in {node.id for node in nodes_of(ray)}
    return not alive or getattr(error, "preempted", False) or "its node has died" in str(error)


def last_line(error: BaseException) -> str:
    """The last line of an error: Ray wraps messages in many lines, the last one says the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
