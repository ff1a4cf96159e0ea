"""Several evaluators as one, with their objectives side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from mergesearch.evaluators.base import (
    Batch,
    Candidate,
    Evaluator,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Split,
)
from mergesearch.evaluators.evaluator_base import weights_for, with_head
from mergesearch.evaluators.objectives import References
from mergesearch.merging import InputError


class Composite:
    """Runs evaluators one after the other on the same candidate, each with weights as it wants.

    It provides item scores if all members do, and the gradients of those that have some.

    Raises:
        InputError: If two objectives have the same name, or two evaluators need different model
            classes.
    """

    def __init__(self, members: Sequence[Evaluator], where: str = "evaluators") -> None:
        self._members = tuple(members)
        routed = next((member for member in members if getattr(member, "parameters", ())), None)
        if routed is not None and len(members) > 1:
            raise InputError(
                f"{where}: expected an evaluator that merges for each input alone, "
                f"received {len(members)}: others would score a checkpoint; list its objectives "
                "in its own section"
            )
        self.objectives = tuple(objective for member in members for objective in member.objectives)
        names = [objective.name for objective in self.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{where}: expected unique names of objectives, received {twice} twice; give one a "
                "name"
            )
        classes = sorted(
            {member.model_class for member in members if member.model_class is not None}
        )
        if len(classes) > 1 and not all(
            getattr(member, "head", None) for member in members if member.model_class is not None
        ):
            raise InputError(
                f"{where}: expected evaluators of one kind of model, received {classes}; use two "
                "studies, or name a head for each where experts keep their own"
            )
        self.model_class: str | None = classes[0] if classes else None
        self.constraints = tuple(name for member in members for name in member.constraints)
        self.tolerances = {
            name: told
            for member in members
            for name, told in getattr(member, "tolerances", {}).items()
        }
        self.additive = tuple(name for member in members for name in member.additive)
        again = sorted({name for name in self.constraints if self.constraints.count(name) > 1})
        if again:
            raise InputError(
                f"{where}: expected unique names of bounds, received {again} twice; give one a name"
            )
        # Several members have items of their own.
        self.selects = len(members) == 1 and members[0].selects
        self.transductive = any(member.transductive for member in members)
        shared = frozenset.intersection(*(member.provides for member in members)) - {"gradient"}
        self.differentiable = tuple(name for member in members for name in member.differentiable)
        named = {objective.name for objective in self.objectives}
        offered = (name for member in members for name in member.proxies if name not in named)
        self.proxies = tuple(dict.fromkeys(offered))
        self.provides = shared | ({"gradient"} if self.differentiable else frozenset())

    @property
    def deterministic(self) -> bool:
        """Whether every member scores a merge the same each time."""
        return all(getattr(member, "deterministic", False) for member in self._members)

    def lend(self, share: float) -> None:
        """Let every member's search use some of its validation items."""
        for member in self._members:
            member.lend(share)

    def check(self) -> None:
        """Check every member."""
        for member in self._members:
            member.check()

    def use_heads(self, names: Sequence[str]) -> Mapping[str, str]:
        """Heads that any member uses, with their auto classes.

        Raises:
            InputError: If members need one head in different classes.
        """
        used: dict[str, str] = {}
        for member in self._members:
            for head, kind in member.use_heads(names).items():
                if used.setdefault(head, kind) != kind:
                    raise InputError(
                        f"evaluators: expected one kind of model around head {head!r}, received "
                        f"{used[head]} and {kind}; use two studies"
                    )
        return used

    def check_classes(self, count_of: Callable[[str | None], int | None]) -> None:
        """Refuse class numbers that a member's model has no class for."""
        for member in self._members:
            check = getattr(member, "check_classes", None)
            if check is not None:
                check(count_of)

    def references(self) -> frozenset[str]:
        """Anchors that the objectives of any member are relative to."""
        return frozenset().union(*(member.references() for member in self._members))

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about all members, each line once."""
        return list(
            dict.fromkeys(line for member in self._members for line in member.warnings(sources))
        )

    def open(self) -> None:
        """Open every member."""
        for member in self._members:
            member.open()

    def size(self, split: Split) -> int:
        """Number of items of the member that has most."""
        return max(member.size(split) for member in self._members)

    def cost(self, split: Split, items: int | None = None) -> int:
        """Evaluations of all members together."""
        return sum(member.cost(split, items) for member in self._members)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure with all members, each of which scores its own first ``items``."""
        parts = []
        for index, member in enumerate(self._members):
            own = replace(candidate, references=_references_of(index, candidate.references))
            headed = with_head(own, member)
            with weights_for(headed, member):
                parts.append(member.evaluate(headed, split, items))
        return Measurement(
            values={name: value for part in parts for name, value in part.values.items()},
            errors={name: value for part in parts for name, value in part.errors.items()},
            items={name: scores for part in parts for name, scores in part.items.items()},
            means={
                f"{index}:{name}": value
                for index, part in enumerate(parts)
                for name, value in part.means.items()
            },
            violations={name: value for part in parts for name, value in part.violations.items()},
            weights={name: weights for part in parts for name, weights in part.weights.items()},
            item_indices={
                name: indices for part in parts for name, indices in part.item_indices.items()
            },
            resampled={name: each for part in parts for name, each in part.resampled.items()},
            exhibits={name: each for part in parts for name, each in part.exhibits.items()},
        )

    def batch_cost(self, batch: Batch, names: Collection[str] | None = None) -> int:
        """Items that all members that are followed use together."""
        followed = self.differentiable if names is None else names
        return sum(
            member.batch_cost(batch) for member in self._members if self._own(member, followed)
        )

    def halve_batch(self) -> int | None:
        """Halve the batches of all members; returns the largest that was halved."""
        sizes = [member.halve_batch() for member in self._members]
        return max((size for size in sizes if size is not None), default=None)

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Add the gradients of the members that have a weight, one after the other."""
        results = []
        for member in self._members:
            own = {name: weights[name] for name in self._own(member, weights)}
            if own:
                headed = with_head(candidate, member)
                with weights_for(headed, member):  # rounding is passed straight through
                    results.append(member.backward(headed, batch, own))
        fields = [result.field for result in results if result.field is not None]
        return LossAndGradient(
            sum(result.loss for result in results), sum(fields[1:], fields[0]) if fields else None
        )

    def _own(self, member: Evaluator, names: Collection[str]) -> list[str]:
        """Those of the losses that a member has gradients of.

        Where a loss is an objective of one member, others with a loss of that name have no part in
        it.
        """
        offered = {*member.differentiable, *(n for n in member.proxies if n in self.proxies)}
        return [name for name in names if name in offered]


def _references_of(index: int, references: References | None) -> References | None:
    """The references of the member at ``index``, whose names begin with its index."""
    if references is None:
        return None
    prefix = f"{index}:"
    return {
        model: {
            name.removeprefix(prefix): value
            for name, value in means.items()
            if name.startswith(prefix)
        }
        for model, means in references.items()
    }
