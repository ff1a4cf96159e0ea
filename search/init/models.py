"""Base and experts as a study would merge them, and the policies that their tensors need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergesearch.merging import CheckpointError, InputError
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.base_names import with_base_names
from mergesearch.merging.family.family import ModelFamily, align_family
from mergesearch.merging.family.head_names import labels_differ, labels_of, odd_heads, tied_apart
from mergesearch.merging.family.special_tensors import running_statistics
from mergesearch.merging.family.vocabulary import check_same_tokens, is_vocabulary
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.refusal import refusal
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.policies import parse_policies
from mergesearch.merging.tensors.source import shapes_of
from mergesearch.search.init.commented import Key, plain
from mergesearch.search.init.finding_base import find_base, unique_names
from mergesearch.search.init.given import Given

#: Files of which a folder with a tokenizer has one.
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, eq=False)
class Models:
    """Base and experts of a study.

    Attributes:
        base: The base.
        experts: Its experts.
        reason: How the base was told.
        lineages: How each expert relates to it.
        special: Policies that their tensors need.
        family: All of them in one shape.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    reason: str
    lineages: tuple[Lineage, ...]
    special: tuple[Key, ...]
    family: ModelFamily

    @property
    def heads(self) -> str:
        """The policy for heads; empty where they are merged like all else."""
        return str(plain(self.special).get("heads", ""))

    @property
    def class_name(self) -> str:
        """The class of the experts, whose task is the study's."""
        named = [model.config.get("architectures") for model in (*self.experts, self.base)]
        return str(next((names[0] for names in named if names), ""))

    def labels(self, expert: str | None = None) -> tuple[str, ...] | None:
        """Names of the classes of an expert, or of the first model that has any."""
        models = [m for m in self.experts if expert in (None, m.name)]
        if expert is None and self.heads != "average":
            models = [self.base, *models]
        return next((names for m in models if (names := labels_of(m.config))), None)


def open_models(given: Sequence[Given], base: str | None) -> Models:
    """Open models and find out what they are to each other; headers and samples are read.

    Raises:
        InputError: If there is no base, or an expert does not come from it.
    """
    names = unique_names([one.value for one in given], [one.name for one in given])
    opened = [open_checkpoint(one.value, name) for one, name in zip(given, names, strict=True)]
    origin = find_base(opened, base)
    root, *experts = _comparable([origin.base, *origin.experts])
    lineages = tuple(compare_weights(root, expert) for expert in experts)
    refused = next((lineage for lineage in lineages if lineage.refused), None)
    if refused is not None:
        raise InputError(f"{refusal(refused)}, or name another base with --base")
    special = policies([origin.base, *origin.experts])
    family = align_family(origin.base, origin.experts, parse_policies(plain(special)))
    return Models(origin.base, origin.experts, origin.reason, lineages, special, family)


def _comparable(sources: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    """The sources with the base's names, of one architecture.

    Raises:
        InputError: If one has hardly a tensor in common with the base.
    """
    views, _ = with_base_names(sources)
    base = views[0]
    for view, source in zip(views[1:], sources[1:], strict=True):
        same = sum(view.merged.get(name) is not None for name in base.merged)
        if 2 * same < len(base.merged):
            kinds = [str((s.config.get("architectures") or ["?"])[0]) for s in (sources[0], source)]
            raise InputError(
                f"models: expected {source.path} ({kinds[1]}) to have the tensors of the base "
                f"{base.path} ({kinds[0]}), received {same} of {len(base.merged)}; leave it out, "
                "or name another base with --base"
            )
    return views


def policies(sources: Sequence[Checkpoint]) -> tuple[Key, ...]:
    """What the tensors of base and experts need beyond an operator, with reasons."""
    views, _ = with_base_names(sources)
    found = (_heads(views), _vocabulary(views), _tied(views), _batch_norm(views))
    return tuple(key for key in found if key is not None)


def _heads(sources: Sequence[Checkpoint]) -> Key | None:
    base, *experts = sources
    shapes = [shapes_of(source) for source in sources]
    tied = tied_apart(sources)
    odd = odd_heads(shapes, tied)
    if not odd and not labels_differ(base, experts):
        return None
    labels = {labels_of(expert.config) for expert in experts}
    if len(labels) == 1 and not odd_heads(shapes[1:], tied):
        why = (
            "The experts have heads for the same classes and the base has none, or one for others: "
            "theirs are averaged."
        )
        return Key("heads", "average", why)
    why = (
        "The experts have heads of their own, for other classes: what lies below is merged, and "
        "each task is scored with the head of its expert."
    )
    return Key("heads", "own", why)


def _vocabulary(sources: Sequence[Checkpoint]) -> Key | None:
    names = [name for name in sources[0].merged if is_vocabulary(name)]
    sizes = {
        name: {source.merged[name][0][0] for source in sources if name in source.merged}
        for name in names
    }
    if any(len(found) > 1 for found in sizes.values()):
        why = (
            "Vocabularies have different sizes: rows are aligned by token and those of the base "
            "kept. `union` keeps the tokens that experts added as well."
        )
        return Key("vocabulary", "base", why)
    try:
        check_same_tokens(sources)
    except CheckpointError:
        why = (
            "Some tokens have other rows in some models: rows are aligned by token, and those of "
            "the base kept."
        )
        return Key("vocabulary", "base", why)
    return None


def _tied(sources: Sequence[Checkpoint]) -> Key | None:
    if not tied_apart(sources):
        return None
    why = "Some models tie their output head to the embedding and others do not: all get their own."
    return Key("tied", "untie", why)


def _batch_norm(sources: Sequence[Checkpoint]) -> Key | None:
    if not running_statistics([*sources[0].merged]):
        return None
    why = (
        "Running statistics of BatchNorm are merged linearly; `recalibrate` recomputes them for "
        "every merge on items, which is better and slower."
    )
    return Key("batch_norm", "merge", why)


def folder_with(models: Models, names: Sequence[str], owner: str | None = None) -> str | None:
    """Path of a model that has one of some files; None: the owner has.

    Args:
        models: Where to look: the base first, then the experts.
        names: Names of files.
        owner: The expert where the study looks by itself; None: the base.

    Raises:
        InputError: If none has any.
    """
    own = next((model for model in models.experts if model.name == owner), models.base)
    if _has(own, names):
        return None
    found = next((model for model in (models.base, *models.experts) if _has(model, names)), None)
    if found is None:
        raise InputError(
            f"models: expected {names[0]} in the base or an expert, found it in none of them; "
            "save the tokenizer or processor that they were trained with into the base's folder"
        )
    return found.path


def _has(model: Checkpoint, names: Sequence[str]) -> bool:
    return model.folder is not None and any((Path(model.folder) / name).is_file() for name in names)
