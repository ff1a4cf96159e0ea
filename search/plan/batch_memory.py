"""What the largest batch of a study's evaluators takes on a card, estimated from configurations.

For n = rows · tokens positions, hidden size h, width of all keys f, MLP size m, vocabulary V, and
w bytes a number, a forward pass without gradients holds at a time::

    hidden     3 n h w                               residual, its norm, output          (1)
    attention  (2 n h + 2 n f + rows · tokens²) w    queries, output, keys, values, mask (2)
    mlp        3 n m w                               gate, up, and their product         (3)
    logits     p V (w + 8)                           at p positions, in the model's dtype, in
                                                     fp32, and their log-softmax         (4)
    cache      2 n f w layers                        keys and values of generation       (5)

Its peak is (5) + the largest of (1) + (2), (1) + (3) and (4). Where tokens are scored without
gradients, p is bounded (:mod:`mergesearch.evaluators.text.token_scores`). A pass with gradients
keeps in every layer, and at the end for all positions::

    layer      20 n h + (2 n h + 2 n f + 4 n m) w    two norms, which compute in fp32, with their
                                                     inputs; attention; and the MLP      (6)
    logits     n V (w + 12)                          as (4), and their gradient          (7)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.evaluators.batching import ACCELERATOR_TOKENS
from mergesearch.evaluators.spec.evaluators import AnySpec
from mergesearch.evaluators.text.token_scores import ACCELERATOR_HEAD_BYTES

#: Tokens of a row where a study does not say how long its texts are.
ROW_TOKENS = 1024
#: Evaluators that score tokens, whose logits are computed for some positions at a time.
_SCORING = frozenset({"language_model", "lm_eval", "perplexity"})
#: Evaluators whose models write.
_WRITING = frozenset({"generation", "preference"})
#: Evaluators of images, which give one answer for each.
_OF_IMAGES = frozenset({"classification", "segmentation", "t3", "twin_merging"})


@dataclass(frozen=True)
class BatchBytes:
    """Bytes of one forward pass, or of one with gradients.

    Attributes:
        rows, tokens: Of the batch: texts or images, and positions of each.
        passing: What exists at a time of hidden states, attention, MLP and logits.
        cache: Keys and values of generated texts.
        engine: Share of a card that an engine of its own takes beside the resident model.
    """

    rows: int = 0
    tokens: int = 0
    passing: int = 0
    cache: int = 0
    engine: float = 0.0

    @property
    def total(self) -> int:
        """Bytes of the resident model's batch."""
        return self.passing + self.cache


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer.

    Attributes:
        hidden: Size h of hidden states.
        layers: Their number.
        keys: Size f of the keys of all heads.
        mlp: Inner size m.
        classes: Vocabulary or number of labels V.
        positions: Tokens that it has room for.
    """

    hidden: int
    layers: int
    keys: int
    mlp: int
    classes: int
    positions: int | None


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """The sizes that a configuration states; None where it is not one of a transformer."""
    inner = {**config, **(config.get("text_config") or {})}

    def first(*names: str) -> int | None:
        return next((int(inner[n]) for n in names if isinstance(inner.get(n), int)), None)

    hidden = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "num_layers")
    if not hidden or not layers:
        return None
    heads = first("num_attention_heads", "n_head") or 1
    head = first("head_dim") or hidden // heads
    patches = None
    if isinstance(inner.get("image_size"), int) and isinstance(inner.get("patch_size"), int):
        patches = (inner["image_size"] // max(inner["patch_size"], 1)) ** 2 + 1
    return ModelShape(
        hidden,
        layers,
        head * (first("num_key_value_heads") or heads),
        first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        first("vocab_size") or len(inner.get("id2label") or ()) or 1,
        patches or first("max_position_embeddings", "n_positions"),
    )


def batch_bytes(
    specs: Sequence[AnySpec],
    shape: ModelShape | None,
    itemsize: int,
    *,
    gradients: bool = False,
    divisor: int = 1,
) -> BatchBytes:
    """The largest batch of a study's evaluators.

    Args:
        specs: Its ``evaluators:`` section.
        shape: Of the model; nothing is estimated without one.
        itemsize: Bytes w of a number of the model.
        gradients: Whether the strategy needs backward passes.
        divisor: Plan with so much smaller batches, of one row at least.
    """
    if shape is None:
        return BatchBytes()
    sizes = [_one(spec, shape, itemsize, gradients, divisor) for spec in specs]
    engine = max((size.engine for size in sizes), default=0.0)
    largest = max(sizes, key=lambda size: size.total, default=BatchBytes())
    return BatchBytes(largest.rows, largest.tokens, largest.passing, largest.cache, engine)


def largest_batch(specs: Sequence[AnySpec]) -> int:
    """The largest ``batch_size`` of a study's evaluators; 1 where there are no batches."""
    return max((int(getattr(spec, "batch_size", 1)) for spec in specs), default=1)


def _one(
    spec: AnySpec, shape: ModelShape, itemsize: int, gradients: bool, divisor: int
) -> BatchBytes:
    """The batch of one evaluator; nothing for those that run no model."""
    if not hasattr(spec, "batch_size"):
        return BatchBytes()
    if spec.kind == "generation" and spec.engine == "vllm":
        share = spec.vllm.gpu_memory_utilization if spec.vllm is not None else 0.4
        return BatchBytes(engine=share)
    if spec.kind == "preference" and spec.function is not None:
        return BatchBytes()  # it makes batches of its own
    tokens = _tokens(spec, shape)
    generated = int(getattr(spec, "max_new_tokens", 0)) if spec.kind in _WRITING else 0
    rows = _rows(spec, tokens + generated, divisor)
    if gradients and _has_gradients(spec):
        passing = _passing_backward(shape, rows, tokens, itemsize)
    else:
        passing = _passing(
            shape, rows, tokens, _logits(spec, shape, rows, tokens, itemsize), itemsize
        )
    cache = 2 * rows * (tokens + generated) * shape.keys * itemsize * shape.layers  # (5)
    return BatchBytes(rows, tokens, passing, cache if generated else 0)


def _rows(spec: AnySpec, tokens: int, divisor: int) -> int:
    """Rows of a batch, which is bounded in rows and, for texts, in tokens."""
    rows = max(1, getattr(spec, "batch_size", 1) // divisor)
    if not hasattr(spec, "batch_tokens"):
        return rows
    limit = (spec.batch_tokens or ACCELERATOR_TOKENS) // divisor
    return max(1, min(rows, limit // tokens))


def _has_gradients(spec: AnySpec) -> bool:
    return spec.kind not in (*_WRITING, "lm_eval", "segmentation")


def _tokens(spec: AnySpec, shape: ModelShape) -> int:
    """Positions of a row: those of an image; else as the study says, or :data:`ROW_TOKENS`."""
    if spec.kind in _OF_IMAGES and shape.positions:
        return shape.positions
    wanted = getattr(spec, "max_length", None) or ROW_TOKENS
    return min(int(wanted), shape.positions or int(wanted))


def _logits(spec: AnySpec, shape: ModelShape, rows: int, tokens: int, itemsize: int) -> int:
    """Bytes of the logits that exist at a time without gradients."""
    if spec.kind in _WRITING or spec.kind in _OF_IMAGES:
        tokens = 1
    size = rows * tokens * shape.classes * (itemsize + 8)  # (4)
    return min(size, ACCELERATOR_HEAD_BYTES) if spec.kind in _SCORING else size


def _parts(shape: ModelShape, rows: int, tokens: int, itemsize: int) -> tuple[int, int, int]:
    """Bytes of hidden states, attention and MLP, by the equations above."""
    n = rows * tokens
    hidden = 3 * n * shape.hidden * itemsize  # (1)
    mask = rows * tokens**2
    attention = (2 * n * shape.hidden + 2 * n * shape.keys + mask) * itemsize  # (2)
    return hidden, attention, 3 * n * shape.mlp * itemsize  # (3)


def _passing(shape: ModelShape, rows: int, tokens: int, logits: int, itemsize: int) -> int:
    """Bytes that a pass without gradients holds at a time."""
    hidden, attention, mlp = _parts(shape, rows, tokens, itemsize)
    return max(hidden + attention, hidden + mlp, logits)


def _passing_backward(shape: ModelShape, rows: int, tokens: int, itemsize: int) -> int:
    """Bytes that a pass with gradients holds: activations of every layer, and logits."""
    n = rows * tokens
    kept = 2 * shape.hidden + 2 * shape.keys + 4 * shape.mlp
    layer = n * (20 * shape.hidden + kept * itemsize)  # (6)
    return shape.layers * layer + n * shape.classes * (itemsize + 12)  # (7)
