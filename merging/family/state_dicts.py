"""State dicts brought into one shape by the policies for special tensors.

The counterpart of :mod:`mergesearch.merging.family.family`, which does so for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.family.family import check_statistics
from mergesearch.merging.family.integers import differs, integers_warning
from mergesearch.merging.family.log_scalars import positive_scalars
from mergesearch.merging.family.messages import listed, warn
from mergesearch.merging.family.missing_tensors import starting_tensor
from mergesearch.merging.family.special_tensors import (
    SpecialTensors,
    in_log_space,
    is_logarithm,
    running_statistics,
)
from mergesearch.merging.family.state_dict_heads import StateDict, with_heads
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import natural_key


@dataclass(frozen=True, eq=False)
class AlignedStates:
    """Base and experts, ready to be merged.

    Attributes:
        base: The base, with tensors that only the experts have.
        experts: The experts, with tensors that only the base has.
        copied: Floating tensors that are copied from the base.
        special: Tensors that are not combined as the operator would.
    """

    base: StateDict
    experts: tuple[StateDict, ...]
    copied: frozenset[str]
    special: SpecialTensors


def align_states(
    base: StateDict, experts: Sequence[StateDict], policies: TensorPolicies
) -> AlignedStates:
    """Apply the policies to state dicts; no tensor is modified.

    Raises:
        RecipeError: If a policy needs files.
        CheckpointError: If tensors need a policy that was not chosen.
    """
    _check_policies(policies)
    base, experts, copied = with_heads(base, experts, policies)
    if policies.absent != "refuse":
        base, experts, nowhere = _completed(base, experts, policies.absent)
        copied |= nowhere
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    scalars = [name for name in names if base[name].ndim == 0]
    statistics = running_statistics(names)
    check_statistics(statistics, policies, "base")
    copied |= {*statistics} if policies.batch_norm == "base" else set()
    copied |= {*scalars} if policies.scalars == "base" else set()
    special = SpecialTensors.of_statistics([] if policies.batch_norm == "base" else statistics)
    if policies.scalars == "log":
        experts, logs = _with_logarithms(
            base, experts, [name for name in scalars if name not in copied]
        )
        special = replace(special, logs=logs)
    return AlignedStates(base, tuple(experts), frozenset(copied), special)


def _check_policies(policies: TensorPolicies) -> None:
    """Refuse policies that need a tokenizer, or a model that runs."""
    if policies.vocabulary != "same":
        raise RecipeError(
            "special.vocabulary: expected same for state dicts, which have no tokenizer to align "
            f"rows by, received {policies.vocabulary}; merge folders"
        )
    if policies.align:
        raise RecipeError(
            "special.align: expected none for state dicts, whose model is not known, received "
            f"{listed([*policies.align])}; merge folders"
        )
    if policies.unlock:
        raise RecipeError(
            "special.unlock: expected none for state dicts, which are merged as they are, received "
            f"{listed(policies.unlock)}; merge folders"
        )
    if policies.batch_norm == "recalibrate":
        raise RecipeError(
            "special.batch_norm: expected refuse, base or merge for state dicts, which cannot be "
            "run, received recalibrate; load the merged state dict into its model and call "
            "mergesearch.merging.models.batch_norm.recalibrate"
        )


def _completed(
    base: StateDict, experts: Sequence[StateDict], policy: str
) -> tuple[StateDict, list[StateDict], set[str]]:
    """States with the same tensors, and those of them that no coefficient acts on."""
    new = [
        name
        for name, tensor in experts[0].items()
        if policy != "own"
        and name not in base
        and all(name in e and e[name].shape == tensor.shape for e in experts)
    ]
    floating = [name for name in new if experts[0][name].is_floating_point()]
    made = {
        n: starting_tensor([e[n] for e in experts], policy).to(experts[0][n].dtype)
        for n in floating
    }
    nowhere = {
        n
        for n in base
        if base[n].is_floating_point() and all(n not in expert for expert in experts)
    }
    filled = [{**{n: tensor for n, tensor in base.items() if n not in e}, **e} for e in experts]
    return (
        {**base, **made},
        list(filled),
        nowhere | (set(floating) if policy == "average" else set()),
    )


def _with_logarithms(
    base: StateDict, experts: Sequence[StateDict], scalars: Sequence[str]
) -> tuple[list[StateDict], frozenset[str]]:
    candidates = [name for name in scalars if not is_logarithm(name)]
    whole = [
        n
        for n in candidates
        if all(n in e and e[n].is_floating_point() and e[n].ndim == 0 for e in experts)
    ]
    logs = positive_scalars({name: [state[name] for state in (base, *experts)] for name in whole})
    changed = [{**e, **{name: in_log_space(e[name], base[name]) for name in logs}} for e in experts]
    return list(changed), frozenset(logs)


def warn_of_integers(base: StateDict, experts: Sequence[StateDict]) -> None:
    """Warn of integer tensors, which are copied from the base, where an expert has others."""
    names = [
        name
        for name, tensor in base.items()
        if not (tensor.is_floating_point() or tensor.is_complex())
    ]
    odd = [name for name in names if any(differs(base[name], expert[name]) for expert in experts)]
    warn(integers_warning(sorted(odd, key=natural_key)))
