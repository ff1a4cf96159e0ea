"""A small study that people judge, and judges who are programs."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evaluators.language import make_tokenizer, sentence, text_llama

#: What a judge says of a view: ``left``, ``right`` or ``tie``.
Taste = Callable[[dict[str, Any]], str]


def make_home(home: Path, prompts: int = 3) -> Path:
    """``base`` and an expert with their tokenizer, and ``prompts.jsonl``, in a folder."""
    import numpy as np

    for seed, name in enumerate(("base", "expert")):
        text_llama(seed).save_pretrained(home / name)
        make_tokenizer(home / name)
    rng = np.random.default_rng(5)
    rows = [
        {"prompt": f"{split[0]} {' '.join(sentence(rng, 4))} {number}", "split": split}
        for split in ("search", "validation", "test")
        for number in range(prompts)
    ]
    (home / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return home


def judged_study(home: Path, **sections: Any) -> dict[str, Any]:
    """A study of these models whose one objective is what a judge prefers."""
    evaluator = {
        "kind": "preference",
        "data": {"file": str(home / "prompts.jsonl"), "split": "split"},
        "choices": 3,
        "max_new_tokens": 6,
    }
    data: dict[str, Any] = {
        "name": "judged",
        "base": str(home / "base"),
        "experts": {"expert": str(home / "expert")},
        "anchors": "none",
        "space": {"granularity": "global"},
        "strategy": "sobol",
        "evaluators": [evaluator],
        "budget": {"trials": 4},
        "selection": {"leaders": 2, "repeats": 0},
    }
    return data | sections


def get(url: str, path: str) -> Any:
    """The JSON at an address."""
    with urllib.request.urlopen(url + path, timeout=60) as answer:
        return json.load(answer)


def post(url: str, path: str, body: Any) -> Any:
    """The JSON that a request with JSON is answered by."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def longer(view: dict[str, Any]) -> str:
    """Prefers the longer text."""
    left, right = (len(view[side]["text"]) for side in ("left", "right"))
    return "tie" if left == right else "left" if left > right else "right"


class Judge(threading.Thread):
    """Judges over HTTP until the study stops, or a number of choices is made.

    Args:
        url: Address of the page.
        taste: What is said of a pair.
        most: Choices at most.
        then: Called after the last of them.

    Attributes:
        views: What was judged, in order.
    """

    def __init__(
        self,
        url: str,
        taste: Taste = longer,
        most: int | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._taste = taste
        self._most = most
        self._then = then
        self.views: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        """Judge."""
        try:
            view = get(self._url, "view")
            while view["state"] != "over":
                if self._most is not None and len(self.views) >= self._most:
                    self._then()
                    return
                if view["state"] == "waiting":
                    view = get(self._url, f"view?since={view['version']}")
                    continue
                self.views.append(view)
                choice = {"pair": view["pair"], "choice": self._taste(view)}
                view = post(self._url, "choice", choice)
        except (urllib.error.URLError, ConnectionError):
            return  # the study has ended
