"""One copy for the processes of a card: its protocol, and real processes that share a file."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging.errors import InputError
from mergesearch.merging.resident.sharing.copies import AttachedCopy, HeldCopy, card_identity
from mergesearch.merging.resident.sharing.kinds import (
    kind_of,
    plain_payload,
    rebuild_arguments,
    refuse_expandable_segments,
    turn_off_expandable_segments,
    without_expandable_segments,
)
from mergesearch.merging.resident.sharing.lifeline import Lifeline, is_alive
from mergesearch.merging.resident.sharing.protocol import (
    ArenaHandle,
    CardIdentity,
    CopyLostError,
    SharedCopy,
    SharingError,
    Wanted,
    check_handle,
)
from mergesearch.merging.resident.upload import copy_bytes

CARD = CardIdentity("node", "GPU 1")
HANDLE = ArenaHandle("first", CARD, "key.content", 100, "file", ("path",), "lifeline")
WANTED = Wanted(CARD, "key.content", 100)
#: Steps of the protocol by name.
STEPS: dict[str, Callable[[SharedCopy], object]] = {
    "begin": lambda copy: copy.begin(),
    "finish": lambda copy: copy.finish(HANDLE),
    "attach": lambda copy: copy.attach(),
    "end": lambda copy: copy.end(),
}


@pytest.mark.parametrize(("steps", "state", "allowed"), [
    ([], "empty", {"begin", "end"}), (["begin"], "loading", {"finish", "end"}),
    (["begin", "finish"], "ready", {"attach", "end"}),
    (["begin", "finish", "end"], "gone", {"begin", "end"}),
    (["begin", "end"], "gone", {"begin", "end"}),
])  # fmt: skip
def test_the_protocol_has_an_order(steps: list[str], state: str, allowed: set[str]) -> None:
    for step, take in STEPS.items():
        copy = SharedCopy()
        for before in steps:
            STEPS[before](copy)
        assert copy.state == state
        if step in allowed:
            take(copy)
        else:
            with pytest.raises(SharingError, match=f"expected {step} in state .*'?{state}"):
                take(copy)
            assert copy.state == state


def test_a_generation_comes_once() -> None:
    copy = SharedCopy()
    copy.begin()
    copy.finish(HANDLE)
    assert copy.attach() is HANDLE
    copy.end()
    copy.begin()
    with pytest.raises(SharingError, match="expected a new generation, received first"):
        copy.finish(HANDLE)
    copy.finish(replace(HANDLE, generation="second"))
    assert copy.attach().generation == "second"


@pytest.mark.parametrize(("change", "message"), [
    ({"card": CardIdentity("node", "GPU 2")}, "card GPU 1 of node, received a handle to GPU 2"),
    ({"card": CardIdentity("other", "GPU 1")}, "received a handle to GPU 1 of other"),
    ({"arena": "key.other"}, "arena key.content, received a handle to key.other"),
    ({"size": 99}, "number of bytes 100, received a handle to 99"),
])  # fmt: skip
def test_a_handle_to_something_else_is_refused(change: dict[str, object], message: str) -> None:
    check_handle(HANDLE, WANTED)
    with pytest.raises(SharingError, match=message):
        check_handle(replace(HANDLE, **change), WANTED)  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "off"), [
    ("", "expandable_segments:False"),
    ("expandable_segments:True", "expandable_segments:False"),
    ("max_split_size_mb:64, expandable_segments : true",
     "max_split_size_mb:64,expandable_segments:False"),
])  # fmt: skip
def test_expandable_segments_are_turned_off_or_refused(setting: str, off: str) -> None:
    assert without_expandable_segments(setting) == off
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: setting}
        if "rue" in setting:
            with pytest.raises(InputError, match=f"{name}: expected expandable_segments:False"):
                refuse_expandable_segments(environment)
        turn_off_expandable_segments(environment)
        assert environment == {name: off}
        refuse_expandable_segments(environment)


def test_a_handle_of_cuda_names_the_card_as_the_reader_does() -> None:
    counter = (b"counter", 3, b"event", True)
    shape = (torch.Tensor, torch.Size([100]), (1,), 512, torch.storage.TypedStorage, torch.uint8)
    sent = (*shape, 5, b"handle", 2_097_152, 1024, False, *counter)
    payload = plain_payload(sent)
    assert all(isinstance(value, int | bytes) for value in payload)
    assert rebuild_arguments(payload, 100, 0) == (*sent[:6], 0, *sent[7:])


def test_devices_whose_memory_cannot_be_shared_are_refused() -> None:
    assert (kind_of("cpu"), kind_of("cuda:3")) == ("file", "cuda_ipc")
    with pytest.raises(InputError, match=r"received mps; set workers\.per_gpu: 1"):
        kind_of("mps")


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 4097])
def test_bytes_arrive_in_chunks(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    told: list[int] = []
    copy_bytes(source, target, told.append, chunk=1024)
    assert np.array_equal(target.numpy(), source)
    assert told == [*range(1024, size, 1024), *([size] if size else [])]


def arena(size: int = 70_000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def hold(folder: Path, connection: Connection) -> None:
    """A process that holds the arena until it is killed."""
    held = HeldCopy("key.content", len(arena()), "cpu", folder)
    copy_bytes(arena(), held.memory)
    connection.send(held.offer())
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[], tuple[BaseProcess, ArenaHandle]]]:
    """Starts processes that hold the arena."""
    context = multiprocessing.get_context("fork")
    started: list[BaseProcess] = []

    def start() -> tuple[BaseProcess, ArenaHandle]:
        here, there = context.Pipe()
        process = context.Process(target=hold, args=(tmp_path, there))
        process.start()
        there.close()
        started.append(process)
        return process, here.recv()

    yield start
    for process in started:
        process.kill()
        process.join()


def wanted() -> Wanted:
    return Wanted(card_identity("cpu"), "key.content", len(arena()))


def test_processes_read_one_copy_until_its_holder_dies_and_then_that_of_the_next(
    holder: Callable[[], tuple[BaseProcess, ArenaHandle]], tmp_path: Path
) -> None:
    first, handle = holder()
    attached = AttachedCopy(handle, wanted(), "cpu")
    assert np.array_equal(attached.memory.numpy(), arena())
    assert attached.is_current()
    assert mapped_files(first.pid) & mapped_files(os.getpid())  # the same pages
    first.kill()
    first.join()
    assert not attached.is_current()
    with pytest.raises(CopyLostError, match=f"generation {handle.generation} to live, found it"):
        AttachedCopy(handle, wanted(), "cpu")
    _, again = holder()
    assert again.generation != handle.generation
    assert sorted(tmp_path.iterdir()) == sorted(
        tmp_path / f"{again.generation}.{suffix}" for suffix in ("alive", "memory")
    ), "the second has swept what the first left"
    attached.close()
    attached = AttachedCopy(again, wanted(), "cpu")
    assert np.array_equal(attached.memory.numpy(), arena())
    with pytest.raises(SharingError, match=r"expected arena key\.content"):
        AttachedCopy(replace(again, arena="other"), wanted(), "cpu")
    attached.close()


def test_what_a_process_maps_it_cannot_write(
    holder: Callable[[], tuple[BaseProcess, ArenaHandle]],
) -> None:
    _, handle = holder()

    def write() -> None:
        faulthandler.disable()
        AttachedCopy(handle, wanted(), "cpu").memory.fill_(0)

    stray = multiprocessing.get_context("fork").Process(target=write)
    stray.start()
    stray.join()
    assert stray.exitcode == -signal.SIGSEGV
    assert np.array_equal(AttachedCopy(handle, wanted(), "cpu").memory.numpy(), arena())


def test_a_lifeline_ends_with_its_holder_and_others_stay(tmp_path: Path) -> None:
    lifeline = Lifeline(tmp_path, "mine")
    other = Lifeline(tmp_path, "other")  # sweeps, and finds the first alive
    assert is_alive(lifeline.path)
    lifeline.close()
    assert not is_alive(lifeline.path)
    assert is_alive(other.path)
    other.close()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_lets_go_leaves_nothing(tmp_path: Path) -> None:
    held = HeldCopy("key.content", 10, "cpu", tmp_path)
    handle = held.offer()
    held.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(CopyLostError):
        AttachedCopy(handle, Wanted(card_identity("cpu"), "key.content", 10), "cpu")


def mapped_files(pid: int | None) -> set[tuple[str, int]]:
    """Device and inode of what a process has mapped of shared copies."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {(line.split()[3], int(line.split()[4])) for line in lines if line.endswith(".memory")}
