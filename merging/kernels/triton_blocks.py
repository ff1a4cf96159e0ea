"""Which program of a Triton kernel works on what: tables of blocks.

A merge is cut into pieces, each within one span and one segment, and pieces into blocks, one for
each program. Spans whose terms are stored alike are one launch; what is left after
:data:`SPECIAL` of them is one more, whose kernel reads from a table how terms are stored. Blocks
start at multiples of 128 elements of a span, wherever their piece starts: loads are then of whole
vectors, and what lies outside the piece is masked.

Nothing here needs Triton.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import InputError
from mergesearch.merging.kernels.spans import ITEMSIZE, SCALE_BLOCK, Column, Piece, Span, pieces

if TYPE_CHECKING:
    import torch

#: How a term is stored, as one number: its dtype, and these flags.
CODES_OF_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
MINUS_BASE = 4
SCALED = 8
MASKED = 16
PACKED = 32

#: Offsets of a column: of numbers, mask, scales and starts.
OFFSETS = 4

#: Signatures that have a kernel of their own; with the one for the rest, the launches of a merge.
SPECIAL = 9

#: Oldest devices that the kernels are compiled for.
LEAST_CAPABILITY = (8, 0)

#: Tables that are kept: a model merges a few stretches of spans in turn.
KEPT_TABLES = 4

#: What a program reads of its piece: first block, first element, first and last element that are
#: the piece's, position of the span, number of its columns, segment; then the slot of the first
#: block among all.
PIECE_FIELDS = 8

_Index = npt.NDArray[np.int64]

Launched = TypeVar("Launched")


@dataclass(frozen=True)
class Signature:
    """What spans of one launch have in common.

    Attributes:
        codes: How each term is stored, base first.
        shared: Whether rows are divided by the number of rows that keep the position.
        aligned: Whether all numbers start at multiples of 16 bytes.
    """

    codes: tuple[int, ...]
    shared: bool
    aligned: bool


@dataclass(frozen=True, eq=False)
class Launch:
    """The tables of one launch, still in main memory.

    Attributes:
        signature: Of its spans; the one for the rest has no codes.
        blocks: Number of programs.
        counts: Blocks of each piece, ``(pieces,)``.
        pieces: int64 ``(pieces, PIECE_FIELDS)``.
        columns: Offsets of each term, int64 ``(spans, terms, OFFSETS)``.
        scales: What terms are multiplied with, fp32 ``(spans, terms)``.
        flags: Code of each term, then whether the span is shared, int32 ``(spans, terms + 1)``.
    """

    signature: Signature
    blocks: int
    counts: _Index
    pieces: _Index
    columns: _Index
    scales: npt.NDArray[np.float32]
    flags: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Uploaded:
    """The tables of one launch on a device; ``piece_of`` says which piece each block belongs to."""

    launch: Launch
    piece_of: torch.Tensor
    pieces: torch.Tensor
    columns: torch.Tensor
    scales: torch.Tensor
    flags: torch.Tensor


def usable(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a GPU, or any where Triton is interpreted.

    On a machine with Triton alone: ``TRITON_INTERPRET=1``, set before Triton is imported.
    """
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if device.type != "cuda":
        return False
    import torch

    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def code(column: Column) -> int:
    """How a term is stored, as one number.

    Raises:
        InputError: If its numbers are fp64.
    """
    if column.dtype not in CODES_OF_DTYPES:
        raise InputError(
            f"triton: expected columns of {', '.join(CODES_OF_DTYPES)}, received {column.dtype}; "
            "use kernel='torch'"
        )
    return (
        CODES_OF_DTYPES[column.dtype]
        + MINUS_BASE * column.minus_base
        + SCALED * (column.scale != 1)
        + MASKED * (column.mask is not None)
        + PACKED * (column.starts is not None)
    )


def block_rows(terms: int) -> int:
    """Rows of eight elements that a program of a merge of so many terms works on.

    The numbers of all terms are in registers at once: of many terms, those of fewer elements.
    """
    if terms <= 17:
        return 256
    return 128 if terms <= 33 else 64


class Tables:
    """The tables of recent launches on their device, kept while spans and boundaries stay the same.

    Whoever merges the same spans again and again owns one.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[Any, ...], _Index, tuple[object, ...], list[Any]]] = []

    def of(
        self,
        items: Sequence[Any],
        boundaries: _Index,
        detail: tuple[object, ...],
        make: Callable[[], list[Launched]],
    ) -> list[Launched]:
        """What ``make`` gives, or gave before.

        Args:
            items: Spans, or other things with a place; the same objects compare in microseconds.
            boundaries: Of the segments.
            detail: Whatever else the tables depend on.
            make: Works out the tables and puts them on the device.
        """
        own = tuple(items)
        for known in self._kept:
            if known[2] == detail and known[0] == own and np.array_equal(known[1], boundaries):
                return known[3]
        made = make()
        self._kept = [*self._kept[1 - KEPT_TABLES :], (own, boundaries.copy(), detail, made)]
        return made


def span_tables(
    tables: Tables | None,
    spans: Sequence[Span],
    boundaries: _Index,
    block: int,
    device: torch.device,
) -> list[Uploaded]:
    """The launches over spans in blocks of ``block`` elements, with their tables on a device."""

    def make() -> list[Uploaded]:
        return [_uploaded(launch, device) for launch in launches(spans, boundaries, block)]

    kept = Tables() if tables is None else tables
    return kept.of(spans, boundaries, ("spans", block, device), make)


def launches(spans: Sequence[Span], boundaries: _Index, block: int) -> list[Launch]:
    """The launches of a merge: signatures in the order of their elements, then the rest.

    Raises:
        InputError: If spans are out of order, differ in their number of rows, start elsewhere than
            at a multiple of 64, or have numbers in fp64 or at an offset that is no multiple of
            their size.
    """
    _check(spans)
    cut = pieces(spans, boundaries)
    counts = np.array([_block_count(piece, spans[piece.span], block) for piece in cut], np.int64)
    slots = np.cumsum(counts) - counts
    signatures = [_signature(span) for span in spans]
    elements: Counter[Signature] = Counter()
    for piece in cut:
        elements[signatures[piece.span]] += piece.stop - piece.start
    order = [signature for signature, _ in elements.most_common()]
    groups = [(signature, {signature}) for signature in order[:SPECIAL]]
    if order[SPECIAL:]:
        rest = Signature((), False, all(own.aligned for own in order[SPECIAL:]))
        groups.append((rest, set(order[SPECIAL:])))
    result = []
    for signature, members in groups:
        chosen = [n for n, piece in enumerate(cut) if signatures[piece.span] in members]
        own = [cut[n] for n in chosen]
        result.append(_launch(signature, spans, own, counts[chosen], slots[chosen]))
    return result


def _check(spans: Sequence[Span]) -> None:
    rows = len(spans[0].rows) if spans else 0
    end = 0
    for span in spans:
        if span.start < end:
            raise InputError(
                f"triton: expected spans in the order of positions, received one that starts at "
                f"{span.start} after position {end}"
            )
        end = span.stop
        if len(span.rows) != rows or span.start % 64:
            raise InputError(
                f"triton: expected spans of {rows} rows that start at multiples of 64, received "
                f"one of {len(span.rows)} rows that starts at {span.start}"
            )
        for column in (span.base, *span.rows):
            code(column)
            _check_offsets(column)


def _check_offsets(column: Column) -> None:
    if column.offset % ITEMSIZE[column.dtype] or (column.scales or 0) % 4:
        raise InputError(
            f"triton: expected {column.dtype} numbers and scales at multiples of their size, "
            f"received offsets {column.offset} and {column.scales}"
        )
    if column.starts is not None and (column.starts % 4 or (column.mask or 0) % 4):
        raise InputError(
            "triton: expected mask and starts of packed numbers at multiples of 4, received "
            f"offsets {column.mask} and {column.starts}"
        )


def _signature(span: Span) -> Signature:
    columns = (span.base, *span.rows)
    aligned = all(column.offset % 16 == 0 for column in columns)
    return Signature(tuple(code(column) for column in columns), span.shared, aligned)


def _block_count(piece: Piece, span: Span, block: int) -> int:
    """Blocks of a piece; the first starts at or before it, at a multiple of 128."""
    return -(-(piece.stop - _first_element(piece, span) - span.start) // block)


def _first_element(piece: Piece, span: Span) -> int:
    return (piece.start - span.start) // SCALE_BLOCK * SCALE_BLOCK


def _launch(
    signature: Signature,
    spans: Sequence[Span],
    cut: Sequence[Piece],
    counts: _Index,
    slots: _Index,
) -> Launch:
    used = sorted({piece.span for piece in cut})
    number = {span: n for n, span in enumerate(used)}
    firsts = np.cumsum(counts) - counts
    rows = []
    for piece, first, slot in zip(cut, firsts.tolist(), slots.tolist(), strict=True):
        span = spans[piece.span]
        limits = (_first_element(piece, span), piece.start - span.start, piece.stop - span.start)
        rows.append((first, *limits, span.start, number[piece.span], piece.segment, slot))
    terms = [(spans[n].base, *spans[n].rows) for n in used]
    offsets = [
        [(c.offset, c.mask or 0, c.scales or 0, c.starts or 0) for c in columns]
        for columns in terms
    ]
    codes = [[code(column) for column in columns] for columns in terms]
    return Launch(
        signature=signature,
        blocks=int(counts.sum()),
        counts=counts,
        pieces=np.array(rows, np.int64),
        columns=np.array(offsets, np.int64),
        scales=np.array([[column.scale for column in columns] for columns in terms], np.float32),
        flags=np.array(
            [[*own, int(spans[n].shared)] for own, n in zip(codes, used, strict=True)], np.int32
        ),
    )


def _uploaded(launch: Launch, device: torch.device) -> Uploaded:
    import torch

    tables = (launch.pieces, launch.columns, launch.scales, launch.flags)
    return Uploaded(
        launch,
        piece_of_blocks(launch.counts, device),
        *(torch.from_numpy(table).to(device) for table in tables),
    )


def piece_of_blocks(counts: _Index, device: torch.device) -> torch.Tensor:
    """The piece that each block belongs to, int32 ``(blocks,)``, for the blocks of every piece."""
    import torch

    numbers = torch.arange(len(counts), dtype=torch.int32, device=device)
    repeats = torch.from_numpy(counts).to(device)
    return torch.repeat_interleave(numbers, repeats, output_size=int(counts.sum()))
