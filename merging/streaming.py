"""Tensor after tensor, several at a time, each worked out by one thread alone.

Parallel over tensors, never inside one: sums and decompositions then give the same bits whatever the number of
threads, so that what is prepared for a search, exported from it, and merged by hand agree. It is faster too: torch's
own threads wait for one another at every operation, which on a busy machine costs ten times the operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item], threads: int = 1) -> Iterator[Result]:
    """``work(item)`` for every item, in order; at most ``threads`` results exist that have not been taken."""
    with _workers(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def alone(work: Callable[[], Result]) -> Result:
    """``work()`` on one thread, for the same bits as in :func:`each`."""
    with _workers(1) as pool:
        return pool.submit(work).result()


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch takes no further ones."""
    import torch

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
