"""Where generated tokens first hold a stop string, looked for on the device while they come.

:class:`transformers.StopStringCriteria` matches tokens against stop strings by table look-ups on
the device, so that no step waits for text. Some tokenizers write a token differently within a text
than alone, so its word is not the last one: once a batch is done, its texts are decoded on the
host, which cuts them exactly and notices rows that were stopped for no reason.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Criterion = Callable[..., Any]


class DeviceCriterion:
    """Stops rows without decoding them.

    Args:
        search: Looks for stop strings at the end of rows ``(rows, tokens)``.
        start: Column of the first new token; prompts are not searched.
    """

    def __init__(self, search: Criterion, start: int) -> None:
        self._search = search
        self._start = start
        self._stopped: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        """Whether each row ends with a stop string ``(rows,)``."""
        found: torch.Tensor = self._search(ids[:, self._start :], scores)
        self._stopped = found if self._stopped is None else self._stopped | found
        return found

    def stopped(self) -> list[bool]:
        """Whether each row was ever said to end with a stop string, fetched from the device."""
        assert self._stopped is not None
        stopped: list[bool] = self._stopped.tolist()
        return stopped


def device_criterion(tokenizer: Any, until: Sequence[str], start: int) -> DeviceCriterion | None:
    """Make a criterion for a batch, or None where the tokenizer's tokens cannot be matched."""
    from transformers import StopStringCriteria

    try:
        return DeviceCriterion(StopStringCriteria(tokenizer, list(until)), start)
    except Exception:  # whatever a tokenizer without a plain vocabulary raises
        return None


def host_criterion(tokenizer: Any, until: Sequence[str], start: int) -> Criterion:
    """Make a criterion that decodes the last new tokens of all rows in every step."""
    import torch

    # Every token is at least one byte; a stop string may begin within one more.
    reach = 1 + max(len(text.encode()) for text in until)

    def stopped(ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        tails = tokenizer.batch_decode(
            ids[:, max(start, ids.shape[1] - reach) :], skip_special_tokens=True
        )
        return torch.tensor([holds_stop(tail, until) for tail in tails], device=ids.device)

    return stopped


def holds_stop(text: str, until: Sequence[str]) -> bool:
    """Whether a text holds a stop string."""
    return any(stop in text for stop in until)


def stopped_length(tokenizer: Any, row: Sequence[int], until: Sequence[str]) -> int:
    """Number of the first tokens that hold a stop string; all where their text holds none."""

    def holds(count: int) -> bool:
        return holds_stop(tokenizer.decode(row[:count], skip_special_tokens=True), until)

    return bisect_left(range(len(row)), True, key=holds)
