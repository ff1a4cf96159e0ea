"""What makes the outputs that a person judges: a causal language model, or a user's function.

The function is ``make(model, prompts) -> outputs``, called once for all prompts of a split, and
returns a text or a picture for each of them. It may also take ``seed``, by name, to draw the same
noise for every model, and those arguments that the study lists under ``inputs``.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from mergesearch.evaluators.base import SPLITS, Candidate, Output, Split
from mergesearch.evaluators.by_item import domain_names
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.splits import ItemTables
from mergesearch.evaluators.items import chosen_indices
from mergesearch.evaluators.objectives import Metric
from mergesearch.evaluators.text.generation import Generation
from mergesearch.merging import InputError, MergesearchError
from mergesearch.merging.extensions.references import (
    check_sources,
    find_function,
    is_reference,
    known,
)

#: First bytes of a picture's file -> its format; formats that may hold scripts are left out.
FORMATS: Mapping[bytes, str] = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF8": "gif",
    b"RIFF": "webp",
}
#: Bytes of an output at most: it is kept, and sent to the page.
LARGEST = 16 * 2**20


class Maker(Protocol):
    """Makes outputs for the first prompts of a split."""

    model_class: str | None

    def check(self) -> None:
        """Refuse wrong input before any weight is read."""

    def open(self) -> None:
        """Load the prompts."""

    def count(self, split: Split) -> int:
        """Number of the split's prompts; known after :meth:`check`."""

    def halve_batch(self) -> int | None:
        """Halve the batch after an evaluation ran out of memory; None where that cannot be."""

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about the models' folders."""

    def make(self, candidate: Candidate, split: Split, count: int) -> list[Output]:
        """Outputs for the first so many prompts of the fixed order, in the order of the files."""


class TextMaker(Generation):
    """Texts that a causal language model writes, greedily, so that a merge writes the same again.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        **generation: Further arguments of :class:`Generation`, without metrics and scorer.
    """

    def __init__(self, tokenizer: str | None, **generation: Any) -> None:
        super().__init__(tokenizer, "contains", metrics=[Metric("score")], **generation)

    def count(self, split: Split) -> int:
        """Number of the split's prompts."""
        return self.size(split)

    def make(self, candidate: Candidate, split: Split, count: int) -> list[Output]:
        """Outputs for the first so many prompts."""
        items = self._items_of(split)
        part = items.rows(chosen_indices(items.domains, count))
        return [
            Output(prompt, "text", one.text.encode("utf-8", "replace"))
            for prompt, one in zip(part.prompts, self.written(candidate.model, part), strict=True)
        ]


class FunctionMaker:
    """Texts or pictures that a function makes with the merged model.

    Args:
        function: ``module:name`` or ``file.py:name``.
        data: Files of the prompts.
        columns: ``prompt``, ``domain`` and ``id`` -> column.
        splits: Split -> its name in the files, where it differs.
        inputs: Further arguments, by name.
        seed: Given to a function that takes it.
        source: Name -> digest of the code that the study began with.
        model_class: ``transformers`` auto class, or ``module:name`` of a function that builds the
            model.
        where: Key of the study file, for messages.
    """

    _own: ClassVar[tuple[str, ...]] = ("seed",)

    def __init__(
        self,
        function: str,
        *,
        data: ItemFiles,
        columns: Mapping[str, str | None],
        splits: Mapping[Split, str],
        inputs: Mapping[str, Any],
        seed: int,
        source: Mapping[str, str],
        model_class: str,
        where: str,
    ) -> None:
        self.model_class: str | None = model_class
        self._function = function
        self._tables = ItemTables(data, columns, f"{where}.data")
        self._splits: dict[Split, str] = {split: splits.get(split, split) for split in SPLITS}
        self._inputs = dict(inputs)
        self._seed = seed
        self._source = dict(source)
        self._where = where
        self._who = f"{where}.function: {function}"
        self._prompts: dict[Split, tuple[list[str], Any]] = {}

    def check(self) -> None:
        """Refuse bad prompts, and a function that cannot be called as the study says.

        One that is not loaded is let pass, so that a record can be read without it.

        Raises:
            InputError: In one line.
        """
        self._tables.check(self._splits)
        function = known(self._function)
        if function is not None:
            self._arguments(function)

    def open(self) -> None:
        """Load prompts and function.

        Raises:
            InputError: If the code of a function is another than the study began with.
        """
        self._arguments(find_function(self._function, f"{self._where}.function"))
        if self.model_class is not None and is_reference(self.model_class):
            find_function(self.model_class, f"{self._where}.model_class")
        check_sources(self._source, self._where)
        for split, name in self._splits.items():
            columns = self._tables.load(name)
            prompts = [str(prompt) for prompt in columns["prompt"]]
            self._prompts[split] = prompts, domain_names(columns.get("domain"), len(prompts))
        self._tables.release()

    def count(self, split: Split) -> int:
        """Number of the split's prompts."""
        return self._tables.count(self._splits[split])

    def halve_batch(self) -> int | None:
        """Nothing to halve: the function makes its own batches."""
        return None

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Give no warnings."""
        return []

    def make(self, candidate: Candidate, split: Split, count: int) -> list[Output]:
        """Call the function once, without recording a graph.

        Raises:
            MergesearchError: If it returns something else than an output for each prompt.
        """
        import torch

        prompts, domains = self._prompts[split]
        chosen = [prompts[row] for row in chosen_indices(np.asarray(domains), count).tolist()]
        function = find_function(self._function, f"{self._where}.function")
        with torch.no_grad():
            made = function(candidate.model.eval(), list(chosen), **self._arguments(function))
        outputs = list(made) if isinstance(made, Sequence) and not isinstance(made, str) else None
        if outputs is None or len(outputs) != len(chosen):
            received = type(made).__name__ if outputs is None else f"{len(outputs)} of them"
            raise MergesearchError(
                f"{self._who}: expected a list of {len(chosen)} outputs, one for each prompt, "
                f"received {received}"
            )
        return [
            _output(prompt, value, self._who) for prompt, value in zip(chosen, outputs, strict=True)
        ]

    def _arguments(self, function: Any) -> dict[str, Any]:
        """What the function is given by name.

        Raises:
            InputError: If it cannot be called with a model, prompts and the inputs.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # built-in functions may have none
            return dict(self._inputs)
        seed = {"seed": self._seed} if "seed" in signature.parameters else {}
        arguments = seed | self._inputs
        try:
            signature.bind(None, [], **arguments)
        except TypeError as error:
            raise InputError(
                f"{self._who}: expected a function of a model, a list of prompts and the inputs "
                f"{sorted(self._inputs)}, received {signature}: {error}"
            ) from None
        return arguments


def _output(prompt: str, value: Any, who: str) -> Output:
    """An output of what a function returned for a prompt: a text, a file, its bytes, an image.

    Raises:
        MergesearchError: If it is none of these, or too large.
    """
    if isinstance(value, str):
        output = Output(prompt, "text", value.encode("utf-8", "replace"))
    else:
        output = _picture(prompt, value, who)
    if len(output.content) > LARGEST:
        raise MergesearchError(
            f"{who}: expected outputs of at most {LARGEST:,} bytes, received one of "
            f"{len(output.content):,}; make it smaller"
        )
    return output


def _picture(prompt: str, value: Any, who: str) -> Output:
    if isinstance(value, Path):
        with value.open("rb") as file:
            value = file.read(LARGEST + 1)
    elif hasattr(value, "save"):  # an image of Pillow
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        value = buffer.getvalue()
    content = bytes(value) if isinstance(value, bytes | bytearray) else b""
    kind = next((kind for start, kind in FORMATS.items() if content.startswith(start)), None)
    if kind is None:
        raise MergesearchError(
            f"{who}: expected a text, an image of Pillow, or the path or bytes of a PNG, JPEG, "
            f"GIF or WebP file, received {type(value).__name__}"
        )
    return Output(prompt, kind, content)
