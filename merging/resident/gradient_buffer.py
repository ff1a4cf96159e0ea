"""The gradient of bound models, accumulated in buffers laid out as the merged weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergesearch.merging.errors import MergesearchError
from mergesearch.merging.resident.binding import Binding
from mergesearch.merging.resident.shard import Shard, slice_of


class GradientBuffer:
    """Memory that backward passes through bound models accumulate into.

    Models around the same merged weights share it: what each adds is the gradient of their sum.

    Attributes:
        buffers: One for every shard ``(size,)``, in the dtype of its merged weights.
    """

    def __init__(self, bindings: Sequence[Binding], shards: Sequence[Shard]) -> None:
        """Make every bound parameter of the models require a gradient, and keep it in a buffer.

        Raises:
            MergesearchError: If a tensor is a parameter of one model and a part of another's.
        """
        self._bound = [pair for binding in bindings for pair in binding.bound.values()]
        self._copied = [copied for binding in bindings for copied in binding.copied]
        both = {name for _, name in self._bound} & {copied.name for copied in self._copied}
        if both:
            raise MergesearchError(
                f"gradient: expected models that hold {min(both)!r} alike, received some that fuse "
                "it or keep it in another dtype; choose a strategy without gradients"
            )
        self.buffers = [torch.zeros_like(shard.merged) for shard in shards]
        self._slices = {
            spec.name: slice_of(buffer, spec)
            for shard, buffer in zip(shards, self.buffers, strict=True)
            for spec in shard.layout.tensors
        }
        for tensor, name in self._bound:
            tensor.requires_grad_()
            tensor.grad = self._slices[name]
        for copied in self._copied:
            copied.owner.requires_grad_()
            copied.owner.grad = torch.zeros_like(copied.owner)

    def clear(self) -> None:
        """Forget what backward passes have accumulated.

        Raises:
            MergesearchError: If gradients were replaced.
        """
        self._check()
        for buffer in self.buffers:
            buffer.zero_()
        for copied in self._copied:
            assert copied.owner.grad is not None
            copied.owner.grad.zero_()

    def gathered(self) -> list[torch.Tensor]:
        """The buffers, with the gradients of parts of fused parameters summed into them.

        Raises:
            MergesearchError: If gradients were replaced.
        """
        self._check()
        begun: set[str] = set()
        for copied in self._copied:
            assert copied.owner.grad is not None
            part = copied.view.of(copied.owner.grad)
            if copied.name in begun:
                self._slices[copied.name].add_(part)
            else:
                self._slices[copied.name].copy_(part)
            begun.add(copied.name)
        return self.buffers

    def _check(self) -> None:
        """Check that the gradient of every parameter still lies in its buffer."""
        expected = [(tensor.grad, self._slices[name].data_ptr()) for tensor, name in self._bound]
        replaced = any(grad is None or grad.data_ptr() != address for grad, address in expected)
        if replaced or any(copied.owner.grad is None for copied in self._copied):
            raise MergesearchError(
                "gradient: expected every parameter's gradient inside the buffer, received others; "
                "use clear_gradient() instead of zero_grad()"
            )
