"""The most memory that this process has held."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peak:
    """Bytes of main memory that were resident at most, and of one card that torch held at most."""

    memory: int
    card: int | None


def peak() -> Peak:
    """The peak so far, Python and its libraries included."""
    return Peak(_resident(), _on_card())


def _resident() -> int:
    status = Path("/proc/self/status")
    # What getrusage says begins at the parent's size on Linux, if this process was started by it.
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found is not None:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _on_card() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return max(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
