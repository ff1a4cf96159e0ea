"""The note of a study in the dashboard, as markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mergesearch.evaluators import Objective

#: Most front members that the note lists.
LISTED = 20


def note_markdown(
    name: str,
    run: str,
    objectives: Sequence[Objective],
    *,
    winner: int | None = None,
    front: Sequence[int] = (),
    lines: Sequence[str] = (),
) -> str:
    """The study's note in the dashboard: the result, the report, and how to export a trial.

    Args:
        name: Name of the study.
        run: Run folder as the user would type it.
        objectives: In the study's order.
        winner: Number of the winning trial, or None while there is none.
        front: Numbers of the front members, best first.
        lines: Sentences about the result.
    """
    trial = "N" if winner is None else str(winner)
    target = f"{name}-trial-{trial}"
    command = f"mergesearch export {shlex.quote(run)} --trial {trial} --out {shlex.quote(target)}"
    aims = ", ".join(f"{objective.name} ({objective.direction})" for objective in objectives)
    several = len(objectives) > 1 and front
    shown = ", ".join(map(str, front[:LISTED])) + (", …" if len(front) > LISTED else "")
    parts = [
        f"## {_escaped(name)}",
        *(_escaped(line) for line in lines),
        f"Objectives: {_escaped(aims)}. Front: trials {shown}."
        if several
        else f"Objectives: {_escaped(aims)}.",
        f"[Report](/report), also `{_in_code(run)}/report.html`.",
        f"Export {'the winner' if winner is not None else 'a trial'} as a model folder:",
        f"```sh\n{command}\n```",
        "Parameters are summaries of each merge's coefficients; the exact ones are in its recipe.",
    ]
    return "\n\n".join(parts) + "\n"


def trial_note(
    title: str, lines: Sequence[str], commands: Mapping[str, str], recipe: str = ""
) -> str:
    """The note of a trial in the dashboard.

    Args:
        title: What to call it.
        lines: Its scores and coefficients, one line each.
        commands: What each command does -> the command.
        recipe: Address of its recipe in the dashboard, if it is there.
    """
    told = "\n".join(f"- {_escaped(line)}" for line in lines)
    parts = [f"## {_escaped(title)}", told, *([f"[Recipe]({recipe})"] if recipe else [])]
    parts += [f"{what}:\n\n```sh\n{command}\n```" for what, command in commands.items()]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """``text`` with markdown's special characters taken literally."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text)


def _in_code(text: str) -> str:
    return text.replace("`", "'")
