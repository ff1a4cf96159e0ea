"""Damaged task files of lm_eval: whether they name code, and what they describe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

from mergesearch.evaluators.harness.task_files import names_code, task_files
from mergesearch.search.init.given import parse_given
from mergesearch.search.init.harness_tasks import read_tasks
from tests.fuzz.checking import demand, read_or_refuse
from tests.fuzz.mutations import ANY, LINES, TEXT, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file
from tests.fuzz.yaml_mutations import YAML

KIND = "task_files"
#: A task, what it includes, and a group.
FILES = {
    "own.yaml": "task: own\ninclude: shared.txt\ndoc_to_text: !function own.text\noutput_type: x\n",
    "shared.txt": "metric_list:\n- metric: acc\n  aggregation: mean\ntarget: !function own.f\n",
    "all.yaml": "group: all\ntask:\n- own\n- {task: other, include: shared.txt}\n",
}


def prepare(folder: Path) -> None:
    """Write the task files."""
    for name, text in FILES.items():
        (folder / name).write_text(text)


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a task file, and read the folder or the file.

    Raises:
        Finding: If a promise does not hold, or the harness would import what was not found.
    """
    draw = Random(seed)
    folder = scratch / "tasks"
    clear(folder)
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((prepared / name).read_bytes())
    file = folder / draw.choice([*FILES])
    file.write_bytes(mutated(file.read_bytes(), draw, YAML, LINES, TEXT, TEXT, ANY))
    if not draw.randrange(ODD):
        put_odd_file(file, draw)
    if draw.random() < 0.3:
        read_or_refuse(lambda: read_tasks([parse_given(str(folder / "own.yaml"))]))
        return
    found = read_or_refuse(lambda: [*task_files(folder, "evaluators[0]")])
    code = read_or_refuse(partial(names_code, folder))
    if found is not None:
        named = any(_imports(each.path) for each in found)
        demand(code or not named, "expected a function of a task file to be code")


def _imports(path: Path) -> bool:
    """Whether reading a file as the harness does constructs a function."""
    import yaml

    class Loader(yaml.CSafeLoader):
        """Remembers that it met one."""

        met = False

    def function(loader: Loader, node: yaml.Node) -> None:
        Loader.met = True

    Loader.add_constructor("!function", function)
    try:
        yaml.load(path.read_bytes(), Loader)  # a subclass of the safe loader
    except Exception:
        return Loader.met
    return Loader.met
