"""The Ray actors of a pool: which workers are starting, ready or gone, and on which nodes.

Workers come and go with the nodes of the cluster: where no count is asked for, a node that joins
gets workers while the study runs. A worker that loads is waited for, however long it takes: weights
of many gigabytes need minutes. Only where no worker exists, or none answers, does the wait end.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mergesearch.merging import InputError, StudyFailedError
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.arena_copy import PreparedOnce
from mergesearch.search.workers.backends.blame import Blame
from mergesearch.search.workers.backends.cards import Card, Cards, card_name, workers_on
from mergesearch.search.workers.backends.cluster import nodes_of
from mergesearch.search.workers.backends.loading_watch import LoadingWatch, forget_loading
from mergesearch.search.workers.backends.placement import place, report
from mergesearch.search.workers.backends.remote_worker import actor_factory
from mergesearch.search.workers.messages import Failure, Notice, Task, WorkerSpec

#: Seconds between two checks of the cluster's nodes.
NODE_CHECK_SECONDS = 5.0
#: Number of workers in a row that could not be built, after which none is started any more.
MAX_FAILED_STARTS = 8


@dataclass(eq=False)
class WorkerActor:
    """A worker in a process of its own.

    Attributes:
        handle: The Ray actor.
        arrived: Object reference that is pending until the process exists; then where it is.
        loaded: Object reference that is pending until the worker has loaded; None until it may.
        key: Where it leaves word of its loading.
        card: The GPUs that it has; None for workers without.
        node: Id of its node, once the process exists.
        sent: Object references and tasks that it has been sent, oldest first.
    """

    handle: Any
    arrived: Any
    key: str
    loaded: Any = None
    card: Card | None = None
    node: str = ""
    sent: deque[tuple[Any, Task]] = field(default_factory=deque)

    @property
    def card_id(self) -> str:
        """Id of its card, empty for workers without one."""
        return "" if self.card is None else self.card.id


class RayActors:
    """Starts, replaces and removes the actors of a pool.

    Args:
        ray: Ray, connected.
        section: How many workers, and what each takes.
        spec: What they are built from.
        notify: Called with messages on nodes that come and go, on workers that load or cannot be
            built, and on cards that are set aside.
        wait_seconds: How long to wait for a first worker to exist, and for another one once all are
            lost. One that loads is waited for.

    Attributes:
        starting: Actors that have not loaded yet.
        ready: Actors that have loaded.
    """

    def __init__(
        self,
        ray: Any,
        section: WorkersSection,
        spec: WorkerSpec,
        notify: Callable[[Notice], None],
        wait_seconds: float,
    ) -> None:
        self.starting: list[WorkerActor] = []
        self.ready: list[WorkerActor] = []
        self._ray = ray
        self._section = section
        self._notify = notify
        self._wait_seconds = wait_seconds
        self._failed_starts = 0
        self._started = 0
        self._nodes = {node.name for node in nodes_of(ray)}
        self._create = actor_factory(ray, section, spec)
        self._cards = Cards(ray, section) if section.gpus_each else None
        self._prepared_once = PreparedOnce(ray, spec)
        self._blame = Blame()
        self._loading = LoadingWatch(notify)
        self._checked = time.monotonic()
        self._last_seen = time.monotonic()

    def start_missing(self) -> None:
        """Start as many workers as there should be now and are not."""
        actors = (*self.starting, *self.ready)
        if self._cards is None:
            for _ in range(max(_wanted(self._ray, self._section) - len(actors), 0)):
                self._start(None)
        else:
            gone = self._cards.follow(nodes_of(self._ray))
            self.starting = [actor for actor in self.starting if actor.card not in gone]
            there = workers_on([actor.card for actor in actors])
            for card in self._cards.usable:
                for _ in range(card.workers - there[card.id]):
                    self._start(card)
        self._checked = time.monotonic()

    def arrive(self, actor: WorkerActor) -> None:
        """Note where the process of an actor is, and let it load.

        Raises:
            StudyFailedError: If it could not begin, and neither could another.
        """
        try:
            actor.node, gpus = self._ray.get(actor.arrived)
        except self._ray.exceptions.RayError as error:
            self.starting.remove(actor)
            self._note_failed_start(actor, error)
            return
        if actor.card is not None:
            actor.card.name = card_name(actor.card.node, gpus)
        self._let_load()

    def admit(self, actor: WorkerActor) -> None:
        """Move an actor that has loaded to the ready ones, or drop it if it could not be built.

        Raises:
            StudyFailedError: If none is ready and another attempt would fail too.
        """
        self.starting.remove(actor)
        forget_loading(actor.key)
        try:
            failure: Failure | None = self._ray.get(actor.loaded)
        except self._ray.exceptions.RayError as error:
            self._note_failed_start(actor, error)
            return
        if failure is not None:
            self.blame(actor, f"the start of {actor.key}", failure)
            return
        self._failed_starts = 0
        self.ready.append(actor)
        self._prepared_once.note_loaded(actor.node)
        self._let_load()

    def blame(self, actor: WorkerActor, task: str, failure: Failure) -> bool:
        """End a worker whose device has broken, and set its card aside if it breaks again.

        Args:
            actor: The worker.
            task: What it ran.
            failure: The error.

        Returns:
            Whether the task itself is at fault.

        Raises:
            StudyFailedError: If no card is left.
        """
        if actor in self.ready:
            self.ready.remove(actor)
        self._ray.kill(actor.handle, no_restart=True)
        guilty = self._blame.add(task, actor.card_id, failure.message)
        card = actor.card
        if card is not None and not card.set_aside and self._blame.is_bad(card.id):
            self._set_aside(card, failure)
        elif not guilty:
            where = "" if card is None else f" on {card.name}"
            text = f"a worker was replaced after a device error{where}: {failure.message}"
            self._notify(Notice("workers", text))
        self.start_missing()
        return guilty

    def succeed(self, actor: WorkerActor, task: str) -> None:
        """Note that a worker's card has answered a task."""
        self._blame.succeed(task, actor.card_id)

    def allowed(self, task: str) -> list[WorkerActor]:
        """Ready workers that a task may go to: not on cards that failed it, if there are others."""
        met = self._blame.cards_of(task)
        alive = (*self.ready, *(actor for actor in self.starting if actor.node))
        if all(actor.card_id in met for actor in alive):
            return self.ready
        return [actor for actor in self.ready if not actor.card_id or actor.card_id not in met]

    def check_nodes(self) -> None:
        """From time to time, see which nodes there are, and start the workers that are missing.

        Raises:
            StudyFailedError: If there has been no worker for too long.
        """
        if time.monotonic() - self._checked < NODE_CHECK_SECONDS:
            return
        names = {node.name for node in nodes_of(self._ray)}
        for change, changed in (("joined", names - self._nodes), ("left", self._nodes - names)):
            for name in sorted(changed):
                self._notify(Notice("workers", f"node {name} {change} the cluster"))
        self._nodes = names
        if self._cards is None:
            self._drop_unplaceable()
        if self._failed_starts < MAX_FAILED_STARTS:
            self.start_missing()
        self._checked = time.monotonic()
        self._let_load()
        self._loading.show([actor.key for actor in self.starting])
        self._give_up_without_workers()

    def kill_all(self) -> None:
        """Kill every actor, and release the cards."""
        for actor in (*self.starting, *self.ready):
            self._ray.kill(actor.handle, no_restart=True)
        self.starting = []
        self.ready = []
        self._prepared_once.close()
        if self._cards is not None:
            self._cards.close()

    def _start(self, card: Card | None) -> None:
        """Start an actor, on a card if workers have some."""
        self._started += 1
        key = f"{os.getpid()}-{id(self)}-{self._started}"
        handle = self._create({} if card is None else card.options(self._ray, self._section))
        arrived = handle.whereabouts.remote()
        self.starting.append(WorkerActor(handle, arrived, key, card=card))

    def _let_load(self) -> None:
        """Let those load that need not wait until another node has prepared what they copy."""
        loading = {actor.node for actor in self.starting if actor.loaded is not None}
        for actor in self.starting:
            if actor.node and actor.loaded is None:
                permitted, server = self._prepared_once.permit(actor.node, loading)
                if permitted:
                    actor.loaded = actor.handle.load.remote(actor.key, server)
                    loading.add(actor.node)

    def _note_failed_start(self, actor: WorkerActor, error: Exception) -> None:
        """Say why a worker could not be built, and end the study if no other could be either."""
        cause = getattr(error, "cause", None) or error
        text = f"a worker could not be built: {last_line(cause)}"
        self._failed_starts += 1
        # A worker that died while loading may have been killed; one that raised would raise again.
        final = isinstance(error, self._ray.exceptions.RayTaskError) or getattr(
            error, "actor_init_failed", False
        )
        self._ray.kill(actor.handle, no_restart=True)
        if not self.ready and (final or self._failed_starts >= MAX_FAILED_STARTS):
            raise StudyFailedError(text) from error
        self._notify(Notice("workers", text))

    def _set_aside(self, card: Card, failure: Failure) -> None:
        """Start no worker on a card any more, and end those that are there or wait for it."""
        assert self._cards is not None
        card.set_aside = True
        self._notify(Notice("set aside", f"{card.name}: {failure.message}"))
        for actor in [one for one in self.starting if one.card is card]:
            self.starting.remove(actor)
            self._ray.kill(actor.handle, no_restart=True)
        self._cards.follow(nodes_of(self._ray))  # takes another in its place, if there is one
        if self._cards.all_set_aside:
            raise StudyFailedError(
                f"workers: expected a GPU that works, found every one set aside after device "
                f"errors, the last {card.name}: {failure.message}; no recorded result is lost, "
                "the same command goes on once they are mended"
            )

    def _drop_unplaceable(self) -> None:
        """Kill workers that were started for nodes which have left; they would wait for ever."""
        surplus = len(self.starting) + len(self.ready) - _wanted(self._ray, self._section)
        for actor in self.starting[:]:
            if surplus <= 0 or self._section.count is not None:
                return
            self.starting.remove(actor)
            self._ray.kill(actor.handle, no_restart=True)
            surplus -= 1

    def _give_up_without_workers(self) -> None:
        if self.ready or any(actor.node for actor in self.starting):
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > self._wait_seconds:
            raise StudyFailedError(
                f"workers: expected one within {self._wait_seconds:g} s, found none on "
                f"{len(self._nodes)} nodes of the cluster; no recorded result is lost, the same "
                "command goes on once there are nodes"
            )


def _wanted(ray: Any, section: WorkersSection) -> int:
    """How many workers without GPUs there should be now."""
    if section.count is not None:
        return section.count
    return sum(node.holds(section) for node in nodes_of(ray))


def is_node_lost(ray: Any, actor: WorkerActor, error: Exception) -> bool:
    """Whether a dead actor's node is gone too."""
    # Ray may report the loss of an actor before that of its node, and says so in words only.
    alive = actor.node in {node.id for node in nodes_of(ray)}
    return not alive or getattr(error, "preempted", False) or "its node has died" in str(error)


def announce_placement(ray: Any, section: WorkersSection, notify: Callable[[Notice], None]) -> None:
    """Say where workers will be.

    Raises:
        InputError: If they do not fit on the cluster.
    """
    nodes = nodes_of(ray)
    placements = place(nodes, section, section.count)
    placed = sum(placement.workers for placement in placements)
    wanted = section.count or 1
    if placed < wanted:
        cpus = sum(node.cpus for node in nodes)
        gpus = sum(node.gpus for node in nodes)
        lacking, have = ("GPU", gpus) if section.gpus_each * wanted > gpus else ("CPU", cpus)
        each = section.gpus_each if lacking == "GPU" else section.cpus
        raise InputError(
            f"workers: expected {each * wanted:g} {lacking}s for {wanted} workers, received "
            f"{have:g} on {len(nodes)} nodes, where {placed} fit; lower workers.count or "
            f"workers.{lacking.lower()}s"
        )
    for line in report(placements, section):
        notify(Notice("workers", line))


def last_line(error: BaseException) -> str:
    """The last line of an error: Ray wraps messages in many lines, the last one says the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
