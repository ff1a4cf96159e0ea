"""Which of some models the others were fine-tuned from.

What a model says of its origin comes first: an adapter's settings, ``base_model`` of its card,
``_name_or_path`` of its configuration. Then its class: a model without a head is the base of those
with one. Then its name. Last its weights: task vectors of experts point in different directions
from their base, while those from an expert all point back through the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import is_hub_name, short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.lineage.compare import compare_weights

#: Ends of the names of classes that have no head for a task of a user.
HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
#: Words in a name that say what a model is.
BASE_WORDS = frozenset({"base", "pretrained", "foundation"})
#: Cosines of two task vectors between which the largest from a base lies, and that which it has at
#: least as seen from each of the others. From the true base, experts of the zoos have 0.05 to 0.56;
#: seen from an expert, 0.27 to 0.79. Less than none means that the model lies between the others.
LEAST_COSINE = -0.1
LARGEST_COSINE = 0.3
LEAST_OF_OTHERS = 0.58


@dataclass(frozen=True)
class Origin:
    """The base of some experts.

    Attributes:
        base: It.
        experts: The others.
        reason: How it was told, as a clause.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    reason: str


def find_base(models: Sequence[Checkpoint], base: str | None) -> Origin:
    """The base among models, or the one that is named, and the experts.

    Raises:
        InputError: If it cannot be told; says what is missing.
    """
    if base is not None:
        return _origin(models, open_checkpoint(base, "base"), "named by --base")
    found = _of_adapters(models) or _said(models)
    if found is None:
        _check_alike(models)
        found = _by_class(models) or _by_name(models) or _by_weights(models)
    if found is None:
        raise _missing(models)
    return found


def _missing(models: Sequence[Checkpoint]) -> InputError:
    """What is missing where no base can be told, and what to do about it."""
    named = sorted({name for model in models for name in stated_parents(model)})
    if named:
        advice = f"cards and configurations name {', '.join(named)}: add --base {named[0]}"
    elif len(models) == 2:
        advice = (
            f"if one comes from the other, add --base {models[0].path} or --base "
            f"{models[1].path}, which also searches between two experts; if both are experts, "
            "add --base MODEL"
        )
    else:
        advice = "add --base MODEL, a folder or org/name"
    names = ", ".join(model.path for model in models)
    return InputError(
        "models: expected the base that the experts were fine-tuned from, received "
        f"{names}, of which nothing tells that it is the base; {advice}"
    )


def _check_alike(models: Sequence[Checkpoint]) -> None:
    """Refuse models of several types.

    Raises:
        InputError: With a model of each.
    """
    types = {str(model.config.get("model_type")): model.path for model in reversed(models)}
    if len(types) > 1:
        shown = ", ".join(f"{path} ({kind})" for kind, path in types.items())
        raise InputError(
            f"models: expected a base and experts of one architecture, received {shown}; leave "
            "out those that do not belong together, or name the base with --base"
        )


def _origin(models: Sequence[Checkpoint], base: Checkpoint, reason: str) -> Origin:
    experts = tuple(model for model in models if not _same(model, base))
    if not experts:
        raise InputError(
            f"models: expected at least one expert beside the base {base.path}, received none; "
            "add the fine-tuned models"
        )
    return Origin(base, experts, reason)


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return one is other or _place(one.path) == _place(other.path)


def _place(path: str) -> str:
    local = Path(path).expanduser()
    return str(resolved(local)) if local.exists() else path


def _of_adapters(models: Sequence[Checkpoint]) -> Origin | None:
    """The model that all adapters adapt."""
    bases = {_place(m.model.path): m.model for m in models if isinstance(m, AdaptedCheckpoint)}
    if len(bases) != 1:
        return None
    [(place, model)] = bases.items()
    base = next((given for given in models if _place(given.path) == place), model)
    return _origin(models, base, "the model of the adapters")


def _said(models: Sequence[Checkpoint]) -> Origin | None:
    """The one model that others name as their origin, among these or on this machine."""
    named: dict[str, Checkpoint] = {}
    for model in models:
        for parent in stated_parents(model):
            given = [m for m in models if m is not model and _is_named(m, parent)]
            if given:
                named[given[0].path] = given[0]
    if len(named) == 1:
        [base] = named.values()
        return _origin(models, base, "its experts name it as their origin")
    stated = {parent for model in models for parent in stated_parents(model)}
    local = [parent for parent in stated if Path(parent).expanduser().is_dir()]
    if not named and len(stated) == len(local) == 1:
        return _origin(models, open_checkpoint(local[0], "base"), "the experts name it")
    return None


def _is_named(model: Checkpoint, parent: str) -> bool:
    if _place(model.path) == _place(parent):
        return True
    return is_hub_name(parent) and model.path.split("@")[0] == parent


def stated_parents(model: Checkpoint) -> list[str]:
    """What a model's card and configuration name as its origin."""
    config = model.config.get("_name_or_path")
    named = [config] if isinstance(config, str) and config else []
    card = None if model.folder is None else model.folder / "README.md"
    if card is not None and card.is_file():
        named += _of_card(card)
    return [name for name in dict.fromkeys(named) if _place(name) != _place(model.path)]


def _of_card(card: Path) -> list[str]:
    """``base_model`` of a model card; none where it cannot be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        value = (metadata_load(card) or {}).get("base_model")
    except (OSError, ValueError, yaml.YAMLError):
        return []
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _by_class(models: Sequence[Checkpoint]) -> Origin | None:
    """The one model without a head."""
    classes = [str((model.config.get("architectures") or [""])[0]) for model in models]
    bare = [model for model, name in zip(models, classes, strict=True) if name.endswith(HEADLESS)]
    if len(bare) != 1 or len(models) < 2 or not all(classes):
        return None
    name = bare[0].config["architectures"][0]
    return _origin(models, bare[0], f"the only one without a head for a task ({name})")


def _by_name(models: Sequence[Checkpoint]) -> Origin | None:
    """The one model that is called base, or whose name begins the names of all others."""
    names = [short_name(model.path).lower() for model in models]
    called = [index for index, name in enumerate(names) if BASE_WORDS & {*re.split(r"\W|_", name)}]
    shortest = min(range(len(names)), key=lambda index: len(names[index]))
    first = names[shortest]
    if len(models) < 2:
        return None
    if len(called) == 1:
        base = models[called[0]]
        return _origin(models, base, f"told from its name, {short_name(base.path)}")
    others = [name for index, name in enumerate(names) if index != shortest]
    if all(re.match(rf"{re.escape(first)}[\W_]", name) for name in others):
        return _origin(models, models[shortest], "told from the names, which begin with its own")
    return None


def _by_weights(models: Sequence[Checkpoint]) -> Origin | None:
    """The model from which the others lie in different directions, as seen from no other.

    Among three, an expert that the other goes beyond on the same way may look like the base: then
    the first model must be the one, as one lists them. Among more it has too many to look alike.
    """
    if len(models) < 3:
        return None
    squares = {}
    for one, other in combinations(range(len(models)), 2):
        roles = compare_weights(models[one], models[other]).roles
        change = sum(role.change for name, role in roles.items() if name != "head")
        if not change:
            return None  # alike, or nothing in common
        squares[one, other] = squares[other, one] = change
    count = len(models)
    cosines = sorted((_largest_cosine(index, count, squares), index) for index in range(count))
    (least, index), (next_least, _) = cosines[:2]
    clear = LEAST_COSINE <= least <= LARGEST_COSINE and next_least >= LEAST_OF_OTHERS
    if not clear or (count == 3 and index != 0):
        return None
    return _origin(
        models,
        models[index],
        f"told from the weights, as task vectors have cosines of {max(least, 0):.2f} at most from "
        f"it, and of {next_least:.2f} from others",
    )


def _largest_cosine(origin: int, count: int, squares: dict[tuple[int, int], float]) -> float:
    """The largest cosine of two task vectors from a model, by the law of cosines."""
    others = [index for index in range(count) if index != origin]
    found = [
        (squares[origin, one] + squares[origin, other] - squares[one, other])
        / (2 * math.sqrt(squares[origin, one] * squares[origin, other]))
        for one, other in combinations(others, 2)
    ]
    return max(found, default=math.inf)


def unique_names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """A name for each path: the given one, else the short one, with its folder's where needed."""
    short = [name or short_name(path) for path, name in zip(paths, names, strict=True)]
    longer = [
        f"{Path(path).parent.name}-{name}" if short.count(name) > 1 and not given else name
        for path, name, given in zip(paths, short, names, strict=True)
    ]
    if len(set(longer)) < len(longer):
        twice = next(name for name in longer if longer.count(name) > 1)
        raise InputError(
            f"models: expected models of different names, received {twice!r} twice; name them, "
            "such as poet=models/a critic=models/b"
        )
    return longer
