"""The ``evaluators:`` section of a study file, and the evaluator that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic import Field as Key

from evaluators.base import Evaluator
from evaluators.composite import Composite

Share = Annotated[float, Key(ge=0, le=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FaultsSpec(_Spec):
    """Shares of all recipes that fail, for trying out a cluster."""

    nan: Share = Key(default=0.0, description="The losses are NaN.")
    error: Share = Key(default=0.0, description="The evaluation raises.")
    kill: Share = Key(default=0.0, description="The evaluating process kills itself with SIGKILL.")


class SyntheticSpec(_Spec):
    """An analytic problem; no model, no data."""

    kind: Literal["synthetic"]
    problem: Literal["sphere", "ellipsoid", "quadratic_tasks", "zdt1"]
    objectives: int | None = Key(default=None, ge=1, description="Number of losses, for quadratic_tasks.")
    seed: int = Key(default=0, ge=0, description="Seed of optima, rotations and noise.")
    noise: float = Key(default=0.0, ge=0, description="Standard deviation of the measured losses.")
    items: int = Key(default=0, ge=0, description="Items per split; gives item scores and standard errors.")
    seconds: float = Key(default=0.0, ge=0, description="How long an evaluation takes.")
    faults: FaultsSpec = FaultsSpec()

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.synthetic import Faults, Synthetic

        options = self.model_dump(exclude={"kind", "faults"})
        return Synthetic(**options, faults=Faults(**self.faults.model_dump()), where=where)


class MetricSpec(_Spec):
    """One objective of a classification evaluator."""

    name: str | None = Key(default=None, min_length=1, description="Name; by default made from the rest.")
    metric: Literal["accuracy", "cross_entropy"] = "accuracy"
    domains: list[str] | None = Key(default=None, min_length=1, description="Domains to measure on; by default all.")
    reduce: Literal["mean", "worst"] = Key(default="mean", description="How several domains become one value.")


class ClassificationSpec(_Spec):
    """Image classification on a ``datasets`` folder."""

    kind: Literal["classification"]
    data: str = Key(description="Folder written by DatasetDict.save_to_disk.")
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict, description="Names of the three splits in the folder, where they differ."
    )
    input: str = Key(default="pixels", description="Column of the images.")
    label: str = Key(default="label", description="Column of the class numbers.")
    domain: str | None = Key(default=None, description="Column that says which domain an item belongs to.")
    id: str | None = Key(default=None, description="Column of stable ids; by default a hash of the image.")
    batch_size: int = Key(default=256, ge=1)
    objectives: list[MetricSpec] = Key(default_factory=lambda: [MetricSpec()], min_length=1)

    def build(self, folder: Path, where: str) -> Evaluator:
        """The evaluator."""
        from evaluators.classification import Classification, Metric

        return Classification(
            folder / self.data,
            [Metric(**metric.model_dump()) for metric in self.objectives],
            splits=self.splits,
            columns={"input": self.input, "label": self.label, "domain": self.domain, "id": self.id},
            batch_size=self.batch_size,
            where=where,
        )


EvaluatorSpec = Annotated[SyntheticSpec | ClassificationSpec, Key(discriminator="kind")]

#: Kind -> one line, for listings.
EVALUATORS: Mapping[str, str] = {
    "classification": "accuracy and cross-entropy of an image classifier on a datasets folder, by domain",
    "synthetic": "analytic problems with known optima, no model; noise and faults for trying out a cluster",
}


def parse_evaluators(section: Sequence[Mapping[str, Any]]) -> list[SyntheticSpec | ClassificationSpec]:
    """The section as specs, from the plain data of a resolved study."""
    return TypeAdapter(list[EvaluatorSpec]).validate_python(list(section))


def build_evaluator(specs: Sequence[SyntheticSpec | ClassificationSpec], folder: Path) -> Evaluator:
    """One evaluator for the whole section; relative paths start at ``folder``.

    Raises:
        InputError: If two objectives have the same name, or the parts do not fit together.
    """
    members = [spec.build(folder, f"evaluators.{place}") for place, spec in enumerate(specs)]
    return members[0] if len(members) == 1 else Composite(members)
