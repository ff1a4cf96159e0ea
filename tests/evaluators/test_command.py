"""Programs as evaluators: the protocol, every way to fail, and nothing left behind."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mergesearch.evaluators import program as program_module
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from tests.evaluators.items import build, candidate_at, opened, pico_llama
from tests.evaluators.texts import bound_llama, make_tokenizer

LOSS = [{"name": "loss", "direction": "minimize"}]
#: Read the request first.
READ = "import json, os, sys, time\nrequest = json.load(sys.stdin)\n"


def section(program: str, **options: Any) -> dict[str, Any]:
    words = [sys.executable, "-c", READ + program]
    return {
        "kind": "command",
        "command": words,
        "objectives": LOSS,
        "model": "none",
        "timeout": 30,
    } | options


def answer(program: str, resident: Any = None, **options: Any) -> Any:
    return opened(section(program, **options)).evaluate(
        candidate_at([0.25, 0.5], resident), "search"
    )


def says(**what: Any) -> str:
    return f"print({json.dumps(json.dumps(what))})"


class TestAnswers:
    def test_the_program_reads_the_request(self) -> None:
        program = (
            "assert request['inputs'] == {'a': [1, None]}; print('noise'); "
            "print(json.dumps({'values': {'loss': "
        )
        program += "sum(request['recipe']['field']['values'][0]) "
        program += "if request['split'] == 'search' else -1}}))"
        assert answer(program, inputs={"a": [1, None]}).values == {"loss": 0.75}

    def test_the_whole_request(self, tmp_path: Path) -> None:
        program = f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(request)); " + says(
            values={"loss": 1}
        )
        answer(program)
        seen = json.loads((tmp_path / "seen").read_text())
        assert seen == {
            "split": "search",
            "count": None,
            "model": None,
            "recipe": candidate_at([0.25, 0.5]).recipe.to_dict(),
            "objectives": LOSS,
            "inputs": None,
        }

    def test_errors_and_several_objectives_in_their_order(self) -> None:
        both = [{"name": "a", "direction": "maximize"}, {"name": "b", "direction": "minimize"}]
        result = answer(says(values={"b": 2, "a": 1}, errors={"b": 0.5}), objectives=both)
        assert list(result.values.items()) == [("a", 1.0), ("b", 2.0)]
        assert result.errors == {"b": 0.5}

    def test_items_of_a_part_and_of_a_split(self) -> None:
        program = "n = request['count'] or 5; scores = list(range(n))\n"
        program += (
            "print(json.dumps({'values': {'loss': sum(scores) / n}, 'items': {'loss': scores}}))"
        )
        sizes = {"search": 5, "validation": 5, "test": 5}
        evaluator = opened(section(program, sizes=sizes))
        assert evaluator.provides == {"items"}
        assert (
            evaluator.size("search"),
            evaluator.cost("search", 3),
            evaluator.cost("search", 9),
        ) == (5, 3, 5)
        whole = evaluator.evaluate(candidate_at([1]), "search")
        np.testing.assert_array_equal(whole.items["loss"], [0, 1, 2, 3, 4])
        assert whole.errors["loss"] == pytest.approx(np.std(range(5)) / 5**0.5)
        part = evaluator.evaluate(candidate_at([1]), "search", 3)
        np.testing.assert_array_equal(part.items["loss"], [0, 1, 2])
        np.testing.assert_array_equal(part.item_indices["loss"], [0, 1, 2])

    def test_a_program_that_reads_nothing(self) -> None:
        silent = section("") | {"command": [sys.executable, "-c", says(values={"loss": 3})]}
        assert opened(silent).evaluate(candidate_at([0.0] * 100_000), "search").values == {
            "loss": 3.0
        }

    def test_a_command_in_one_string(self, tmp_path: Path) -> None:
        script = tmp_path / "with space.py"
        script.write_text(says(values={"loss": 4}))
        spec = section("") | {"command": f"{sys.executable} '{script}'"}
        assert opened(spec).evaluate(candidate_at([1]), "search").values == {"loss": 4.0}

    def test_a_program_beside_the_study(self, tmp_path: Path) -> None:
        script = tmp_path / "score"
        script.write_text(
            f"#!{sys.executable}\nimport os\nassert os.path.exists('score')\n"
            + says(values={"loss": 5})
        )
        script.chmod(0o755)
        evaluator = opened(section("") | {"command": ["./score"]}, folder=tmp_path)
        assert evaluator.evaluate(candidate_at([1]), "search").values == {"loss": 5.0}

    def test_the_recipe_is_on_no_command_line(self) -> None:
        program = "words = open('/proc/self/cmdline').read() + json.dumps(dict(os.environ))\n"
        program += "digest = request['recipe']['operator']\n"
        result = answer(program + "print(json.dumps({'values': {'loss': words.count(digest)}}))")
        assert result.values == {"loss": 0.0}


class TestModel:
    def test_transformers_loads_what_is_handed_over(self, tmp_path: Path) -> None:
        import torch

        make_tokenizer(tmp_path / "tokenizer")
        model = bound_llama(tmp_path).model
        program = f"import shutil; shutil.copytree(request['model'], {str(tmp_path / 'seen')!r}); "
        program += f"open({str(tmp_path / 'place')!r}, 'w').write(request['model']); " + says(
            values={"loss": 1}
        )
        options = {"model": "folder", "tokenizer": str(tmp_path / "tokenizer")}
        before = [p.data_ptr() for p in model.parameters()]
        answer(program, model, **options)
        assert [p.data_ptr() for p in model.parameters()] == before
        assert not Path((tmp_path / "place").read_text()).exists()

        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "seen")
        assert AutoTokenizer.from_pretrained(tmp_path / "seen").encode("red cat")
        assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_the_folder_goes_also_after_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(MergesearchError):
            answer("sys.exit(1)", pico_llama(), model="folder")
        assert list(tmp_path.iterdir()) == []

    def test_model_class(self) -> None:
        assert build(section("", model="folder")).model_class == "AutoModelForCausalLM"
        assert (
            build(section("", model="folder", model_class="AutoModel")).model_class == "AutoModel"
        )
        assert build(section("")).model_class is None


class TestFailures:
    @pytest.mark.parametrize(
        ("program", "message"),
        [
            (
                "print('dying', file=sys.stderr); sys.exit(3)",
                "received exit code 3; it says: dying",
            ),
            ("os.kill(os.getpid(), 9)", "received signal 9"),
            (
                "print('hello')",
                "expected a JSON object in the last line of its output, received 'hello'",
            ),
            ("pass", "received ''"),
            ("print('[1]')", r"received '\[1\]'"),
            (says(values={"loss": 1}) + "; print('after')", "received 'after'"),
            (says(values={}), r"values: expected all of \['loss'\], received none for 'loss'"),
            (
                says(values={"loss": 1, "gain": 2}),
                r"values: expected objectives among \['loss'\], received 'gain'",
            ),
            (says(values=[1]), "values: expected an object, received list"),
            (says(values={"loss": "1"}), "values: expected a number for 'loss', received \"1\""),
            (says(values={"loss": True}), "expected a number for 'loss', received true"),
            (says(values={"loss": None}), "expected a number for 'loss', received null"),
            (
                says(values={"loss": 1}, errors={"loss": -1}),
                "errors: expected 0 or more, received -1",
            ),
            (says(values={"loss": 1}, items={"loss": [1]}), "items: expected none, received some"),
            (
                says(values={"loss": 1}, scores={}),
                "expected keys values, errors, items, received 'scores'",
            ),
        ],
    )
    def test_one_line(self, program: str, message: str) -> None:
        with pytest.raises(MergesearchError, match=message) as caught:
            answer(program)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("evaluators.0.command: ")

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
    def test_values_that_are_not_finite(self, value: str) -> None:
        with pytest.raises(NonFiniteError, match="values of 'loss'"):
            answer(f'print(\'{{"values": {{"loss": {value}}}}}\')')

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ({}, "items: expected all of"),
            ({"loss": [1, 2]}, "items: expected 3 numbers for 'loss', received 2"),
            ({"loss": 3}, "items: expected 3 numbers for 'loss', received int"),
            ({"loss": [1, "2", 3]}, "items: expected numbers for 'loss', received \"2\""),
            ({"loss": [1, None, 3]}, "items: expected numbers for 'loss', received null"),
        ],
    )
    def test_items_that_do_not_fit(self, items: Any, message: str) -> None:
        with pytest.raises(MergesearchError, match=message):
            answer(
                says(values={"loss": 1}, items=items),
                sizes={"search": 3, "validation": 3, "test": 3},
            )

    def test_items_that_are_not_finite(self) -> None:
        with pytest.raises(NonFiniteError, match="items of 'loss'"):
            answer(
                'print(\'{"values": {"loss": 1}, "items": {"loss": [1, NaN]}}\')',
                sizes={"search": 2, "validation": 2, "test": 2},
            )

    def test_too_much_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(program_module, "OUTPUT_LIMIT", 1000)
        with pytest.raises(
            MergesearchError, match="expected at most 1000 bytes of output, received more"
        ):
            answer("while True: print('x' * 100, flush=True)")

    def test_much_standard_error_is_no_failure(self) -> None:
        assert answer(
            "print('x' * 10_000_000, file=sys.stderr); " + says(values={"loss": 1})
        ).values == {"loss": 1}

    def test_not_a_program(self, tmp_path: Path) -> None:
        (tmp_path / "broken").write_bytes(b"\x7fELF")
        (tmp_path / "broken").chmod(0o755)
        with pytest.raises(
            MergesearchError, match="expected a program that starts, received Exec format error"
        ):
            opened(section("") | {"command": ["./broken"]}, folder=tmp_path).evaluate(
                candidate_at([1]), "search"
            )


def gone(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


class TestNothingIsLeftBehind:
    @pytest.mark.parametrize("stubborn", [False, True])
    def test_after_the_time_limit(
        self, tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(program_module, "GRACE", 0.3)
        program = "import signal, subprocess\n"
        program += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
        program += (
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        )
        program += f"open({str(tmp_path / 'pids')!r}, 'w')"
        program += ".write(f'{os.getpid()} {child.pid}')\ntime.sleep(60)"
        began = time.monotonic()
        with pytest.raises(
            MergesearchError,
            match=r"expected an answer within 4 s, received none; raise timeout",
        ):
            answer(program, timeout=4.0)  # time for the program to start on a busy machine
        assert time.monotonic() - began < 20
        self.assert_gone(tmp_path / "pids")

    def test_children_of_a_program_that_ended_well(self, tmp_path: Path) -> None:
        program = (
            "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import "
            "time; time.sleep(60)'])\n"
        )
        program += (
            f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        )
        began = time.monotonic()
        assert answer(program + says(values={"loss": 1})).values == {"loss": 1.0}
        assert time.monotonic() - began < 10
        self.assert_gone(tmp_path / "pids")

    def assert_gone(self, file: Path) -> None:
        numbers = [int(word) for word in file.read_text().split()]
        assert len(numbers) == 2
        deadline = time.monotonic() + 5
        while not all(map(gone, numbers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(map(gone, numbers))

    def test_no_open_files_or_processes(self) -> None:
        answer(says(values={"loss": 1}))
        before = len(os.listdir("/proc/self/fd"))
        children = psutil.Process().children()  # servers that the session's tests share
        for _ in range(3):
            answer(says(values={"loss": 1}))
        assert len(os.listdir("/proc/self/fd")) == before
        assert psutil.Process().children() == children


class TestChecks:
    def test_no_such_program(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError,
            match=r"evaluators\.0\.command: expected a program, found no 'no-such-thing'",
        ):
            build(section("") | {"command": "no-such-thing"}).check()
        with pytest.raises(InputError, match=r"expected a program, found no .*/missing"):
            build(section("") | {"command": "./missing"}, folder=tmp_path).check()

    def test_not_executable(self, tmp_path: Path) -> None:
        (tmp_path / "score").write_text("")
        (tmp_path / "score").chmod(stat.S_IRUSR)
        with pytest.raises(
            InputError,
            match=r"expected a program that may be executed, received .*score; chmod \+x",
        ):
            build(section("") | {"command": "./score"}, folder=tmp_path).check()

    def test_one_name_twice(self) -> None:
        with pytest.raises(InputError, match="expected unique names"):
            build(section("", objectives=LOSS * 2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model_class": "AutoModel"}, "expected null with model: none"),
            ({"sizes": {"search": 3}}, "sizes: expected search, validation and test"),
            ({"timeout": 0}, "greater than 0"),
            ({"command": []}, "at least 1 item"),
        ],
    )
    def test_sections_that_do_not_fit(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build(section("", **options))

    def test_no_gradients(self) -> None:
        with pytest.raises(MergesearchError, match="expected no gradients"):
            build(section("")).backward(candidate_at([1]), None, {})  # type: ignore[arg-type]
