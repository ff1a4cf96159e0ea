"""``make gpu-check`` where there is no card: checks in their dry form, report, exit codes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from experiments.gpu_check import __main__ as program
from experiments.gpu_check import arenas, bits, combine, report, sharing, suite, upload
from experiments.gpu_check.check import Check, Figure, Machine, Result, Skipped, result_of
from experiments.gpu_check.table import BY_NAME, CHECKS, checks_of
from mergesearch.search.workers.devices import Device
from tests.experiments.gpu_check_cases import CASES
from tests.merging.kernels.triton_process import outcomes
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]

#: Names of the other packages that `make install` brings, none of which the tier needs.
NOT_IN_KERNELS = (
    "accelerate", "cma", "datasets", "lm_eval", "matplotlib", "moocore", "nevergrad", "optuna",
    "pandas", "plotly", "psutil", "pydantic", "pymoo", "pytest", "ray", "rich", "scipy", "sklearn",
    "threadpoolctl", "typer", "xxhash",
)  # fmt: skip

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from pathlib import Path
import experiments.gpu_check.__main__, experiments.gpu_check.report
from experiments.gpu_check import arenas
from experiments.gpu_check.check import Machine, result_of
from experiments.gpu_check.table import checks_of
from experiments.gpu_check import bits, combine, sharing
bits.ENCODINGS = combine.ENCODINGS = {{n: arenas.ENCODINGS[n] for n in ("int8", "factors")}}
for check in checks_of("kernels"):
    if check.name != "sharing":
        found = result_of(check, Machine("cpu", Path(sys.argv[1]), scale=1e-6))
        assert found.passed, found.detail
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Main memory, the least sizes, two encodings."""
    few = {name: arenas.ENCODINGS[name] for name in ("packed, shared", "factors")}
    for module in (bits, combine):
        monkeypatch.setattr(module, "ENCODINGS", few)
    return Machine("cpu", tmp_path, scale=1e-9)


def test_bits_of_the_device_are_compared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bits.run(machine)
    assert [figure.passed for figure in figures] == [True] * 4
    moved = arenas.Arena.to

    def damaged(arena: arenas.Arena, device: str) -> arenas.Arena:
        memory = moved(arena, device).memory.clone()
        memory[1] ^= 1  # in the mantissa of the first number of the base
        return replace(arena, memory=memory)

    monkeypatch.setattr(arenas.Arena, "to", damaged)
    assert [figure.passed for figure in bits.run(machine)][::2] == [False, False]


def test_every_form_and_dtype_is_compared() -> None:
    for rows in arenas.ENCODINGS.values():
        variants = list(bits.variants(rows))
        assert {dtype for _, dtype, _ in variants} == set(bits.DTYPES)
        assert {form for form, _, _ in variants} == set(bits.FORMS if not rows.rank else ["delta"])


def test_a_wrong_gradient_is_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = bits.arena_of(machine, arenas.ENCODINGS["dense fp32"], 3, False)
    assert bits.gradient_error(machine, arena) <= bits.BAR
    exact = bits.span_products
    calls: list[int] = []

    def off(*arguments: object) -> object:
        calls.append(0)
        return exact(*arguments) * (1 + 1e-3 * (len(calls) % 2))  # type: ignore[arg-type]

    monkeypatch.setattr(bits, "span_products", off)
    assert bits.gradient_error(machine, arena) > bits.BAR


def test_merges_are_timed_beside_copies(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "ROUNDS", 2)
    figures = combine.run(machine)
    assert len(figures) == 2
    for figure in figures:
        assert "1 layers of width 64" in figure.what
        assert figure.what.endswith("numba")
        assert "of a copy" in figure.value
        assert figure.passed is None, "speed is judged on a card alone"


def test_an_arena_has_as_many_layers_as_fit() -> None:
    rows = arenas.ENCODINGS["stored bf16"]
    planned, layers = arenas.planned_llama(3_000_000, 64, rows, 4)
    assert planned.bytes <= 3_000_000
    assert layers == 5
    shapes = list(arenas.llama_shapes(64, layers + 1, 128).values())
    assert arenas.plan(shapes, rows, 4, ("bfloat16",)).bytes > 3_000_000
    # In full size, two bytes for the base and each of four rows: an 8B model without vocabulary.
    planned, layers = arenas.planned_llama(1 << 40, 4096, rows, 4)
    assert layers == 32
    assert planned.bytes == pytest.approx(10 * 7.05e9, rel=0.01)


def test_an_upload_is_timed_and_compared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(machine, scale=1e-4)
    speed, content = upload.run(machine)
    assert "of a pinned copy" in speed.value
    assert content.passed
    monkeypatch.setattr(upload, "copy_bytes", lambda source, target: None)
    assert upload.run(machine)[1].passed is False
    assert list(machine.folder.iterdir()) == []


def test_processes_that_copy_the_arena_are_found() -> None:
    planned, _ = arenas.planned_llama(1 << 33, 4096, arenas.ENCODINGS["stored bf16"], 4)
    merged = 2 * planned.size
    context = 500_000_000
    for each, judged, passed in (
        (merged + context, True, True),
        (merged + context + planned.bytes, True, False),
        (merged + context + planned.bytes, False, None),
    ):
        assert sharing.memory_figure(2, 2 * each, planned, judged=judged).passed is passed


def test_a_merge_of_other_bits_is_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [sharing.Answer("other", 1.0), sharing.Answer("other", 2.0)]
    monkeypatch.setattr(sharing, "_ask", lambda *_: (answers, None))
    monkeypatch.setattr(sharing, "WORKERS", (2,))
    (figure,) = sharing.run(machine)
    assert figure.passed is False
    assert figure.value.startswith("0 of 2 merges have the holder's bits")
    answers[:] = [sharing.Answer(sharing.digest_of(arena_held(machine)), 1.0)] * 2
    assert sharing.run(machine)[0].passed


def arena_held(machine: Machine) -> arenas.Arena:
    """The arena that the check makes."""
    rows = arenas.ENCODINGS["stored bf16"]
    return arenas.Arena.random(arenas.planned_llama(0, machine.hidden, rows, 4)[0], "cpu")


@pytest.mark.slow
def test_processes_share_one_arena(tmp_path: Path) -> None:
    figures = sharing.run(Machine("cpu", tmp_path, scale=1e-5))
    assert [figure.passed for figure in figures] == [True, True]
    assert figures[1].value.startswith("4 of 4")


@pytest.mark.slow
def test_a_process_that_dies_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_attach", exit)
    with pytest.raises(RuntimeError, match="exit codes of those that ended"):
        sharing.run(Machine("cpu", tmp_path, scale=1e-5))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("peak", "main memory is not counted by torch; a card's is"),
        ("out of memory", "a check cannot take main memory away from its own machine"),
        ("two cards", "needs two cards"),
    ],
)
def test_what_needs_a_card_is_skipped_with_its_reason(
    machine: Machine, name: str, reason: str
) -> None:
    found = result_of(BY_NAME[name], machine)
    assert (found.verdict, found.reason) == ("skipped", reason)


def test_the_summary_of_pytest_is_read() -> None:
    output = "...\nFAILED tests/a.py::b - assert 1\n1 failed, 2 passed, 3 skipped in 1.0s\n"
    figure = suite.figure_of(output, 1)
    assert figure.value == "1 failed, 2 passed, 3 skipped: tests/a.py::b"
    assert figure.passed is False
    assert suite.figure_of("2 passed in 1.0s", 0).passed
    assert suite.figure_of("", 3) == Figure("pytest -m gpu", "no summary", "none fails", False)


def test_an_error_is_a_check_that_is_not_passed(machine: Machine) -> None:
    found = result_of(Check("x", "?", "full", 1, "missing"), machine)
    assert found.passed is False
    assert found.reason.startswith("ModuleNotFoundError")
    assert "Traceback" in found.detail


@pytest.mark.slow
def test_the_kernels_tier_needs_few_packages(tmp_path: Path) -> None:
    code = BLOCKED.format(names=set(NOT_IN_KERNELS))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [check.name for check in checks_of("kernels")] == [
        "bits",
        "combine",
        "sharing",
        "upload",
    ]
    assert list(checks_of("full")) == list(CHECKS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("case", CASES)
def test_with_the_kernels_of_a_card(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "triton"
    failure = outcomes("tests.experiments.gpu_check_cases", tuple(CASES), True, folder)[case]
    assert not failure, failure


def test_without_a_card_the_exit_code_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "accelerator", lambda: None)
    assert program.main([]) == 2
    assert "expected a GPU" in capsys.readouterr().out


def test_a_missed_bar_is_exit_code_1_and_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "bits": Result("bits", True, (Figure("merges", "0 differ", "0", True),)),
        "combine": Result("combine", False, (Figure("a | b", "10 %", "85 %", False),)),
        "sharing": Result("sharing", None, reason="torch cannot"),
        "upload": Result("upload", True),
    }
    monkeypatch.setattr(program, "in_own_process", lambda check, machine: made[check.name])
    out = tmp_path / "gpu.md"
    words = ["--device", "cpu", "--out", str(out), "--tier", "kernels"]
    assert program.main(words) == 1
    shown = capsys.readouterr().out
    assert "[3/4] sharing" in shown
    assert "s left)" in shown
    assert "missed: combine" in shown
    text = out.read_text()
    assert "| combine | a \\| b | 10 % | 85 % | **MISSED** |" in text
    assert "skipped: torch cannot" in text
    assert f"`python -m experiments.gpu_check {' '.join(words)}`" in text
    assert "**the CPU**" in text
    assert program.main([*words, "--check", "bits"]) == 0
    assert f"| suite | {BY_NAME['suite'].question} | not run |" in out.read_text()
    assert program.main([*words, "--budget", "0"]) == 1
    assert "the 0 s are over" in out.read_text()


def test_a_check_runs_in_a_process_of_its_own(machine: Machine) -> None:
    found = program.in_own_process(BY_NAME["upload"], replace(machine, scale=1e-4))
    assert found.passed, found.detail
    assert found.figures[1].value == "the file's"
    late = program.in_own_process(BY_NAME["upload"], replace(machine, seconds=0.01))
    assert late.passed is False
    assert late.reason.startswith("was not done within")
    dead = program.in_own_process(replace(BY_NAME["upload"], name="unknown"), machine)
    assert dead.reason == "its process ended with exit code 2"


def test_the_page_names_its_card_or_says_that_there_was_none() -> None:
    text = report.PAGE.read_text()
    assert text == report.blank() or "| check | what was measured |" in text
    made = report.Environment(f"{Device('H')}", 2, {"torch": "2"}, "2026-01-01", "make gpu-check")
    assert "**H**, 2 in the machine; torch 2; 2026-01-01" in report.page(made, [])
    assert all(f"| {check.name} |" in report.blank() for check in CHECKS)


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path: Path) -> None:
    """Without a card every check passes or says why it is skipped."""
    out = tmp_path / "gpu.md"
    tests = "tests/merging/resident/test_sharded_model.py"
    words = ["--device", "cpu", "--threads", "1", "--out", str(out), "--tests", tests]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.gpu_check", *words, "--folder", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed in") == 5
    assert done.stdout.count("skipped in") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.md"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("name", ["bits", "combine", "upload"])
def test_a_check_passes_on_a_small_scale(name: str, tmp_path: Path) -> None:
    """Sizes that fill no block; the bars are those that hold for any size."""
    found = result_of(BY_NAME[name], Machine("cuda", tmp_path, scale=1e-4))
    assert found.passed, found.reason + found.detail


def test_nothing_marked_gpu_is_a_reason_to_skip(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 5, "", "")
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(Skipped, match="is marked gpu"):
        suite.run(machine)
