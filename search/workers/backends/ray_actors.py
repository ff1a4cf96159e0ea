"""The Ray actors of a pool: which workers are starting, ready or gone, and on which nodes.

Workers come and go with the nodes of the cluster: where no count is asked for, a node that joins
gets workers while the study runs. A worker that loads is waited for, however long it takes: weights
of many gigabytes need minutes. Only where no worker exists, or none answers, does the wait end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from mergesearch.merging import StudyFailedError
from mergesearch.search.grammar import counted
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.arena_copy import PreparedOnce
from mergesearch.search.workers.backends.blame import Blame
from mergesearch.search.workers.backends.card_holders import CardHolders
from mergesearch.search.workers.backends.cards import Card, Cards, card_name, workers_on
from mergesearch.search.workers.backends.cluster import nodes_of
from mergesearch.search.workers.backends.loading_watch import LoadingWatch, forget_loading
from mergesearch.search.workers.backends.remote_worker import actor_factory
from mergesearch.search.workers.backends.worker_actor import WorkerActor, last_line
from mergesearch.search.workers.messages import Failure, Notice, Task, WorkerSpec

#: Seconds between two checks of the cluster's nodes.
NODE_CHECK_SECONDS = 5.0
#: Number of workers in a row that could not be built, after which none is started any more.
MAX_FAILED_STARTS = 8


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
        ready: Workers that have loaded.
        holders: The actors that hold weights for the workers of a card.
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
        self.holders = CardHolders(ray, section, spec)
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
            self.holders.forget(gone)
            there = workers_on([actor.card for actor in actors if not actor.holds])
            for card in self._cards.usable:
                if self.holders.is_missing(card):
                    self._start(card, holds=True)
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

    def admit(self, actor: WorkerActor) -> bool:
        """Move an actor that has loaded to the ready ones, or drop it if it could not be built.

        Returns:
            False if the copy that it should have read was lost meanwhile.

        Raises:
            StudyFailedError: If none is ready and another attempt would fail too.
        """
        self.starting.remove(actor)
        forget_loading(actor.key)
        try:
            failure = self.holders.admit(actor) if actor.holds else self._ray.get(actor.loaded)
        except self._ray.exceptions.RayError as error:
            self._note_failed_start(actor, error)
            return True
        if failure is not None and failure.kind == "lost":
            self._ray.kill(actor.handle, no_restart=True)
            return False
        if failure is not None:
            self.blame(actor, f"the start of {actor.key}", failure)
            return True
        self._failed_starts = 0
        if not actor.holds:
            self.ready.append(actor)
        self._prepared_once.note_loaded(actor.node)
        self._let_load()
        return True

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
        self.holders.succeed(actor.card_id)

    def lose_copy(self, actor: WorkerActor) -> list[Task]:
        """End all workers of an actor's card, whose weights are lost, and start them anew.

        Returns:
            The tasks that they had.

        Raises:
            StudyFailedError: If that happens again and again.
        """
        card = actor.card
        assert card is not None
        users = [
            one
            for one in (*self.ready, *self.starting)
            if one.card is card and one.loaded is not None
        ]
        for one in (*users, *self.holders.lose(card)):
            self._ray.kill(one.handle, no_restart=True)
        self.starting = [one for one in self.starting if one not in users]
        self.ready = [one for one in self.ready if one not in users]
        text = (
            f"the weights that workers share on {card.name} were lost with the process that held "
            f"them; {counted(len(users), 'worker')} there will be replaced"
        )
        self._notify(Notice("workers", text))
        if self.holders.losses(card) >= MAX_FAILED_STARTS:
            raise StudyFailedError(f"workers: {text}, the same {MAX_FAILED_STARTS} times in a row")
        self.start_missing()
        return [task for one in users for _, task in one.sent]

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
        for actor in _unplaceable(self._ray, self._section, self.starting, self.ready):
            self.starting.remove(actor)
            self._ray.kill(actor.handle, no_restart=True)
        if self._failed_starts < MAX_FAILED_STARTS:
            self.start_missing()
        self._checked = time.monotonic()
        self._let_load()
        self._loading.show([actor.key for actor in self.starting])
        self._give_up_without_workers()

    def kill_all(self) -> None:
        """Kill every actor, and release the cards."""
        for actor in (*self.starting, *self.ready, *self.holders.holding):
            self._ray.kill(actor.handle, no_restart=True)
        self.starting = []
        self.ready = []
        self._prepared_once.close()
        if self._cards is not None:
            self._cards.close()

    def _start(self, card: Card | None, *, holds: bool = False) -> None:
        """Start an actor, on a card if workers have some."""
        self._started += 1
        key = f"{os.getpid()}-{id(self)}-{self._started}"
        options = {} if card is None else card.options(self._ray, self._section, holds=holds)
        handle = self.holders.create(card, options) if holds else self._create(options)
        arrived = handle.whereabouts.remote()
        self.starting.append(WorkerActor(handle, arrived, key, card=card, holds=holds))

    def _let_load(self) -> None:
        """Let those load that need not wait for weights: of another node, or on their card."""
        loading = {actor.node for actor in self.starting if actor.loaded is not None}
        for actor in self.starting:
            if actor.node and actor.loaded is None and not self.holders.is_awaited_by(actor):
                permitted, server = self._prepared_once.permit(actor.node, loading)
                if permitted:
                    copy = self.holders.arguments_of(actor)
                    actor.loaded = actor.handle.load.remote(actor.key, server, *copy)
                    loading.add(actor.node)

    def _note_failed_start(self, actor: WorkerActor, error: Exception) -> None:
        """Say why a worker could not be built, and end the study if no other could be either."""
        cause = getattr(error, "cause", None) or error
        text = f"a worker could not be built: {last_line(cause)}"
        self._failed_starts += 1
        self.holders.drop(actor)
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


def _unplaceable(
    ray: Any,
    section: WorkersSection,
    starting: Sequence[WorkerActor],
    ready: Sequence[WorkerActor],
) -> Sequence[WorkerActor]:
    """Workers that were started for nodes which have left; they would wait for ever."""
    if section.gpus_each or section.count is not None:
        return []
    surplus = len(starting) + len(ready) - _wanted(ray, section)
    return starting[: max(surplus, 0)]
