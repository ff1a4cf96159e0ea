"""The verb that brings what models of other shapes know into a model that can be merged."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mergesearch.search.cli.options import JsonOption, OutOption, OverwriteOption, emit, say


def distill(
    pivot: Annotated[
        str, typer.Argument(metavar="PIVOT", help="The model whose shape, and start, is kept.")
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Models of any shape to learn from.")
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="A table of texts that all are read on.")
    ],
    out: OutOption,
    column: Annotated[str, typer.Option(metavar="NAME", help="Column of the texts.")] = "text",
    alignment: Annotated[
        str,
        typer.Option(metavar="NAME", help="How tokens are matched: edit, frequency or starts."),
    ] = "frequency",
    fusion: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How predictions become one: mince, average or selection."
        ),
    ] = "mince",
    text_weight: Annotated[
        float, typer.Option(help="Weight of the texts themselves beside the predictions, 0 to 1.")
    ] = 0.9,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 200,
    batch: Annotated[int, typer.Option(help="Texts of a step.")] = 8,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA that is trained.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a text that are read.")] = 512,
    kept: Annotated[int, typer.Option(help="Tokens of a prediction that are kept.")] = 10,
    held_out: Annotated[
        float, typer.Option(help="Part of the texts that is only measured, up to 0.5.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the LoRA alone, not the whole model.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA of PIVOT towards what SOURCEs of other shapes predict.

    Tokens are matched, predictions are written in the pivot's tokens and fused. Run it once for
    each source: the results share the pivot's shape and start, and can be merged with it as the
    base. A run that was stopped goes on if it is asked for again.
    """
    from mergesearch.merging.distillation.distilling import distill as run_distillation
    from mergesearch.merging.distillation.settings import Settings

    settings = Settings(
        alignment=alignment,
        fusion=fusion,
        text_weight=text_weight,
        steps=steps,
        batch=batch,
        rate=rate,
        rank=rank,
        length=length,
        kept=kept,
        held_out=held_out,
        seed=seed,
    )
    texts = read_texts(data, column)
    done = run_distillation(
        pivot,
        sources,
        texts,
        out,
        settings,
        adapter=adapter,
        overwrite=overwrite,
        report=_say_progress,
    )
    emit(asdict(done) | {"folder": str(out)}, as_json, lambda: _lines(done, sources, out))


def read_texts(data: Path, column: str) -> list[str]:
    """The texts of a column of a table.

    Raises:
        InputError: If there is no such table, or no such column of texts.
    """
    from mergesearch.evaluators.data.columns import check_columns
    from mergesearch.evaluators.data.table_files import READERS, read_table_file
    from mergesearch.merging import InputError
    from mergesearch.merging.foreign.shown import path_shown

    if data.suffix.lower() not in READERS:
        raise InputError(
            f"--data: expected a file that ends in {', '.join(READERS)}, received "
            f"{path_shown(data)}; convert it"
        )
    table = read_table_file(data, [column], "--data")
    check_columns(table, {"text": column}, f"--data: {path_shown(data)}")
    found: list[str] = table.column(column).to_pylist()
    return found


def _say_progress(step: int, steps: int, loss: float, left: float) -> None:
    say(f"step {step}/{steps}, loss {loss:.4f}, {left:.0f} s left")


def _lines(done: Any, sources: list[str], out: Path) -> list[str]:
    """What was done, for people."""
    lines = [
        f"{source}: speaks of {100 * covered:.0f} % of the tokens, mean weight {weight:.2f}"
        for source, covered, weight in zip(sources, done.covered, done.weights[1:], strict=True)
    ]
    if done.gain is not None:
        gain, half = done.gain
        lines.append(
            f"held-out loss {done.before:.4f} -> {done.after:.4f} nats per token "
            f"(gain {gain:.4f} ± {half:.4f})"
        )
    return [*lines, f"trained on {done.texts} texts; wrote {out}"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        epilog="Example: mergesearch distill models/llama models/gpt2-law --data law.jsonl "
        "--out models/llama-law"
    )(distill)
