"""Objectives that another program measures: one process per trial, JSON in and JSON out.

The program reads one JSON object from its standard input and answers with one JSON object in the
last line of its standard output::

    {"split": "search", "count": null, "model": "/tmp/…", "recipe": {…}, "objectives": [{"name": …,
     "direction": …}], "inputs": …}
    {"values": {"loss": 0.5}, "errors": {"loss": 0.1}, "items": {"loss": [0.4, 0.6]}}

``count`` asks for the first so many items of the split, in an order that never changes; null means
all. ``errors`` and ``items`` are optional; items are expected where the study says how many there
are.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np

from mergesearch.evaluators.base import (
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from mergesearch.merging.checkpoints.opening import open_checkpoint

#: Files beside a checkpoint that say how text or images become inputs.
COMPANIONS = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)
#: Bytes of standard output that are read.
OUTPUT_LIMIT = 16 * 2**20
#: Lines of standard error that are kept.
ERROR_LINES = 20
#: Seconds between asking a program to end and ending it.
GRACE = 2.0


class Command:
    """Runs a program on every candidate.

    Args:
        command: Program and arguments; no shell.
        objectives: What it measures.
        timeout: Seconds that it may take.
        inputs: Anything that JSON holds, handed through.
        sizes: Items of each split; None where the program knows no items.
        model_class: ``transformers`` auto class of the model that is saved for it; None hands over
            the recipe alone.
        tokenizer: Checkpoint whose tokenizer files are put beside the model.
        folder: Where it runs; a program with a slash in its name is looked for from there.
        where: Key of the study file, for messages.

    Raises:
        InputError: If two objectives have one name.
    """

    transductive = False
    selects = False
    differentiable: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()

    def __init__(
        self,
        command: Sequence[str],
        objectives: Sequence[Objective],
        *,
        timeout: float,
        inputs: Any = None,
        sizes: Mapping[Split, int] | None = None,
        model_class: str | None,
        tokenizer: str | None = None,
        folder: Path,
        where: str,
    ) -> None:
        names = [objective.name for objective in objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{where}.objectives: expected unique names, received {twice} twice; rename one"
            )
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

    def check(self) -> None:
        """Find the program.

        Raises:
            InputError: If there is none, or it may not be executed.
        """
        self._program()

    def references(self) -> frozenset[str]:
        """None: the program's values are what they are."""
        return frozenset()

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """None."""
        return []

    def open(self) -> None:
        """Nothing to load."""

    def size(self, split: Split) -> int:
        """What the study says."""
        return self._sizes.get(split, 0)

    def cost(self, split: Split, items: int | None = None) -> int:
        """Items of the split; one evaluation where there are none."""
        size = self.size(split)
        return max(size if items is None else min(items, size), 1)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Run the program once.

        Raises:
            MergesearchError: If it fails, takes too long, or answers something else than asked for;
                one line.
            NonFiniteError: If a value is not finite.
        """
        count = min(items, self.size(split)) if isinstance(items, int) and self._sizes else None
        request = {
            "split": split,
            "count": count,
            "model": None,
            "recipe": candidate.recipe.to_dict(),
            "objectives": [{"name": o.name, "direction": o.direction} for o in self.objectives],
            "inputs": self._inputs,
        }
        if self.model_class is None:
            return self._measured(self._answer(request), split, count)
        with TemporaryDirectory(prefix="mergesearch-") as name:
            save_model(candidate.model, Path(name), self._tokenizer)
            return self._measured(self._answer(request | {"model": name}), split, count)

    def batch_cost(self, batch: Batch) -> int:
        """Nothing: there are no gradients."""
        return 0

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Refused: a program gives no gradients.

        Raises:
            MergesearchError: Always.
        """
        raise MergesearchError(
            f"{self._where}: expected no gradients of a program, received a request for some"
        )

    def _program(self) -> str:
        name = self._command[0]
        key = f"{self._where}.command"
        if os.sep not in name:
            found = shutil.which(name)
            if found is None:
                raise InputError(
                    f"{key}: expected a program, found no {name!r} in PATH; give its path"
                )
            return found
        path = (self._folder / name).absolute()
        if not path.is_file():
            raise InputError(f"{key}: expected a program, found no {path}")
        if not os.access(path, os.X_OK):
            raise InputError(
                f"{key}: expected a program that may be executed, received {path}; chmod +x it"
            )
        return str(path)

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the program says in its last line."""
        program = [self._program(), *self._command[1:]]
        finished = run_program(program, json.dumps(request), self._timeout, self._folder)
        if finished.problem is not None:
            raise self._refused(f"{finished.problem}{finished.last_words}")
        if finished.code:
            how = f"signal {-finished.code}" if finished.code < 0 else f"exit code {finished.code}"
            raise self._refused(f"expected exit code 0, received {how}{finished.last_words}")
        line = next((text for text in reversed(finished.output.splitlines()) if text.strip()), "")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._refused(
                "expected a JSON object in the last line of its output, "
                f"received {line[:80]!r}{finished.last_words}"
            )
        return answer

    def _measured(self, answer: Mapping[str, Any], split: Split, count: int | None) -> Measurement:
        odd = sorted(set(answer) - {"values", "errors", "items"})
        if odd:
            raise self._refused(f"expected keys values, errors, items, received {odd[0]!r}")
        values = self._numbers(answer, "values", required=True)
        errors = self._numbers(answer, "errors", required=False)
        negative = next((name for name, error in errors.items() if error < 0), None)
        if negative is not None:
            raise self._refused(
                f"errors: expected 0 or more, received {errors[negative]:g} for {negative!r}"
            )
        items = self._items(answer, count if count is not None else self.size(split))
        for name, scores in items.items():
            errors.setdefault(name, float(scores.std() / math.sqrt(scores.size)))
        places = {name: np.arange(scores.size) for name, scores in items.items()}
        return Measurement(values, errors, items, places=places)

    def _by_name(self, answer: Mapping[str, Any], key: str, required: bool) -> dict[str, Any]:
        """Objective -> what the answer says of it, in the order of the objectives."""
        given = answer.get(key) or {}
        names = [objective.name for objective in self.objectives]
        if not isinstance(given, dict):
            raise self._refused(f"{key}: expected an object, received {type(given).__name__}")
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given]
        if unknown:
            raise self._refused(
                f"{key}: expected objectives among {names}, received {unknown[0]!r}"
            )
        if missing and required:
            raise self._refused(f"{key}: expected all of {names}, received none for {missing[0]!r}")
        return {name: given[name] for name in names if name in given}

    def _numbers(self, answer: Mapping[str, Any], key: str, *, required: bool) -> dict[str, float]:
        found = {}
        for name, value in self._by_name(answer, key, required).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._refused(
                    f"{key}: expected a number for {name!r}, received {json.dumps(value)[:40]}"
                )
            if not math.isfinite(value):
                raise NonFiniteError(f"{self._where}: {key} of {name!r}")
            found[name] = float(value)
        return found

    def _items(self, answer: Mapping[str, Any], count: int) -> dict[str, Any]:
        given = self._by_name(answer, "items", required=bool(self._sizes))
        if given and not self._sizes:
            raise self._refused(
                "items: expected none, received some; say how many each split has, with sizes"
            )
        found = {}
        for name, scores in given.items():
            if not isinstance(scores, list) or len(scores) != count:
                received = len(scores) if isinstance(scores, list) else type(scores).__name__
                raise self._refused(
                    f"items: expected {count} numbers for {name!r}, received {received}"
                )
            odd = next(
                (s for s in scores if isinstance(s, bool) or not isinstance(s, int | float)), None
            )
            if odd is not None or None in scores:
                raise self._refused(
                    f"items: expected numbers for {name!r}, received {json.dumps(odd)[:40]}"
                )
            found[name] = np.array(scores, dtype=np.float64)
            if not np.isfinite(found[name]).all():
                raise NonFiniteError(f"{self._where}: items of {name!r}")
        return found

    def _refused(self, problem: str) -> MergesearchError:
        return MergesearchError(f"{self._where}.command: {self._command[0]}: {problem}")


@dataclass
class Finished:
    """How a program ended.

    Attributes:
        code: Its exit code, negative for a signal.
        output: Its standard output.
        problem: Why it was ended, if it was.
        errors: The last lines of its standard error.
    """

    code: int = 0
    output: str = ""
    problem: str | None = None
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=ERROR_LINES))

    @property
    def last_words(self) -> str:
        """The last line of its standard error that says something, as an appendix to a message."""
        line = next((text.strip() for text in reversed(self.errors) if text.strip()), "")
        return f"; it says: {line[:200]}" if line else ""


def run_program(command: Sequence[str], text: str, timeout: float, folder: Path) -> Finished:
    """Run a program to its end, in a process group of its own of which nothing is left behind.

    Args:
        command: Program and arguments.
        text: Its standard input.
        timeout: Seconds that it may take.
        folder: Where it runs.
    """
    finished = Finished()
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, start_new_session=True
        )
    except OSError as error:
        finished.problem = f"expected a program that starts, received {error.strerror or error}"
        return finished
    output = bytearray()
    too_large = threading.Event()
    threads = [
        threading.Thread(target=_write, args=(process.stdin, text.encode()), daemon=True),
        threading.Thread(
            target=_read_output, args=(process.stdout, output, too_large), daemon=True
        ),
        threading.Thread(target=_read_errors, args=(process.stderr, finished.errors), daemon=True),
    ]
    try:
        for thread in threads:
            thread.start()
        finished.problem = _wait(process.pid, time.monotonic() + timeout, timeout, too_large)
    finally:
        _end_group(process)
    for thread in threads:
        # A process that left the group may keep the pipes open.
        thread.join(GRACE)
    if too_large.is_set():
        finished.problem = finished.problem or _too_large()
    finished.code = process.returncode
    finished.output = bytes(output).decode(errors="replace")
    return finished


def save_model(model: Any, folder: Path, tokenizer: str | None) -> None:
    """Write a model as ``transformers`` loads it, with the tokenizer files of a checkpoint."""
    import torch

    from mergesearch.merging.models.loading import no_progress_bar

    # Bound parameters share one buffer, which save_pretrained takes for tied weights; ties
    # themselves stay.
    apart: dict[object, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        memory = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
        state[name] = apart.setdefault(memory, tensor.detach().clone())
    with no_progress_bar():
        model.save_pretrained(folder, state_dict=state)
    if tokenizer is None:
        return
    source = Path(tokenizer) if Path(tokenizer).is_dir() else open_checkpoint(tokenizer).folder
    for file in (
        [] if source is None else sorted({f for name in COMPANIONS for f in source.glob(name)})
    ):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _wait(number: int, deadline: float, timeout: float, too_large: threading.Event) -> str | None:
    """Wait for a process without reaping it, so that its number stays its group's; says what was
    wrong, if anything.
    """
    pause = 0.001
    while os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if too_large.wait(pause):
            return _too_large()
        if time.monotonic() > deadline:
            return f"expected an answer within {timeout:g} s, received none; raise timeout"
        pause = min(2 * pause, 0.05)
    return None


def _too_large() -> str:
    return f"expected at most {OUTPUT_LIMIT} bytes of output, received more; print less"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group: asked first, then without asking."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and _alive(process.pid):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _alive(number: int) -> bool:
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _write(pipe: IO[bytes], content: bytes) -> None:
    # A program need not read what it is given.
    with suppress(BrokenPipeError), pipe:
        pipe.write(content)


def _read_output(pipe: IO[bytes], output: bytearray, too_large: threading.Event) -> None:
    with pipe:
        while block := pipe.read1(65536):  # type: ignore[attr-defined]
            if len(output) + len(block) > OUTPUT_LIMIT:
                too_large.set()
                return
            output += block


def _read_errors(pipe: IO[bytes], errors: deque[str]) -> None:
    with pipe:
        while line := pipe.readline(65536):
            errors.append(line.decode(errors="replace"))
