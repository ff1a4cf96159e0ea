"""replay."""

from __future__ import annotations

from contextlib import AbstractContextManager

#: How far a replayed point may lie from the recorded one, relative to the range of its coordinate.
REPLAY_TOLERANCE = 1e-9


def _one_blas_thread() -> AbstractContextManager[object]:
    """Linear algebra of strategies on one thread: with more, the bits depend on their number, and
    so would replay.

    Torch brings a library of its own, which this does not touch.
    """
    import scipy.linalg  # noqa: F401  # the limit reaches libraries that are loaded
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
