"""What is known of the models that people judge: their outputs, the pairs, the choices.

The judge's page and the driver use it from different threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from mergesearch.evaluators import Split
from mergesearch.evaluators.base import Exhibit
from mergesearch.evaluators.preference.pairing import Choice, pair_digest, sides
from mergesearch.evaluators.preference.strengths import Strength
from mergesearch.merging import RunFolderError
from mergesearch.search.judging.panel import Panel
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.judging.registration import model_event

State = Literal["open", "waiting", "over"]


@dataclass(frozen=True)
class Shown:
    """An output on the page: a text, or the name of a picture."""

    kind: str
    text: str


@dataclass(frozen=True)
class View:
    """What the page shows.

    Attributes:
        state: ``open``: a pair is to be judged; ``waiting``: none is, for now; ``over``: the study
            has stopped.
        version: Another one with every change.
        done, total: How many pairs are judged, of those that are known so far.
        undo: Whether the last choice may be taken back.
        pair, question, prompt, left, right: The open pair.
    """

    state: State
    version: int
    done: int
    total: int
    undo: bool
    pair: str = ""
    question: str = ""
    prompt: str = ""
    left: Shown | None = None
    right: Shown | None = None


class Bench:
    """Registers models, hands out pairs and takes choices; each is recorded before it counts.

    Args:
        record: The record, whose events are read at once.
        seed: Decides on which side outputs are shown.

    Raises:
        RunFolderError: If the record was damaged by others.
    """

    def __init__(self, record: JudgingRecord, seed: int) -> None:
        self._record = record
        self._seed = seed
        self._panels: dict[tuple[str, Split], Panel] = {}
        self._outputs: dict[str, Shown] = {}
        self._choices: dict[str, str | None] = {}  # pair -> preferred output, None for neither
        self._last: str | None = None  # the pair whose choice may be taken back
        self._version = 0
        self._over = False
        self._changed = threading.Condition()
        for event in record.events():
            try:
                self._apply(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunFolderError(
                    "judging.jsonl: expected events of this version, received one that cannot be "
                    f"read ({type(error).__name__}: {error}); restore the file from a copy"
                ) from None
        self._last = None

    def register(
        self, objective: str, split: Split, recipe: str, exhibit: Exhibit, *, base: bool = False
    ) -> None:
        """Take in a model's outputs, and decide which pairs it is judged by.

        Where the merge has outputs already, from an earlier session, these stay: choices were made
        of them.

        Args:
            objective: What is judged.
            split: Whose prompts.
            recipe: Digest of the merge.
            exhibit: Its outputs.
            base: Whether it is the base; it comes first.

        Raises:
            OSError: If it could not be recorded.
            RunFolderError: If the base is missing, whose outputs a run records once.
        """
        with self._changed:
            panel = self._panels.get((objective, split))
            if panel is not None and recipe in panel.model_of:
                return
            if panel is None and not base:
                raise RunFolderError(
                    f"judging.jsonl: expected the base's outputs for {split} prompts, which a run "
                    "records at its beginning, found none; restore the file from a copy, or start "
                    "the study anew in another folder"
                )
            made = model_event(exhibit, panel, self._choices, self._record.keep_picture)
            key = {"objective": objective, "split": split, "recipe": recipe}
            self._add({"event": "model", **key, **made})

    def judged(self, objective: str, split: Split, recipe: str) -> bool:
        """Whether all pairs of a merge are judged."""
        with self._changed:
            panel = self._panels[objective, split]
            return not any(panel.open_pairs(panel.model_of[recipe], self._choices))

    def strength(self, objective: str, split: Split, recipe: str) -> Strength:
        """Log-odds of a merge against the base, by all choices on the split so far.

        The choices that it rests on cannot be taken back any more.
        """
        with self._changed:
            panel = self._panels[objective, split]
            self._last = None
            self._tell()
            return panel.strengths(self._choices)[panel.model_of[recipe]]

    def outputs_of(self, objective: str, split: Split, recipe: str) -> Mapping[str, str] | None:
        """Digest of prompt -> digest of what a merge made of it; None where it is not known."""
        with self._changed:
            panel = self._panels.get((objective, split))
            model = None if panel is None else panel.model_of.get(recipe)
            return None if panel is None or model is None else panel.outputs[model]

    def choose(self, pair: str, choice: Choice) -> bool:
        """Record a choice; False, and nothing is recorded, where the pair is not open.

        Raises:
            OSError: If it could not be recorded.
        """
        with self._changed:
            found = next(((p, o) for p, o in self._all_open() if o[0] == pair), None)
            if found is None or choice not in get_args(Choice):
                return False
            panel, (_, prompt, one, other) = found
            left, right = sides(pair, one, other, self._seed)
            self._add(
                {
                    "event": "choice",
                    "objective": panel.objective,
                    "split": panel.split,
                    "pair": pair,
                    "prompt": prompt,
                    "left": left,
                    "right": right,
                    "choice": choice,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
            return True

    def undo(self) -> bool:
        """Take the last choice back; False where no result may rest on it alone.

        Raises:
            OSError: If that could not be recorded.
        """
        with self._changed:
            if self._last is None:
                return False
            self._add({"event": "undo", "pair": self._last})
            return True

    def view(self, since: int | None = None, seconds: float = 0.0) -> View:
        """What the page shows now.

        Args:
            since: Wait until there is another version than this.
            seconds: How long to wait at most.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._version != since, seconds)
            return self._view()

    def picture(self, name: str) -> bytes | None:
        """The file of a picture that is shown, by the name that the page knows."""
        with self._changed:
            known = any(
                shown.text == name for shown in self._outputs.values() if shown.kind != "text"
            )
        return self._record.picture(name) if known else None

    def close(self) -> None:
        """Let the pages know that the study has stopped."""
        with self._changed:
            self._over = True
            self._tell()

    def _view(self) -> View:
        pairs = {pair for panel in self._panels.values() for pair in panel.pairs()}
        done = len(pairs & self._choices.keys())
        counts: dict[str, Any] = {
            "version": self._version,
            "done": done,
            "total": len(pairs),
            "undo": self._last is not None and not self._over,
        }
        if self._over:
            return View("over", **counts)
        found = next(self._all_open(), None)
        if found is None:
            return View("waiting", **counts)
        panel, (pair, prompt, one, other) = found
        left, right = sides(pair, one, other, self._seed)
        return View(
            "open",
            **counts,
            pair=pair,
            question=panel.question,
            prompt=panel.prompts[prompt],
            left=self._outputs[left],
            right=self._outputs[right],
        )

    def _all_open(self) -> Iterator[tuple[Panel, tuple[str, str, str, str]]]:
        """Panel and pair of everything that waits for a choice, model by model."""
        for panel in self._panels.values():
            for model in panel.outputs:
                for pair in panel.open_pairs(model, self._choices):
                    yield panel, pair

    def _add(self, event: dict[str, Any]) -> None:
        """Record an event, and only then let it count."""
        self._record.append(event)
        self._apply(event)
        self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "choice":
            side = event["choice"]
            of = pair_digest(event["objective"], event["prompt"], event["left"], event["right"])
            if of != event["pair"]:
                raise ValueError("a choice between outputs of another pair")
            self._choices[event["pair"]] = None if side == "tie" else event[side]
            self._last = event["pair"]
        elif kind == "undo":
            del self._choices[event["pair"]]
            self._last = None
        elif kind == "model":
            key = (event["objective"], event["split"])
            panel = self._panels.get(key)
            if panel is None:
                panel = self._panels[key] = Panel(*key, event["question"], event["model"])
            panel.add(event)
            for row in event["outputs"]:
                self._outputs[row["output"]] = Shown(row["kind"], row["text"])
        elif kind != "study":
            raise ValueError(f"unknown event {kind!r}")
