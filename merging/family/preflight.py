"""Everything that can be refused from headers and configurations, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.tied import find_aliases, ties_embeddings
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.base_names import with_base_names
from mergesearch.merging.family.head_names import odd_heads
from mergesearch.merging.family.messages import listed
from mergesearch.merging.family.vocabulary import is_vocabulary
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import Layout, natural_key
from mergesearch.merging.tensors.source import shapes_of

#: Settings that change what tensors of the same shape mean; compared where both configurations have
#: them.
_SETTINGS = (
    *("model_type", "architectures"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads"),
    *("rope_theta", "rope_scaling", "rope_parameters", "position_embedding_type"),
)
#: Said where sources are of other classes.
_OTHER_HEADS = ", or set special: {heads: own | base | average} if only heads differ"


def layout_of(base: Checkpoint) -> Layout:
    """Layout of every arena of a merge on ``base``.

    Raises:
        CheckpointError: If it holds nothing to merge.
    """
    if not base.merged:
        raise CheckpointError(
            f"{base.path}: expected floating-point tensors to merge, received none"
        )
    return Layout.build(base.merged)


def check_family(
    base: Checkpoint, experts: Sequence[Checkpoint], policies: TensorPolicies | None = None
) -> Layout:
    """The common layout of ``base`` and ``experts``, which must be fine-tuned from it.

    Dtypes may differ (bfloat16 experts of a float32 base). Tensors that a merge copies from the
    base, such as integer buffers, are not compared. A tied tensor may be stored twice on one side
    only.

    Args:
        base: The base, as policies make it.
        experts: Its experts, likewise.
        policies: Those that were chosen; None for the defaults.

    Raises:
        CheckpointError: If an expert has another architecture, other tensors or shapes, or another
            vocabulary.
    """
    layout = layout_of(base)
    policies = policies or TensorPolicies()
    for expert in experts:
        _check_settings(base, expert, policies)
        _check_kinds(base, expert)
        _check_names(base, expert, policies)
        _check_shapes(base, expert)
    return layout


def _check_settings(base: Checkpoint, expert: Checkpoint, policies: TensorPolicies) -> None:
    # Another head is another class of the same model; another modality, another model around it.
    free = {"architectures"} if policies.heads != "refuse" or policies.absent == "own" else set()
    free |= {"model_type"} if policies.absent == "own" else set()
    for key in _SETTINGS:
        ours = None if key in free else base.config.get(key)
        theirs = _setting(expert.config, key)
        if ours is not None and theirs is not None and ours != theirs:
            raise _misfit(
                expert,
                base,
                f"expected {key} {_short(ours)} in config.json, received {_short(theirs)}",
                _OTHER_HEADS if key == "architectures" else "",
            )


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of a model, or of the language model inside it."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)


def _check_kinds(base: Checkpoint, expert: Checkpoint) -> None:
    odd = {*base.merged} & {*expert.carried} | {*base.carried} & {*expert.merged}
    for name in sorted(odd, key=natural_key):
        ours = base.tensors[name].dtype
        theirs = expert.tensors[name].dtype
        raise _misfit(expert, base, f"tensor {name!r}: expected {ours}, received {theirs}")


def _check_names(base: Checkpoint, expert: Checkpoint, policies: TensorPolicies) -> None:
    missing = {*base.merged} - {*expert.merged}
    extra = {*expert.merged} - {*base.merged}
    parts = [
        f"{word} {listed(names)}"
        for word, names in (("missing", missing), ("extra", extra))
        if names
    ]
    if parts:
        hint = _hint(base, expert, missing | extra, policies)
        raise _misfit(
            expert, base, f"expected the base's tensors, received {'; '.join(parts)}", hint
        )


def _hint(base: Checkpoint, expert: Checkpoint, odd: set[str], policies: TensorPolicies) -> str:
    """The policies under which tensors that only one side has can be merged, but those set."""
    tied = {a for source in (base, expert) for a, _ in find_aliases(source.tensors, tied=True)}
    if odd <= tied and ties_embeddings(base.config) != ties_embeddings(expert.config):
        return ", or give all sources heads of their own with special: {tied: untie}"
    shapes = [shapes_of(source) for source in with_base_names([base, expert])[0]]
    heads = {*shapes[0]} ^ {*shapes[1]} <= odd_heads(shapes)
    hints = ["heads: own | base | average"] if heads and policies.heads == "refuse" else []
    if policies.absent == "refuse":
        hints.append("absent: base_zero | average")
    if policies.absent != "own":
        hints.append("absent: own")
    return "".join(f", or set special: {{{hint}}}" for hint in hints)


def _check_shapes(base: Checkpoint, expert: Checkpoint) -> None:
    odd = [name for name, (shape, _) in base.merged.items() if expert.merged[name][0] != shape]
    if not odd:
        return
    vocabulary = [
        name for name in odd if _is_vocabulary(base.merged[name][0], expert.merged[name][0], name)
    ]
    what = "vocabulary size" if vocabulary else "shape"
    shown = vocabulary or odd
    ours = base.merged[shown[0]][0]
    theirs = expert.merged[shown[0]][0]
    pair = (ours[0], theirs[0]) if vocabulary else (list(ours), list(theirs))
    hint = ""
    if vocabulary:
        hint = ", or align rows by token with special: {vocabulary: base | union | common}"
    elif {*odd} <= odd_heads([shapes_of(base), shapes_of(expert)]):
        hint = ", or set special: {heads: own | base | average}"
    raise _misfit(
        expert, base, f"expected {what} {pair[0]}, received {pair[1]} in {listed(shown)}", hint
    )


def _is_vocabulary(ours: tuple[int, ...], theirs: tuple[int, ...], name: str) -> bool:
    same_rows = len(ours) == len(theirs) > 0 and ours[1:] == theirs[1:]
    return same_rows and is_vocabulary(name)


def _misfit(expert: Checkpoint, base: Checkpoint, reason: str, hint: str = "") -> CheckpointError:
    return CheckpointError(
        f"expert {expert.name!r} ({expert.path}): {reason}; choose experts that were fine-tuned "
        f"from base {base.name!r} ({base.path}){hint}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
