"""Options of ``export`` for other forms than a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FolderOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder to write the model to."),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="Folder to write the merge to as one LoRA adapter of the base, which peft loads.",
    ),
]
AdapterRankOption = Annotated[
    int | None,
    typer.Option(
        "--adapter-rank",
        min=1,
        metavar="R",
        help="Cut the adapter to this rank, whatever the merge; the loss is printed.",
    ),
]
LossyOption = Annotated[
    bool,
    typer.Option(
        "--lossy", help="Leave out of the adapter what it cannot hold, such as changed norms."
    ),
]
GgufOption = Annotated[
    Path | None,
    typer.Option("--gguf", metavar="FILE", help="GGUF file to write the model to, for llama.cpp."),
]
GgufTypeOption = Annotated[
    str | None,
    typer.Option(
        "--gguf-type",
        metavar="TYPE",
        help="Type of its matrices: f32, f16 (default), bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q4_k, "
        "or bits for those that a study gave layers (space.bits).",
    ),
]
