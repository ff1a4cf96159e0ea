"""Serves libraries over standard input and output, a line of JSON for each message.

``{"new": problem}`` sets up a library, ``{"ask": true}`` gives a number and a point or null,
``{"tell": [number, losses]}`` learns, ``{"best": true}`` recommends. An answer has the CPU seconds
spent since the problem was set up; a failure is an answer too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import numpy as np

from experiments.league.libraries.base import Library, Task
from experiments.league.libraries.table import LIBRARIES


def read_task(fields: dict[str, Any]) -> Task:
    """The problem of the first line."""
    arrays: dict[str, Any] = {
        key: np.array(fields.pop(key)) for key in ("start", "points", "losses")
    }
    return Task(**fields, **arrays)


def answer(library: Library, message: dict[str, Any]) -> Any:
    """What a message gives."""
    if "tell" in message:
        number, losses = message["tell"]
        library.tell(number, np.array(losses))
        return None
    if "best" in message:
        point = library.best()
        return None if point is None else point.tolist()
    asked = library.ask()
    return None if asked is None else [asked[0], asked[1].tolist()]


def main() -> None:
    """Serve until the input ends."""
    # What a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    library: Any = None
    begun = 0.0
    for line in sys.stdin:
        message = json.loads(line)
        found: dict[str, Any] = {"answer": None}
        try:
            if "new" in message:
                fields = message["new"]
                library = LIBRARIES[fields.pop("library")](read_task(fields))
                begun = time.process_time()
            else:
                found["answer"] = answer(library, message)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        answers.write(json.dumps({**found, "cpu": time.process_time() - begun}) + "\n")
        answers.flush()
    # Solvers in threads may wait for answers that never come.
    os._exit(0)


main()
