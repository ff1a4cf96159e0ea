"""Task files that hide functions, or cannot be read: no code without leave, one line otherwise."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from mergesearch.evaluators.harness.task_files import names_code, task_files
from mergesearch.merging import InputError

PLAIN = "task: own\ninclude: other.txt\n"
#: What hides the tag of a function -> files.
HIDDEN: dict[str, dict[str, str]] = {
    "nothing": {"a.yaml": "task: own\ndoc_to_text: !function own.text\n"},
    "an include of another suffix": {"a.yaml": PLAIN, "other.txt": "f: !function own.text\n"},
    "an include outside": {"a.yaml": "include: [../b.yaml]\n", "../b.yaml": "f: !function a.b\n"},
    "an include of an include": {
        "a.yaml": PLAIN,
        "other.txt": "include: last\n",
        "last": "f: !function own.text\n",
    },
    "an include in a group": {
        "a.yaml": "group: g\ntask:\n- include: other.txt\n",
        "other.txt": "f: !function own.text\n",
    },
    "an escape": {"a.yaml": "f: !func%74ion own.text\n"},
    "a directive": {"a.yaml": "%TAG !e! !func\n---\nf: !e!tion own.text\n"},
    "a whole tag": {"a.yaml": "f: !<!function> own.text\n"},
    "a later key": {"a.yaml": "f: !function own.text\nf: plain\n"},
    "a key": {"a.yaml": "!function own.text : 1\n"},
}


def write(folder: Path, files: dict[str, str]) -> Path:
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, text in files.items():
        (tasks / name).write_text(text)
    return tasks


@pytest.mark.parametrize("case", HIDDEN)
def test_functions_are_found_wherever_they_hide(case: str, tmp_path: Path) -> None:
    assert names_code(write(tmp_path, HIDDEN[case]))


def test_files_without_functions_are_no_code(tmp_path: Path) -> None:
    files = {"a.yaml": PLAIN, "other.txt": "text: '!function own.text'  # !function\nx: !own 3\n"}
    tasks = write(tmp_path, files)
    assert not names_code(tasks)
    assert [file.path.name for file in task_files(tasks, "x")] == ["a.yaml", "other.txt"]


def test_files_that_include_each_other_are_read_once(tmp_path: Path) -> None:
    tasks = write(tmp_path, {"a.yaml": "include: b.yaml\n", "b.yaml": "include: [a.yaml]\n"})
    assert len([*task_files(tasks, "x")]) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"task: \xff",
        codecs.BOM_UTF16_LE + "f: !function a.b".encode("utf-16-le"),
        b"[" * 5_000,
        b"a: 2001-99-99",
        b"a: " + b"9" * 5_000,
        b"!!python/object:os.system x",
        b"a: &a [*a]",
        b"include: 3",
        b"include: nothing.yaml",
        b"include: .",
        b"- \x00",
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    tasks = write(tmp_path, {})
    (tasks / "a.yaml").write_bytes(content)
    assert not names_code(tasks)
    with pytest.raises(InputError, match="expected") as refused:
        list(task_files(tasks, "x"))
    assert "\n" not in str(refused.value)
    assert str(refused.value).isprintable()
