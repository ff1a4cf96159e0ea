"""What the process does that holds base and rows of a study on a card for its workers."""

from __future__ import annotations

from mergesearch.merging.resident.sharing.copies import HeldCopy
from mergesearch.merging.tensors.accelerator import device_here
from mergesearch.search.workers.card_copy import lifelines
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import WorkerSpec
from mergesearch.search.workers.resident_model import opened_arenas


def hold_copy(spec: WorkerSpec, loading: LoadingReporter) -> HeldCopy:
    """Prepare the arena of a study if it is not there, and upload it to this process's card.

    What that needs beside the copy is two chunks of main memory.

    Raises:
        MergesearchError: If the arena cannot be opened, or the card cannot be shared.
    """
    from mergesearch.merging.resident.upload import CHUNK, copy_bytes

    arenas = opened_arenas(spec, loading)
    chunks = -(-len(arenas.memory) // CHUNK)

    def told(done: int) -> None:
        loading(-(-done // CHUNK), chunks, done)

    loading.begin("uploading weights")
    held = HeldCopy(arenas.name, len(arenas.memory), device_here(spec.device), lifelines())
    copy_bytes(arenas.memory, held.memory, told)
    return held
