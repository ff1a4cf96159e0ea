"""Objectives that another program measures: one process per trial, JSON in and JSON out.

The program reads one JSON object from its standard input and answers with one JSON object in the
last line of its standard output::

    {"split": "search", "count": null, "model": "/tmp/…", "recipe": {…},
     "objectives": [{"name": …, "direction": …}], "inputs": …}
    {"values": {"loss": 0.5}, "errors": {"loss": 0.1}, "items": {"loss": [0.4, 0.6]}}

``count`` asks for the first so many items of the split, in an order that never changes; null means
all. ``errors`` and ``items`` are optional; items are expected where the study says how many there
are. Where bounds are about scores that are no objectives, ``"scores": [NAME, …]`` lists these, and
their values are expected too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergesearch.evaluators.base import Candidate, ItemSubset, Measurement, Objective, Split
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.model_folder import save_model
from mergesearch.evaluators.objectives import (
    Metric,
    check_names,
    constraints_of,
    extra_scores,
    needed_references,
    tolerances_of,
)
from mergesearch.evaluators.program import run_program
from mergesearch.evaluators.program_answer import AnswerReader, with_bounds
from mergesearch.merging import InputError


class Command(EvaluatorBase):
    """Runs a program on every candidate.

    Args:
        command: Program and arguments; no shell.
        objectives: What it measures.
        timeout: Seconds that it may take at most.
        inputs: Anything that JSON can hold, handed to the program as it is.
        bounds: Limits of scores, which are asked for beside the objectives.
        sizes: Items of each split; None where the program knows no items.
        model_class: ``transformers`` auto class of the model that is saved for it; None hands over
            the recipe alone.
        tokenizer: Checkpoint whose tokenizer files are put beside the model.
        folder: Where it runs; the path of a program with a slash in its name starts there.
        where: Key of the study file, for messages.

    Raises:
        InputError: If two objectives have one name.
    """

    additive: tuple[str, ...] = ()
    deterministic = False
    _subject = "a program"

    def __init__(
        self,
        command: Sequence[str],
        objectives: Sequence[Objective],
        *,
        timeout: float,
        inputs: Any = None,
        bounds: Sequence[Metric] = (),
        sizes: Mapping[Split, int] | None = None,
        model_class: str | None,
        tokenizer: str | None = None,
        folder: Path,
        where: str,
    ) -> None:
        self._names = check_names(objectives, where)
        self._bounds = tuple(bounds)
        self.constraints = constraints_of(bounds)
        self._tolerances = tolerances_of(bounds)
        self._command = tuple(command)
        self.objectives = tuple(objectives)
        self._timeout = timeout
        self._inputs = inputs
        self._sizes = dict(sizes or {})
        self.model_class = model_class
        self._tokenizer = tokenizer
        self._folder = folder
        self._where = where
        self.provides = frozenset({"items"} if sizes else ())
        self._extra = extra_scores(self._names, bounds)
        self._reader = AnswerReader(
            self._names, bool(self._sizes), where, self._command[0], self._extra
        )

    def check(self) -> None:
        """Look for the program.

        Raises:
            InputError: If there is none, or it may not be executed.
        """
        self._program()

    def references(self) -> frozenset[str]:
        """Models whose scores are limits."""
        return needed_references(self._bounds, {""}, {})

    def size(self, split: Split) -> int:
        """Number of items as the study file states it."""
        return self._sizes.get(split, 0)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Run the program once.

        Raises:
            MergesearchError: If it fails, takes too long, or answers something else than asked for;
                one line.
            NonFiniteError: If a value is not finite.
        """
        count = min(items, self.size(split)) if isinstance(items, int) and self._sizes else None
        expected = count if count is not None else self.size(split)
        request = {
            "split": split,
            "count": count,
            "model": None,
            "recipe": candidate.recipe.to_dict(),
            "objectives": [{"name": o.name, "direction": o.direction} for o in self.objectives],
            "inputs": self._inputs,
        }
        if self._extra:
            request["scores"] = list(self._extra)
        measured = self._reader.measurement(self._answered(request, candidate), expected)
        return with_bounds(measured, self._names, self._bounds, candidate.references)

    def _answered(self, request: Mapping[str, Any], candidate: Candidate) -> Mapping[str, Any]:
        """Answer of the program, for which the model is saved if it needs one."""
        if self.model_class is None:
            return self._answer(request)
        with TemporaryDirectory(prefix="mergesearch-") as name:
            save_model(candidate.model, Path(name), self._tokenizer)
            return self._answer({**request, "model": name})

    def _program(self) -> str:
        """Path of the program."""
        name = self._command[0]
        key = f"{self._where}.command"
        if os.sep not in name:
            installed = shutil.which(name)
            if installed is None:
                raise InputError(
                    f"{key}: expected a program, found no {name!r} in PATH; give its path"
                )
            return installed
        path = (self._folder / name).absolute()
        if not path.is_file():
            raise InputError(f"{key}: expected a program, found no {path}")
        if not os.access(path, os.X_OK):
            raise InputError(
                f"{key}: expected a program that may be executed, received {path}; chmod +x it"
            )
        return str(path)

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run the program on a request, and return the object with which it answers."""
        program = [self._program(), *self._command[1:]]
        result = run_program(program, json.dumps(request), self._timeout, self._folder)
        if result.problem is not None:
            raise self._reader.error(f"{result.problem}{result.last_words}")
        if result.code:
            how = f"signal {-result.code}" if result.code < 0 else f"exit code {result.code}"
            raise self._reader.error(f"expected exit code 0, received {how}{result.last_words}")
        return self._reader.parse(result.output, result.last_words)
