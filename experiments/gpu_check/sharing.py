"""One arena on a card for two and for four processes, by the handles that the product gives out.

On CUDA these are IPC handles; where a device computes in main memory, mapped files instead.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments.gpu_check.arenas import ENCODINGS, Arena, Plan, planned_llama, tensor_field
from experiments.gpu_check.check import Figure, Machine, Skipped
from mergesearch.merging import InputError
from mergesearch.merging.resident.sharing.copies import AttachedCopy, HeldCopy, card_identity
from mergesearch.merging.resident.sharing.kinds import kind_of
from mergesearch.merging.resident.sharing.protocol import ArenaHandle, Wanted

#: Bytes of the arena at full scale, and the share of a card that it may take.
BYTES = 8e9
SHARE = 0.3
DIRECTIONS = 4
WORKERS = (2, 4)

#: Names the arena for those that attach.
_NAME = "gpu-check"


@dataclass(frozen=True)
class Work:
    """What a process needs to merge from the arena of another."""

    plan: Plan
    handle: ArenaHandle
    device: str
    threads: int


@dataclass(frozen=True)
class Answer:
    """What a process says: the digest of its merge, and how long it took to attach and merge."""

    digest: str
    seconds: float


def run(machine: Machine) -> Sequence[Figure]:
    """Figures for each number of processes."""
    try:
        kind_of(machine.device)
    except InputError as error:
        raise Skipped(str(error)) from error
    limit = machine.at_most(BYTES, SHARE)
    planned, _ = planned_llama(limit, machine.hidden, ENCODINGS["stored bf16"], DIRECTIONS)
    held = HeldCopy(_NAME, planned.bytes, machine.device, machine.folder / "held")
    try:
        expected = digest_of(Arena.filled(planned, held.memory))
        work = Work(planned, held.offer(), machine.device, machine.threads)
        return [figure for count in WORKERS for figure in _one(machine, work, count, expected)]
    finally:
        held.close()


def digest_of(arena: Arena) -> str:
    """The bits of a merge."""
    out = torch.zeros(arena.plan.size, dtype=torch.bfloat16, device=arena.memory.device)
    arena.merge(tensor_field(arena.plan), "delta", out)
    return hashlib.sha256(out.cpu().view(torch.int16).numpy().data).hexdigest()


def _one(machine: Machine, work: Work, count: int, expected: str) -> Iterator[Figure]:
    before = machine.memory()
    answers, after = _ask(machine, work, count)
    equal = sum(answer.digest == expected for answer in answers)
    slowest = max(answer.seconds for answer in answers)
    yield Figure(
        f"{count} processes on one arena of {work.plan.bytes / 1e9:.3g} GB, by {work.handle.kind}",
        f"{equal} of {count} merges have the holder's bits, attached and merged in {slowest:.1f} s",
        "all",
        equal == count,
    )
    if before is not None and after is not None:
        taken = before[0] - after[0]
        yield memory_figure(count, taken, work.plan, judged=machine.judges_speed)


def memory_figure(count: int, taken: int, planned: Plan, *, judged: bool) -> Figure:
    """What each of some processes takes on the card beside the arena and its merged weights.

    Args:
        count: Of the processes.
        taken: Bytes of them all.
        planned: Of the arena; a process that copied it would take its size, one that does not takes
            a context.
        judged: Whether the arena is so large that a context is little beside it.
    """
    each = (taken - count * 2 * planned.size) / count
    return Figure(
        f"{count} processes: memory of each beside its merged weights",
        f"{each / 1e9:.2f} GB, the arena has {planned.bytes / 1e9:.3g} GB",
        "half the arena",
        each < planned.bytes / 2 if judged else None,
    )


def _ask(machine: Machine, work: Work, count: int) -> tuple[list[Answer], tuple[int, int] | None]:
    """The answers of so many processes, and the card's memory while all are attached."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    release = context.Event()
    processes = [
        context.Process(target=_attach, args=(work, answers, release)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = _collected(machine, processes, answers)
        memory = machine.memory()
    finally:
        release.set()
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    return found, memory


def _attach(work: Work, answers: Any, release: Any) -> None:
    """The work of a process; it stays with what it holds until it is released, or left alone."""
    torch.set_num_threads(work.threads)
    began = time.perf_counter()
    wanted = Wanted(card_identity(work.device), _NAME, work.plan.bytes)
    attached = AttachedCopy(work.handle, wanted, work.device)
    digest = digest_of(Arena(work.plan, attached.memory))
    answers.put(Answer(digest, time.perf_counter() - began))
    parent = multiprocessing.parent_process()
    while not release.wait(1) and parent is not None and parent.is_alive():
        pass
    attached.close()


def _collected(machine: Machine, processes: Sequence[Any], answers: Any) -> list[Answer]:
    """One answer of each process.

    Raises:
        RuntimeError: If one ends without, or time is up.
    """
    found: list[Answer] = []
    deadline = time.monotonic() + machine.seconds
    while len(found) < len(processes):
        try:
            found.append(answers.get(timeout=1))
        except queue.Empty:
            ended = [process.exitcode for process in processes if process.exitcode is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(
                    f"expected an answer of {len(processes)} processes, received {len(found)}; "
                    f"exit codes of those that ended: {ended}"
                ) from None
    return found
