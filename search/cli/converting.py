"""The verb that writes pickled weights as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesearch.search.cli.options import JsonOption, OutOption, OverwriteOption, emit


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Folder with pytorch_model.bin, or a file such as last.ckpt."
        ),
    ],
    out: OutOption,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Where a file holds several state dicts, the one that is meant."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write weights that torch.save pickled as safetensors.

    Nothing is unpickled: the file is followed as data, and only tensors are taken from it. Names
    and numbers stay as they are; configuration and tokenizer are copied.
    """
    from mergesearch.merging.export.converting import convert as convert_weights
    from mergesearch.search.grammar import counted

    converted = convert_weights(source, out, key=key, overwrite=overwrite)
    result = {
        "out": str(out),
        "tensors": converted.tensors,
        "bytes": converted.size,
        "left": list(converted.left),
        "warnings": list(converted.warnings),
    }
    lines = [
        f"wrote {counted(converted.tensors, 'tensor')}, {converted.size / 1e6:.1f} MB, to {out}"
    ]
    if converted.left:
        lines.append(f"left out, as they are no tensors: {', '.join(converted.left[:6])}")
    lines += [f"warning: {line}" for line in converted.warnings]
    emit(result, as_json, lambda: lines)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        epilog="Example: mergesearch convert models/old-bert --out models/bert; "
        "mergesearch convert last.ckpt --key ema --out models/ema"
    )(convert)
