"""Forward functions that stand before those of modules for a while."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

#: (the module's own forward function, its arguments, its keyword arguments) -> the output.
Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Forward:
    """A forward function of one module that stands before the module's own."""

    def __init__(
        self,
        module: nn.Module,
        run: Run,
    ) -> None:
        self._module = module
        self._run = run
        self._original = module.forward
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The forward function of a copy of the module, which nothing stands before."""
        return MethodType(type(self._module).forward, copy.deepcopy(self._module, memo))


@contextmanager
def replaced(module: nn.Module, run: Run) -> Iterator[None]:
    """A context in which a module is run by ``run``; one that has been replaced already is not."""
    if "forward" in module.__dict__:
        yield
        return
    module.__dict__["forward"] = Forward(module, run)
    try:
        yield
    finally:
        del module.__dict__["forward"]


def are_plain(blocks: Sequence[nn.Module]) -> bool:
    """Whether replaced blocks do inside what their classes say, and nobody listens."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    replacements = [block.__dict__.get("forward") for block in blocks]
    return all(isinstance(each, Forward) for each in replacements) and all(
        not module.training
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (module is block or "forward" not in module.__dict__)
        for block in blocks
        for module in block.modules()
    )
