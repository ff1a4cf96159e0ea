"""Work on many tensors, several at a time, each on one thread alone.

Parallel over tensors, never inside one: sums and decompositions then give the same bits whatever
the number of threads, so that what is prepared for a search, exported from it, and merged by hand
agree. It is faster too: torch's own threads wait for one another at every operation, which on a
busy machine costs ten times the operation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from threading import local
from typing import TypeVar

from mergesearch.merging.tensors.progress import report

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = 1,
    size_of: Callable[[Item], int] | None = None,
) -> Iterator[Result]:
    """``work(item)`` for every item, in order, on ``threads`` threads.

    At most ``threads`` results exist that have not been taken. Finished items are reported as
    progress; what runs inside an item has no listener, because it runs on another thread.

    Args:
        work: What to do with an item.
        items: In the order of the results.
        threads: Threads that work.
        size_of: Bytes of an item, for the progress.
    """
    total = len(items) if isinstance(items, Sized) else 0
    done = 0
    size = 0

    def taken() -> Result:
        nonlocal done, size
        item, future = waiting.popleft()
        result = future.result()
        done += 1
        size += 0 if size_of is None else size_of(item)
        report(done, total, size)
        return result

    with _workers(threads) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= threads:
                    yield taken()
            while waiting:
                yield taken()
        finally:
            for _, future in waiting:
                future.cancel()


def run_single_threaded(work: Callable[[], Result], threads: int = 1) -> Result:
    """``work()`` on one thread, for the same bits as in :func:`parallel_map`.

    A :func:`nested_parallel_map` in it may use ``threads``.
    """
    with _workers(1, threads) as pool:
        return pool.submit(copy_context().run, work).result()


def nested_parallel_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """:func:`parallel_map` inside work that this module runs.

    It uses as many threads as that work may: those given to :func:`run_single_threaded`, or to the
    outer :func:`parallel_map`.
    """
    return parallel_map(work, items, getattr(_own, "threads", 1))


_own = local()


@contextmanager
def _workers(count: int, threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` threads in which torch starts no threads of its own.

    ``threads`` is the number that :func:`nested_parallel_map` uses in them, ``count`` if it is
    None.
    """
    import torch

    def start() -> None:
        torch.set_num_threads(1)
        _own.threads = threads or count

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=start) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
