"""The sheet of a bundle: what it says of the merge beside the tensors, checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import cut, path_shown, shown

FORMAT = 1
SHEET = "routing.json"
#: Method -> its parameters that are numbers.
NUMBERS = {
    "t3": ("lambda_min", "lambda_max", "gamma"),
    "twin_merging": ("temperature",),
    "task_masks": (),
}


def read_sheet(root: Path) -> Mapping[str, Any]:
    """The checked sheet of a bundle.

    Raises:
        CheckpointError: If the folder is no bundle, or one of a newer version.
    """
    try:
        sheet = Node(read_json(root / SHEET, CheckpointError), path_shown(root), CheckpointError)
        version = sheet.at("format").value
        routing = sheet.at("routing")
        method = routing.at("method").value
        if version == FORMAT and isinstance(method, str) and method in NUMBERS:
            _check_sheet(sheet, routing, method)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path_shown(root)}: expected a folder with {SHEET}, as `mergesearch export` writes "
            f"it, received: {cut(str(error), 200)}"
        ) from None
    if version != FORMAT or not isinstance(method, str) or method not in NUMBERS:
        raise CheckpointError(
            f"{path_shown(root)}: expected format {FORMAT} and a method among {sorted(NUMBERS)}, "
            f"received {shown(version)} and {shown(method)}; load it with the version that wrote it"
        )
    return sheet.mapping()


def _check_sheet(sheet: Node, routing: Node, method: str) -> None:
    """Refuse values of other types than ``bundle.write_bundle`` writes."""
    sheet.at("model_class").text()
    for key in ("experts", "heads"):
        for name in sheet.at(key).elements() if key == "experts" or sheet.has(key) else ():
            if not name.text() or Path(name.text()).name != name.text():
                raise name.wrong("the name of an expert")
    if routing.at("per").value not in ("item", "batch"):
        raise routing.at("per").wrong("item or batch")
    for key in NUMBERS[method]:
        routing.at(key).number()
    if method == "t3":
        routing.at("centred").boolean()
    if method == "task_masks":
        _check_task_router(routing)
    if sheet.has("prompts"):
        sheet.at("fixed").boolean()
        for key in ("prompts", "classes"):
            for _, texts in sheet.at(key).members():
                for element in texts.elements():
                    element.text()


def _check_task_router(routing: Node) -> None:
    """Refuse a router of tasks that there is none of."""
    router = routing.at("router")
    if router.value not in ("head", "learned", "none"):
        raise router.wrong("head, learned or none")
    if router.value == "head" and routing.at("directions").integer() < 1:
        raise routing.at("directions").wrong("at least 1")
