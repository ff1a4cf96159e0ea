"""The event that takes a merge into the record: its outputs, and the comparisons that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.evaluators.preference.pairing import digest, plan_slots, strongest
from mergesearch.search.judging.panel import Panel, prompt_digest


def model_event(
    exhibit: Exhibit,
    panel: Panel | None,
    choices: Mapping[str, str | None],
    keep_picture: Callable[[str, bytes], None],
) -> dict[str, Any]:
    """The part of the event that follows from the outputs.

    A merge whose outputs are all those of another one is the same model, and needs no comparisons.

    Args:
        exhibit: The outputs.
        panel: The models so far; None for the base, which is the first.
        choices: Pair -> preferred output, None for neither.
        keep_picture: Stores a picture under its name.
    """
    rows = [_row(output, keep_picture) for output in exhibit.outputs]
    prompts = [prompt_digest(row["prompt"]) for row in rows]
    written = (f"{prompt} {row['output']}" for prompt, row in zip(prompts, rows, strict=True))
    model = digest("\0".join(written).encode())
    slots: list[list[str]] = []
    if panel is not None and model not in panel.outputs:
        rivals = strongest(list(panel.outputs), panel.strengths(choices), panel.base)
        planned = plan_slots(prompts, panel.base, rivals, exhibit.choices)
        slots = [[slot.prompt, slot.opponent] for slot in planned]
    return {"model": model, "question": exhibit.question, "outputs": rows, "slots": slots}


def _row(output: Output, keep_picture: Callable[[str, bytes], None]) -> dict[str, str]:
    """An output as it is recorded: a text itself, of a picture the name of its file."""
    name = digest(output.content, output.kind)
    if output.kind == "text":
        text = output.content.decode()
    else:
        text = f"{name}.{output.kind}"
        keep_picture(text, output.content)
    return {"prompt": output.prompt, "output": name, "kind": output.kind, "text": text}
