"""The ``evaluators:`` section of a study file, and the evaluator that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field as Key
from pydantic import TypeAdapter

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.composite import Composite
from mergesearch.evaluators.spec.images import (
    ClassificationSpec,
    SegmentationSpec,
    T3Spec,
    TwinMergingSpec,
)
from mergesearch.evaluators.spec.models import AlignmentSpec, EntropySpec, LanguageModelSpec
from mergesearch.evaluators.spec.others import CommandSpec, DistanceSpec, SyntheticSpec
from mergesearch.evaluators.spec.tasks import LmEvalSpec
from mergesearch.evaluators.spec.texts import GenerationSpec, PerplexitySpec

AnySpec = (
    SyntheticSpec
    | DistanceSpec
    | ClassificationSpec
    | EntropySpec
    | AlignmentSpec
    | LanguageModelSpec
    | LmEvalSpec
    | SegmentationSpec
    | CommandSpec
    | GenerationSpec
    | PerplexitySpec
    | T3Spec
    | TwinMergingSpec
)
EvaluatorSpec = Annotated[AnySpec, Key(discriminator="kind")]

#: Kind -> one line, for listings.
EVALUATORS: Mapping[str, str] = {
    "alignment": "how far answers are from those of each domain's expert, without labels; gives "
    "gradients",
    "classification": "accuracy and cross-entropy of an image classifier on a datasets folder, by "
    "domain",
    "command": "objectives that another program measures, JSON in and JSON out, one process per "
    "trial",
    "distance": "how far a merge is from the base, relative to its size; no items",
    "entropy": "how sure a model is of its answers, without labels; gives gradients",
    "generation": "what a causal language model writes after prompts, judged by a function or a "
    "built-in scorer",
    "language_model": "next-token cross-entropy of a causal language model on token ids; gives "
    "gradients",
    "lm_eval": "tasks of the language-model evaluation harness, local or its own, document by "
    "document",
    "perplexity": "logarithm of the perplexity of a causal language model on texts; gives "
    "gradients",
    "segmentation": "Dice, IoU and cross-entropy of masks by a promptable or semantic model, on a "
    "datasets folder",
    "synthetic": "analytic problems with known optima, no model; noise and faults for trying out a "
    "cluster",
    "t3": "base and one expert merged for each input by how much they disagree, as an image "
    "classifier",
    "twin_merging": "shared merge and low-rank vectors of experts, routed for each input, as an "
    "image classifier",
}


def parse_evaluators(section: Sequence[Mapping[str, Any]]) -> list[AnySpec]:
    """Parse the section from the plain data of a resolved study."""
    return TypeAdapter(list[EvaluatorSpec]).validate_python(list(section))


def build_evaluator(specs: Sequence[AnySpec], folder: Path) -> Evaluator:
    """Build one evaluator for the whole section; relative paths start at ``folder``.

    Raises:
        InputError: If two objectives have the same name, or the parts do not fit together.
    """
    members = [spec.build(folder, f"evaluators.{index}") for index, spec in enumerate(specs)]
    return members[0] if len(members) == 1 else Composite(members)
