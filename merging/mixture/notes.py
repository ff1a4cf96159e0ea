"""What there is to know of a smaller mixture beside its weights, for the log and the model card."""

from __future__ import annotations

from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE
from mergesearch.merging.mixture.layers import used_count
from mergesearch.merging.mixture.operators import McSmoeOptions, MixtureOperator, MixtureOptions
from mergesearch.merging.mixture.planning import MixturePlan
from mergesearch.merging.mixture.weights import factor_bytes


def notes_of(
    plan: MixturePlan, operator: MixtureOperator, options: MixtureOptions
) -> tuple[str, ...]:
    """Sentences, one for each thing that is not as a reader would expect."""
    found = [_padding(plan), _fewer_used(plan), _unused(plan), _factors(plan, operator, options)]
    return tuple(note for note in found if note)


def _padding(plan: MixturePlan) -> str:
    """That blocks store more experts than they have different ones."""
    counts = [len(block.groups) for block in plan.blocks]
    if all(count == plan.stored for count in counts):
        return ""
    distinct = ", ".join(map(str, counts))
    return (
        f"Blocks have {distinct} different experts, and each stores {plan.stored}, as the "
        "configuration has one number for all: the others are copies of merged experts, each under "
        "a router row of its own. They take bytes, and a token may choose the same expert twice."
    )


def _fewer_used(plan: MixturePlan) -> str:
    """That a token uses fewer experts than before."""
    used = used_count(plan.checkpoint)
    if used <= plan.stored:
        return ""
    return f"A token uses {plan.stored} experts, {used} before, as a block has no more."


def _unused(plan: MixturePlan) -> str:
    """That the calibration never used some experts, about which it then says nothing."""
    idle = sum(int((block.statistics.usage == 0).sum()) for block in plan.blocks)
    total = sum(block.layer.experts for block in plan.blocks)
    if not idle:
        return ""
    return f"The calibration's items never used {idle} of {total} experts; give it more items."


def _factors(plan: MixturePlan, operator: MixtureOperator, options: MixtureOptions) -> str:
    """That matrices of low rank are stored as they are, and what their factors would take."""
    if not (isinstance(options, McSmoeOptions) and options.rank is not None):
        return ""
    factored = 0
    dense = 0
    for block in plan.blocks:
        down = plan.checkpoint.tensors[block.layer.names(1)[-1]]
        width, inner = down.shape[-2:]
        size = ITEMSIZE[down.dtype]
        for shape in ((inner, width), (inner, width), (width, inner)):
            each = factor_bytes(shape, options.rank, options.density, size)
            factored += len(block.groups) * each
            dense += len(block.groups) * width * inner * size
    return (
        f"Merged matrices have rank share {options.rank:g} and {options.density:g} of their "
        f"entries beside it. They are stored whole ({dense:,} bytes), as transformers loads no "
        f"factors; these would take {factored:,} bytes. {operator.name} trains them in its paper; "
        "here nothing is trained."
    )
