"""Residual blocks of a model, called one by one, each on the output of the one before.

Blocks are known by the names of their parameters (:mod:`mergesearch.merging.tensors.roles`). What
else the model gives a block (masks, positions) is captured in a forward pass and given again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.tensors.roles import classify

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class Chain:
    """The blocks of one tower.

    Attributes:
        name: Name of the module that holds them.
        blocks: Full name of each block, in order.
    """

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """How the model called a block, without the hidden state.

    Attributes:
        positional: Whether the hidden state comes first, or as ``hidden_states``.
        args: Other positional arguments.
        kwargs: Other keyword arguments.
    """

    positional: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def repeat(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state after ``block``."""
        import torch

        with torch.no_grad():
            if self.positional:
                return _hidden(block(hidden, *self.args, **self.kwargs))
            return _hidden(block(*self.args, hidden_states=hidden, **self.kwargs))


@dataclass(frozen=True, eq=False)
class Passage:
    """One batch on its way through a chain.

    Attributes:
        entry: Hidden state before the first block.
        calls: How each block is called.
        exit: Hidden state after the last.
    """

    entry: torch.Tensor
    calls: tuple[Call, ...]
    exit: torch.Tensor


def block_chains(model: nn.Module) -> list[Chain]:
    """The outermost lists of numbered blocks of a model.

    Known by the names of their parameters (:func:`mergesearch.merging.tensors.roles.classify`).
    """
    chains: list[Chain] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{chain.name}.") for chain in chains)
        children = [child for child, _ in module.named_children()]
        if not inside and children and all(_is_block(model, name, child) for child in children):
            chains.append(Chain(name, tuple(_joined(name, child) for child in children)))
    return chains


def chains_in_order(model: nn.Module, run: Callable[[], Any]) -> list[Chain]:
    """The chains that ``run`` passes through, in the order in which it enters them.

    Towers that are not used are left out.

    Raises:
        CheckpointError: If there is none.
    """
    entered: list[Chain] = []
    with ExitStack() as hooks:
        for chain in block_chains(model):
            first = model.get_submodule(chain.blocks[0])
            hooks.callback(first.register_forward_pre_hook(partial(_enter, entered, chain)).remove)
        run()
    if not entered:
        raise CheckpointError(
            f"calibration: expected residual blocks in {type(model).__name__}, named like "
            "layers.0, layers.1, ... and used by the calibration items, found none; choose "
            "operator regmean"
        )
    return list({chain.name: chain for chain in entered}.values())


def passage(model: nn.Module, chain: Chain, run: Callable[[], Any]) -> Passage:
    """The hidden states and calls of ``chain`` in ``run``, a forward pass of ``model``.

    Raises:
        CheckpointError: If they do not run one after another, each on the output of the one before.
    """
    calls: list[Call] = []
    ends: list[torch.Tensor] = []  # of the chain: what went in, and what came out last

    def before(
        index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden, call = split_call(args, kwargs)
        if index != len(calls) or hidden is None or (index and not _same(hidden, ends[1])):
            raise _no_chain(chain)
        calls.append(call)
        if index == 0:
            ends[:] = [hidden, hidden]

    def after(_block: nn.Module, _args: Any, output: Any) -> None:
        ends[1] = _hidden(output)

    with ExitStack() as hooks:
        for index, name in enumerate(chain.blocks):
            block = model.get_submodule(name)
            hooks.callback(
                block.register_forward_pre_hook(partial(before, index), with_kwargs=True).remove
            )
            hooks.callback(block.register_forward_hook(after).remove)
        run()
    if len(calls) != len(chain.blocks):
        raise _no_chain(chain)
    return Passage(ends[0], tuple(calls), ends[1])


def check_same(chain: Chain, expected: torch.Tensor, received: torch.Tensor) -> None:
    """Check that blocks called one by one give the output of the model.

    Raises:
        CheckpointError: If they differ by more than rounding.
    """
    import torch

    if not torch.allclose(expected, received, rtol=0.01, atol=0.01 * float(expected.abs().max())):
        raise CheckpointError(
            f"calibration: expected blocks {chain.name} that depend on the block before alone, "
            "received some that are given more (states of earlier blocks); choose operator regmean"
        )


def _enter(entered: list[Chain], chain: Chain, *_: Any) -> None:
    entered.append(chain)


def _is_block(model: nn.Module, parent: str, child: str) -> bool:
    name = _joined(parent, child)
    parameters = [f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters()]
    return (
        child.isdigit()
        and bool(parameters)
        and all(classify(p).block == int(child) for p in parameters)
    )


def _joined(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def split_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor | None, Call]:
    """The hidden state that a block is given, or None, and the rest of its call."""
    if args:
        return args[0], Call(True, tuple(args[1:]), dict(kwargs))
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs.get("hidden_states"), Call(False, (), rest)


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _no_chain(chain: Chain) -> CheckpointError:
    return CheckpointError(
        f"calibration: expected blocks {chain.name} that run one after another, each on the output "
        "of the one before, received another order; choose operator regmean"
    )
