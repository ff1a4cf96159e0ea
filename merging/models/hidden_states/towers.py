"""Lower blocks of a model that need not run, because their output for the same input is known.

Where the weights of the first blocks of a tower are those of an earlier forward pass, their output
is that of the earlier pass wherever their input is. :class:`HiddenStates` keeps such outputs and
gives them again, with the bits that the blocks would give. It is careful rather than fast, and lets
a pass run as it would without it

* while gradients, training or automatic casting are on, or random numbers are drawn;
* if a block is given what has no digest (a cache of keys and values), or gives anything but
  tensors;
* if attentions or all hidden states are asked for, or hooks or other forward functions are set;
* if the model uses the output of a lower block for anything but the next block: what happens
  between blocks is watched while a state is recorded.

A state is found again under the digests of all that the tower, its blocks and its module were
called with. Where a block turns out to be called in another way than when its tower was recorded,
the module that holds the tower runs again, whole.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from threading import get_ident
from typing import Any

import torch
from torch import nn

from mergesearch.merging.models.blocks import Chain, block_chains, split_call
from mergesearch.merging.models.hidden_states.digests import CallDigests
from mergesearch.merging.models.hidden_states.forwards import are_plain, replaced
from mergesearch.merging.models.hidden_states.passes import TowerPass, UnlikeRecordedError
from mergesearch.merging.models.hidden_states.store import HiddenStore, KeptState, StateKey
from mergesearch.merging.tensors.accelerator import device_module

#: Weights of a tower with whose first blocks those of a trial are compared.
RECENT = 8
#: Settings of a configuration on which it depends what a module does with hidden states.
SETTINGS = ("output_hidden_states", "output_attentions", "use_cache", "_attn_implementation")


class HiddenStates:
    """Skips blocks of a model whose output is kept in a store.

    Args:
        model: In evaluation mode.
        store: Keeps the states.
        name: Tells models apart that share a store.

    Attributes:
        towers: Name -> what stands around the blocks of each tower with several of them.
    """

    def __init__(self, model: nn.Module, store: HiddenStore, name: str = "") -> None:
        chains = [chain for chain in block_chains(model) if len(chain.blocks) > 1]
        self.towers = {
            chain.name: Tower(model, chain, store, f"{name}/{chain.name}") for chain in chains
        }

    @contextmanager
    def used(
        self,
        weights: Mapping[str, Sequence[bytes]],
        are_present: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        """A context in which forward passes of the model skip what they can.

        Args:
            weights: Tower -> digest of the weights of each block, which must stay what they are;
                towers that are not named run as they are.
            are_present: Asked before each pass whether they did; a pass runs whole if not.
        """
        with ExitStack() as stack:
            for name, digests in weights.items():
                stack.enter_context(self.towers[name].used(digests, are_present))
            yield


class Tower:
    """The blocks of a tower, and the module that calls them.

    Args:
        model: The whole model.
        chain: Names of the blocks.
        store: Keeps the states.
        name: Of the tower in the store.
    """

    def __init__(self, model: nn.Module, chain: Chain, store: HiddenStore, name: str) -> None:
        self.blocks = tuple(model.get_submodule(block) for block in chain.blocks)
        self._parent = model.get_submodule(chain.name.rpartition(".")[0])
        self._store = store
        self._name = name
        self._recent: deque[tuple[bytes, ...]] = deque(maxlen=RECENT)
        self._prefixes: tuple[bytes, ...] = ()
        self._depths: tuple[int, ...] = ()
        self._wanted = 0
        self._are_present: Callable[[], bool] = lambda: True
        self._pass: TowerPass | None = None

    @contextmanager
    def used(self, weights: Sequence[bytes], are_present: Callable[[], bool]) -> Iterator[None]:
        """See :meth:`HiddenStates.used`."""
        self._are_present = are_present
        self._choose_depths(_prefix_digests(weights))
        if not self._depths:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(replaced(self._parent, self._run_parent))
            for index, block in enumerate(self.blocks):
                step = functools.partial(self._run_block, index)
                stack.enter_context(replaced(block, step))
            yield

    def _choose_depths(self, prefixes: tuple[bytes, ...]) -> None:
        """Where states are looked for, deepest first, and down to where they are recorded.

        They are recorded where the blocks below are those of a recent trial. The last block always
        runs, so that a use of what is below it shows.
        """
        last = len(self.blocks) - 1
        shared = max((_common(prefixes, other) for other in self._recent), default=0)
        self._recent.append(prefixes)
        self._prefixes = prefixes
        self._wanted = min(shared, last)
        self._store.use(self._name, prefixes)
        depths = self._store.depths(self._name) | {self._wanted}
        self._depths = tuple(sorted(depths - {0}, reverse=True))

    def _run_parent(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module that calls the blocks; whole, and again, if it turns out to be unlike."""
        if self._pass is not None or torch.is_grad_enabled() or not self._are_present():
            return original(*args, **kwargs)
        digests = CallDigests()
        given = None if _asks_for_more(kwargs) else digests.of(self._settings(), args, kwargs)
        if given is None:
            return original(*args, **kwargs)
        now = self._pass = TowerPass(get_ident(), digests, given)
        try:
            output = original(*args, **kwargs)
            now.check_done()
        except UnlikeRecordedError:
            assert now.key is not None
            self._store.drop(now.key)
        else:
            return output
        finally:
            now.watch.stop()
            self._pass = None
        return self._run_whole(original, args, kwargs)

    def _run_whole(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._pass = TowerPass(-1, CallDigests(), b"")  # of no thread: blocks run as they are
        try:
            return original(*args, **kwargs)
        finally:
            self._pass = None

    def _settings(self) -> tuple[Any, ...]:
        config = getattr(self._parent, "config", None)
        return tuple(getattr(config, name, None) for name in SETTINGS)

    def _run_block(
        self,
        index: int,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a block, or give what is known of it."""
        now = self._pass
        if now is None or now.thread != get_ident() or now.over:
            return original(*args, **kwargs)
        hidden, call = split_call(args, kwargs)
        if index == 0 and now.next == 0 and type(hidden) is torch.Tensor:
            self._begin(now, hidden)
        if now.over or index != now.next or hidden is None:
            now.give_up()
            return original(*args, **kwargs)
        digest = now.digests.of(call.positional, call.args, call.kwargs)
        now.next += 1
        if index < now.skipped:
            return now.replay(index, hidden, digest)
        if index == now.recorded:
            self._finish(now, hidden)
        if now.over or not now.leads_on(hidden, digest):
            now.give_up()
            return original(*args, **kwargs)
        return now.record(digest, original(*args, **kwargs))

    def _begin(self, now: TowerPass, entry: torch.Tensor) -> None:
        """Decide at the first block what of the pass is known, and what is to be recorded."""
        inputs = now.digests.of(now.given, entry)
        casts = torch.is_autocast_enabled(entry.device.type)
        if inputs is None or casts or not are_plain(self.blocks[: self._depths[0]]):
            now.give_up()
            return
        now.entry = entry
        for depth in self._depths:
            key = StateKey(self._name, depth, self._prefixes[depth], inputs)
            now.kept = self._store.find(key)
            if now.kept is not None:
                now.key = key
                now.skipped = depth
                break
        if self._wanted > now.skipped and self._store.has_room(entry.nbytes):
            weights = self._prefixes[self._wanted]
            now.target = StateKey(self._name, self._wanted, weights, inputs)
        now.recorded = self._wanted if now.target is not None else 0
        now.random = _random_states(entry.device) if now.recorded else ()
        now.over = not (now.skipped or now.recorded)

    def _finish(self, now: TowerPass, hidden: torch.Tensor) -> None:
        """Keep the state that enters the first block that is not recorded."""
        now.over = True
        now.watch.stop()
        state = hidden.detach().to("cpu", copy=True)
        sound = (
            now.is_chained(hidden)
            and all(map(torch.equal, now.random, _random_states(hidden.device)))
            and state.stride() == hidden.stride()
            and now.digests.tensors_are_unchanged()
        )
        if sound and now.target is not None:
            kept = KeptState(state, tuple(now.calls), tuple(now.forms))
            self._store.keep(now.target, kept)


def _random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a model may draw from."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), device_module(device).get_rng_state(device)


def _prefix_digests(weights: Sequence[bytes]) -> tuple[bytes, ...]:
    """Digest of the weights of the first 0, 1, 2, ... blocks."""
    digest = blake2b(digest_size=16)
    prefixes = [digest.digest()]
    for block in weights:
        digest.update(block)
        prefixes.append(digest.digest())
    return tuple(prefixes)


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Number of first blocks with the same weights, from digests of all beginnings."""
    same = (a == b for a, b in zip(one, other, strict=True))
    return sum(same) - 1


def _asks_for_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether a caller wants what is inside the blocks."""
    return any(name.startswith("output_") and value for name, value in kwargs.items())
