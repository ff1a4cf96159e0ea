"""Settings on which bits depend are chosen, whatever the process had before."""

from __future__ import annotations

import torch

from mergesearch.evaluators.compute_settings import fix_compute_settings


def test_cards_compute_in_the_stated_precision_and_order() -> None:
    backends = torch.backends
    backends.cuda.matmul.allow_tf32 = True
    backends.cudnn.allow_tf32 = True
    backends.cudnn.benchmark = True
    fix_compute_settings()
    assert not backends.cuda.matmul.allow_tf32
    assert not backends.cudnn.allow_tf32
    assert not backends.cudnn.benchmark
    assert backends.cudnn.deterministic
    # Without a card, operations of the CPU stay what they were.
    assert torch.are_deterministic_algorithms_enabled() == torch.cuda.is_available()
