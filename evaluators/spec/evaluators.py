"""The ``evaluators:`` section of a study file, and the evaluator that it describes.

Packages add kinds by entry points of the group ``mergesearch.evaluators``: a pydantic model like
those of this folder, with ``kind: Literal[NAME]`` and ``build(folder, where)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, SerializeAsAny, TypeAdapter, WrapValidator
from pydantic import Field as Key

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.composite import Composite
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.spec.audio import AudioClassificationSpec, SpeechRecognitionSpec
from mergesearch.evaluators.spec.classifiers import TextClassificationSpec, TokenClassificationSpec
from mergesearch.evaluators.spec.functions import PythonSpec, TaskMasksSpec
from mergesearch.evaluators.spec.images import (
    ClassificationSpec,
    SegmentationSpec,
    T3Spec,
    TwinMergingSpec,
)
from mergesearch.evaluators.spec.models import AlignmentSpec, EntropySpec, LanguageModelSpec
from mergesearch.evaluators.spec.others import CommandSpec, DistanceSpec, SyntheticSpec
from mergesearch.evaluators.spec.pairs import (
    RetrievalSpec,
    RewardSpec,
    SequenceToSequenceSpec,
    SimilaritySpec,
)
from mergesearch.evaluators.spec.preference import PreferenceSpec
from mergesearch.evaluators.spec.quantised import score_quantised
from mergesearch.evaluators.spec.section import ModelSection
from mergesearch.evaluators.spec.tasks import LmEvalSpec
from mergesearch.evaluators.spec.texts import GenerationSpec, PerplexitySpec
from mergesearch.evaluators.spec.zero_shot import VisualQuestionsSpec, ZeroShotSpec
from mergesearch.merging import InputError
from mergesearch.merging.extensions.table import Table

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
    | PreferenceSpec
    | PythonSpec
    | AudioClassificationSpec
    | RetrievalSpec
    | RewardSpec
    | SequenceToSequenceSpec
    | SimilaritySpec
    | SpeechRecognitionSpec
    | T3Spec
    | TaskMasksSpec
    | TextClassificationSpec
    | TokenClassificationSpec
    | TwinMergingSpec
    | VisualQuestionsSpec
    | ZeroShotSpec
)


def _as_section(name: str, value: Any, _origin: str, label: str) -> type[BaseModel]:
    """Check the section that a plug-in gives.

    Raises:
        InputError: If it is no pydantic model of that kind with ``build``.
    """
    model = isinstance(value, type) and issubclass(value, BaseModel)
    kind = value.model_fields.get("kind") if model else None
    if kind is None or get_args(kind.annotation) != (name,) or not hasattr(value, "build"):
        raise InputError(
            f"{label}: expected a pydantic model with kind: Literal[{name!r}] and a method build, "
            f"received {getattr(value, '__name__', type(value).__name__)}"
        )
    section: type[BaseModel] = value
    return section


def _kind_of(section: type[BaseModel]) -> str:
    [kind] = get_args(section.model_fields["kind"].annotation)
    return str(kind)


#: Kind -> its section, those of plug-ins among them.
SECTIONS: Table[type[BaseModel]] = Table(
    "evaluators",
    {_kind_of(section): section for section in sorted(get_args(AnySpec), key=_kind_of)},
    _as_section,
)


def _with_plugins(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validate the section of a plug-in by its own model, and all others as usual."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind in SECTIONS.own or kind not in SECTIONS:
        return validate(value)
    models: Any = AnySpec | SECTIONS[kind]
    return TypeAdapter(Annotated[models, Key(discriminator="kind")]).validate_python(value)


EvaluatorSpec = Annotated[
    SerializeAsAny[Annotated[AnySpec, Key(discriminator="kind")]], WrapValidator(_with_plugins)
]

#: Kind -> one line, for listings.
EVALUATORS: Mapping[str, str] = {
    "alignment": "how far answers are from those of each domain's expert, without labels; gives "
    "gradients",
    "audio_classification": "accuracy, macro F1 and cross-entropy of classes of recordings; gives "
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
    "preference": "what people prefer, of pairs of texts or pictures that they are shown on a "
    "local page",
    "python": "objectives that a Python function measures, called with the merged model in the "
    "worker's own process",
    "retrieval": "recall and discounted gain of the document of a query among all, by embeddings, "
    "and its contrastive loss; gives gradients",
    "reward": "how often a reward model prefers the chosen of two texts; gives gradients",
    "segmentation": "Dice, IoU and cross-entropy of masks by a promptable or semantic model, on a "
    "datasets folder",
    "sequence_to_sequence": "chrF, ROUGE-L, exact match and cross-entropy of an "
    "encoder-decoder; gives gradients",
    "similarity": "correlations of cosines of embeddings with numbers; gives gradients",
    "speech_recognition": "word and character error rates of what a model hears in recordings, "
    "and cross-entropy of what is said; gives gradients",
    "synthetic": "analytic problems with known optima, no model; noise and faults for trying out a "
    "cluster",
    "t3": "base and one expert merged for each input by how much they disagree, as an image "
    "classifier or by class prompts",
    "task_masks": "one sum of the experts' changes under the mask of each task, tasks told or "
    "inferred once, measured by a Python function",
    "text_classification": "accuracy, macro F1 and cross-entropy of classes of texts or pairs, "
    "or correlations of numbers; gives gradients",
    "token_classification": "macro F1, accuracy and cross-entropy of classes of words, and scores "
    "of whole spans; gives gradients",
    "twin_merging": "shared merge and low-rank vectors of experts, routed for each input, as an "
    "image classifier or by class prompts",
    "visual_questions": "right answers to questions about pictures, by a model that writes, and "
    "their cross-entropy; gives gradients",
    "zero_shot": "accuracy, cross-entropy and entropy of CLIP, SigLIP and the like by class "
    "prompts, by task; gives gradients",
}


def summary_of(section: type[BaseModel]) -> dict[str, str]:
    """What ``mergesearch ls evaluators`` says about a kind."""
    kind = _kind_of(section)
    summary = (section.__doc__ or f"{section.__name__}, without a docstring").strip().splitlines()
    return {"name": kind, "summary": EVALUATORS.get(kind, summary[0].rstrip("."))}


def parse_evaluators(section: Sequence[Mapping[str, Any]]) -> list[AnySpec]:
    """Parse the section from the plain data of a resolved study."""
    return TypeAdapter(list[EvaluatorSpec]).validate_python(list(section))


def hands_weights_out(specs: Sequence[AnySpec]) -> bool:
    """Whether code of others is handed the model, whose weights it may write to in any way."""
    return any(spec.kind not in SECTIONS.own or getattr(spec, "runs_code", False) for spec in specs)


def build_evaluator(specs: Sequence[AnySpec], folder: Path, lend: float | None = None) -> Evaluator:
    """Build one evaluator for the whole section; relative paths start at ``folder``.

    Args:
        specs: Its sections.
        folder: Where relative paths start.
        lend: Share of the validation items that the search uses instead; None: none of them.

    Raises:
        InputError: If there is no objective, two have the same name, the parts do not fit
            together, or one of them cannot lend, or score rounded weights.
    """
    members = [spec.build(folder, f"evaluators.{index}") for index, spec in enumerate(specs)]
    if not any(member.objectives for member in members):
        raise InputError(
            "evaluators: expected at least one objective, received bounds alone; give one section "
            "objectives"
        )
    for member in members:
        if lend is not None:
            member.lend(lend)
    for spec, member in zip(specs, members, strict=True):
        if isinstance(spec, ModelSection) and isinstance(member, EvaluatorBase):
            member.head = spec.head
    for index, (spec, member) in enumerate(zip(specs, members, strict=True)):
        kind = spec.quantise if isinstance(spec, ModelSection) else None
        if kind is not None:
            score_quantised(member, kind, f"evaluators.{index}")
    rounds = any(getattr(member, "quantise", None) for member in members)
    return members[0] if len(members) == 1 and not rounds else Composite(members)
