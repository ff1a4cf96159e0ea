"""One forward pass through the blocks of a tower: which run, which do not, what is recorded."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from mergesearch.merging.models.hidden_states.digests import CallDigests
from mergesearch.merging.models.hidden_states.store import Form, KeptState, StateKey
from mergesearch.merging.models.hidden_states.watch import Watch

#: Stands for what cannot be copied.
_ODD = object()


@dataclass(eq=False)
class TowerPass:
    """One forward pass of the module that calls the blocks.

    Attributes:
        thread: That it runs in.
        digests: Of what was called so far.
        given: Digest of what the module was called with.
        next: Number of the block that should come next.
        over: Whether the blocks that are left run as they are.
        skipped: Number of first blocks that do not run.
        recorded: Number of first blocks after which the state is to be kept, or 0.
        kept: What is known of those that do not run.
        key: Of what is known.
        target: Key of what is recorded.
        entry: Hidden state before the first block.
        random: States of torch's generators there.
        calls: Digest of what each block was given beside the hidden state.
        forms: What each gave beside the hidden state.
        others: Id of a tensor among that -> the tensor, and a copy in main memory.
        outputs: The latest two outputs, as long as anybody holds them.
        watch: Sees what is computed between two blocks.
    """

    thread: int
    digests: CallDigests
    given: bytes
    next: int = 0
    over: bool = False
    skipped: int = 0
    recorded: int = 0
    kept: KeptState | None = None
    key: StateKey | None = None
    target: StateKey | None = None
    entry: torch.Tensor | None = None
    random: tuple[torch.Tensor, ...] = ()
    calls: list[bytes] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    others: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    outputs: deque[weakref.ref[torch.Tensor]] = field(default_factory=lambda: deque(maxlen=2))
    watch: Watch = field(default_factory=Watch)

    def give_up(self) -> None:
        """Let the blocks that are left run as they are.

        Raises:
            UnlikeRecordedError: If some that should have run did not.
        """
        self.check_done()
        self.watch.stop()
        self.over = True

    def check_done(self) -> None:
        """Check that what is known of the first blocks was given, if any of them did not run.

        Raises:
            UnlikeRecordedError: If not.
        """
        if 0 < self.next < self.skipped:
            raise UnlikeRecordedError

    def replay(self, index: int, hidden: torch.Tensor, digest: bytes | None) -> Any:
        """What a block that does not run gives: its input, and the last of them what is known.

        Raises:
            UnlikeRecordedError: If it is called in another way than when it was recorded.
        """
        assert self.kept is not None
        if hidden is not self.entry or digest != self.kept.calls[index]:
            raise UnlikeRecordedError
        if index < self.skipped - 1:
            return self.kept.forms[index].around(hidden)
        state = self.kept.state.to(hidden.device, copy=True)
        self.calls += self.kept.calls
        self.forms += self.kept.forms
        if self.recorded > self.skipped:
            self._follow(state)
        else:
            self.over = True
        return self.forms[-1].around(state)

    def leads_on(self, hidden: torch.Tensor, digest: bytes | None) -> bool:
        """Whether a block is one more of a chain that can be recorded."""
        self.watch.stop()
        return digest is not None and self.is_chained(hidden)

    def is_chained(self, hidden: torch.Tensor) -> bool:
        """Whether a block's input is the output before, and nobody has use for earlier ones."""
        if not self.outputs:
            return hidden is self.entry
        earlier = len(self.outputs) == 2 and self.outputs[0]() is not None
        return hidden is self.outputs[-1]() and not earlier and not self.watch.seen

    def record(self, digest: bytes | None, output: Any) -> Any:
        """Take note of a block that has run."""
        assert digest is not None
        given = output if type(output) in (list, tuple) else [output]
        others = [self._copied(each) for each in given[1:]]
        if type(given[0]) is not torch.Tensor or _ODD in others:
            self.give_up()
            return output
        kind = type(output) if given is output else None
        self.calls.append(digest)
        self.forms.append(Form(kind, tuple(others)))
        self._follow(given[0])
        return output

    def _copied(self, value: Any) -> Any:
        """A copy of what a block gives beside its hidden state; the same tensor is copied once."""
        if value is None:
            return None
        if type(value) is not torch.Tensor:
            return _ODD
        if id(value) not in self.others:
            self.others[id(value)] = value, value.detach().to("cpu", copy=True)
        copied = self.others[id(value)][1]
        return copied if copied.stride() == value.stride() else _ODD

    def _follow(self, state: torch.Tensor) -> None:
        """Watch what becomes of an output until the next block."""
        self.outputs.append(weakref.ref(state))
        self.watch.start(state)


class UnlikeRecordedError(Exception):
    """A block was called in another way than when its tower was recorded."""
