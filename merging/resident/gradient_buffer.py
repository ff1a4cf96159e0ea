"""The gradient of a bound model, accumulated in one buffer laid out as the merged weights."""

from __future__ import annotations

import torch

from mergesearch.merging.errors import MergesearchError
from mergesearch.merging.resident.binding import Binding, slice_of


class GradientBuffer:
    """Memory that backward passes through a bound model accumulate into.

    Attributes:
        buffer: ``(size,)``, in the dtype of the merged weights.
    """

    def __init__(self, binding: Binding) -> None:
        """Make every bound parameter of the model require a gradient, and keep it in the buffer."""
        self._binding = binding
        self.buffer = torch.zeros_like(binding.buffer)
        for tensor, spec in binding.bound.values():
            tensor.requires_grad_()
            tensor.grad = slice_of(self.buffer, spec)
        for copied in binding.copied:
            copied.owner.requires_grad_()
            copied.owner.grad = torch.zeros_like(copied.owner)

    def clear(self) -> None:
        """Forget what backward passes have accumulated.

        Raises:
            MergesearchError: If gradients were replaced.
        """
        self._check()
        self.buffer.zero_()
        for copied in self._binding.copied:
            assert copied.owner.grad is not None
            copied.owner.grad.zero_()

    def gathered(self) -> torch.Tensor:
        """The buffer, with the gradients of parts of fused parameters copied into it.

        Raises:
            MergesearchError: If gradients were replaced.
        """
        self._check()
        for copied in self._binding.copied:
            assert copied.owner.grad is not None
            slice_of(self.buffer, copied.spec).copy_(copied.view.of(copied.owner.grad))
        return self.buffer

    def _check(self) -> None:
        """Check that the gradient of every parameter still lies in the buffer."""
        first = self.buffer.data_ptr()
        itemsize = self.buffer.itemsize
        expected = [
            (tensor.grad, first + spec.start * itemsize)
            for tensor, spec in self._binding.bound.values()
        ]
        replaced = any(grad is None or grad.data_ptr() != address for grad, address in expected)
        if replaced or any(copied.owner.grad is None for copied in self._binding.copied):
            raise MergesearchError(
                "gradient: expected every parameter's gradient inside the buffer, received others; "
                "use clear_gradient() instead of zero_grad()"
            )
