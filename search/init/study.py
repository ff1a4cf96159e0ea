"""The keys of a proposed study, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.tensors.accelerator import accelerator
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.grammar import counted
from mergesearch.search.init.commented import Key
from mergesearch.search.init.given import located
from mergesearch.search.init.models import Models
from mergesearch.search.init.sizing import Size
from mergesearch.search.plan.plan import Plan

#: Parameters from which a worker uses all cores.
LARGE = 20_000_000
GRANULARITY = {
    "block": "One coefficient for each expert and block",
    "module": "One coefficient for each expert and kind of module",
    "task": "One coefficient for each expert",
}


def model_keys(models: Models, folder: Path) -> tuple[Key, ...]:
    """Base, experts, and what their tensors need."""
    parameters = sum(tensor.size for tensor in models.family.layout.tensors)
    base = f"The base, {models.reason}; {parameters:,} parameters are merged."
    experts = {model.name: located(model.path, folder) for model in models.experts}
    keys = [
        Key("base", located(models.base.path, folder), base),
        Key("experts", experts, f"{_lineages(models.lineages)}."),
    ]
    if models.special:
        why = "Tensors that an operator cannot treat like others."
        keys.append(Key("special", models.special, why))
    return tuple(keys)


def _lineages(lineages: Sequence[Lineage]) -> str:
    """How each expert relates to the base, as a clause each."""
    return "; ".join(
        f"{one.expert[0]} is {one.kind}" + (f" ({one.finding})" if one.finding else "")
        for one in lineages
    )


def workers_key(models: Models) -> Key | None:
    """Where trials run, if not as by default; the default is one thread in this process."""
    if accelerator() is not None:
        import torch

        count = torch.accelerator.device_count()
        if count > 1:
            return Key("workers", {"gpus": 1}, f"One worker on each of {count} GPUs.")
        why = "One worker on the GPU of this machine."
        return Key("workers", {"backend": "inline", "gpus": 1}, why)
    parameters = sum(tensor.size for tensor in models.family.layout.tensors)
    cores = usable_cores()
    if parameters < LARGE or cores < 2:
        return None
    return Key("workers", {"threads": cores}, f"{counted(cores, 'core')} and no GPU here.")


def space_key(plan: Plan, size: Size) -> Key:
    """How finely coefficients vary."""
    what = GRANULARITY[size.granularity]
    counts = f"{len(plan.space.names)} numbers for {size.trials} trials"
    finer = "" if size.granularity == "block" else "; with more trials, `block` is finer"
    return Key("space", {"granularity": size.granularity}, f"{what}: {counts}{finer}.")


def strategy_key(plan: Plan) -> Key:
    """What is tried next."""
    why = f"Chosen by coefficients, objectives and budget: here {plan.strategy.name}."
    return Key("strategy", "auto", why)


def budget_key(size: Size, out: Path) -> Key:
    """How many trials."""
    more = f"`mergesearch run {out} --set budget.trials={2 * size.trials}`"
    return Key("budget", {"trials": size.trials}, f"{size.why} {more} goes on where a run ended.")


def operator_key(plan: Plan, minutes: float) -> Key:
    """The operator of a plan, and why it was chosen."""
    if plan.survey is not None:
        measured = ", ".join(plan.survey.measured)
        seconds = sum(one.seconds for one in plan.survey.listed if not one.reason)
        why = (
            f"Measures {measured} and `ties` first, which takes about {seconds:.0f} s beside their "
            "trials, and goes on from the best."
        )
        return Key("operator", {"name": "auto", "minutes": minutes}, why)
    if plan.spec.operator.name == "ties":
        why = (
            "Trims small changes and elects signs, so that experts interfere less. `auto` measures "
            "several operators first, which needs more trials or time."
        )
        return Key("operator", "ties", why)
    why = "With one expert there is nothing to elect: the base plus a share of its change."
    return Key("operator", "task_arithmetic", why)
