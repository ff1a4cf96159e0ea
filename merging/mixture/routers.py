"""Routers that see their first rows alone, as those of a smaller mixture do."""

from __future__ import annotations

from typing import Any


class NarrowRouter:
    """Lets a router of a whole mixture choose among its first experts only.

    While the router runs, its matrix is a view of the first rows and it chooses no more experts
    than there are; so it computes what the router of the smaller model computes, in the same
    order. Outside of its forward pass the module is as it was.
    """

    def __init__(self, gate: Any) -> None:
        """Attach to a router, narrowing nothing yet.

        Args:
            gate: With a matrix ``weight`` ``(experts, width)`` and a number ``top_k``.
        """
        self._whole = gate.weight
        self._used = int(gate.top_k)
        self.rows = len(gate.weight)
        gate.register_forward_pre_hook(self._narrow)
        gate.register_forward_hook(self._widen, always_call=True)

    def _narrow(self, gate: Any, _inputs: Any) -> None:
        from torch import nn

        if self.rows < len(self._whole):
            self._whole = gate.weight
            part = self._whole[: self.rows]
            gate.weight = nn.Parameter(part, requires_grad=False)
            gate.top_k = min(self._used, self.rows)

    def _widen(self, gate: Any, _inputs: Any, _output: Any) -> None:
        gate.weight = self._whole
        gate.top_k = self._used
