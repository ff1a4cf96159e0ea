"""Studies of language models: lm_eval in workers, code that must be allowed, unlike parents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators import Candidate
from mergesearch.merging import InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.caveats import caveats
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.opened import open_run
from tests.evaluators.language import lm_section, make_tasks, make_tokenizer, text_llama
from tests.search.studies import fingerprint, run_in, spec_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and two experts with tokenizers of their own, task files, and scorers."""
    home = tmp_path_factory.mktemp("language")
    make_tasks(home, 40)
    make_tokenizer(home / "tokenizer")
    for seed, name in enumerate(("base", "left", "right")):
        text_llama(seed).save_pretrained(home / name)
        template = "{% for m in messages %}{{m.content}}{% endfor %}" if name == "right" else None
        make_tokenizer(home / name, template)
    return home


def study(home: Path, *evaluators: dict[str, Any], **sections: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": "language",
        "base": str(home / "base"),
        "experts": {"left": str(home / "left"), "right": str(home / "right")},
        "space": {"granularity": "block"},
        "strategy": "cma_es",
        "evaluators": list(evaluators)
        or [lm_section(home, "choose", "continue", objectives=[{"metric": "acc"}])],
        "budget": {"trials": 16},
        "selection": {"leaders": 2},
    }
    return data | sections


def test_searches_tasks_and_exports_what_was_evaluated(tmp_path: Path, home: Path) -> None:
    section = lm_section(home, "choose", "continue", objectives=[{"metric": "acc"}], batch_size=16)
    run = run_in(study(home, section, fidelity={"rule": "race", "min_items": 20}), tmp_path / "run")
    record = run.trial(None)
    export_model(record.recipe, tmp_path / "out")
    again = rescore(open_run(tmp_path / "run"), record, tmp_path / "out")
    assert (again.split, again.agreement.identical) == ("test", True)


@pytest.mark.slow
def test_ray_workers_score_as_one_process_does(tmp_path: Path, home: Path) -> None:
    data = study(home, strategy="sobol")
    inline = run_in(data, tmp_path / "inline")
    ray = run_in(data | {"workers": {"count": 2}}, tmp_path / "ray")
    by_recipe = {record.recipe.digest: record.values for record in inline.log.records}
    assert all(
        by_recipe[r.recipe.digest] == r.values
        for r in ray.log.records
        if r.recipe.digest in by_recipe
    )
    assert {r.recipe.digest for r in ray.log.records} == set(by_recipe)


def test_distance_beside_quality(tmp_path: Path, home: Path) -> None:
    data = study(
        home,
        lm_section(home, "continue"),
        {"kind": "distance"},
        strategy="sobol",
        selection={"weights": None},
    )
    run = run_in(data, tmp_path / "run")
    by_name = {record.name: record for record in run.log.records if record.kind == "anchor"}
    assert by_name["base"].values["distance"] == 0
    average, left = (by_name[name].values["distance"] for name in ("average", "expert left"))
    assert 0 < average < left
    record = run.trial(by_name["average"].number)
    export_model(record.recipe, tmp_path / "out")
    assert rescore(open_run(tmp_path / "run"), record, tmp_path / "out").agreement.identical


def test_parents_whose_tokenizers_or_templates_differ_are_named(tmp_path: Path, home: Path) -> None:
    plan = plan_study(spec_of(study(home), tmp_path))
    assert len(plan.warnings) == 1
    assert (
        f"the chat template of {home / 'right'} differs from that of the base {home / 'base'}"
        in plan.warnings[0]
    )
    assert plan.warnings[0] in "\n".join(describe_plan(plan))
    said: list[str] = []
    run = run_study(
        spec_of(study(home), tmp_path),
        tmp_path / "run",
        lambda e: said.append(e.text) if e.kind == "warning" else None,
    )
    assert [text for text in said if not text.startswith("budget")] == list(plan.warnings)
    assert plan.warnings[0] in caveats(run.report_data())


def command(program: str) -> dict[str, Any]:
    return {
        "kind": "command",
        "command": ["sh", "-c", program],
        "objectives": [{"name": "f", "direction": "minimize"}],
        "model": "none",
        "timeout": 1,
    }


class TestCode:
    def test_runs_only_where_the_study_allows_it(self, tmp_path: Path, home: Path) -> None:
        mark = tmp_path / "ran"
        data = study(home, command(f"touch {mark}"))
        with pytest.raises(
            InputError, match=r"evaluators.0: command runs code .* set allow_code: true"
        ):
            plan_study(spec_of(data, tmp_path))
        assert not mark.exists()

    def test_scorers_and_functions_in_task_files_are_code(self, tmp_path: Path, home: Path) -> None:
        scorer = {
            "kind": "generation",
            "data": "documents",
            "scorer": "os:getcwd",
            "objectives": [{}],
        }
        with pytest.raises(InputError, match="generation runs code"):
            spec_of(study(home, scorer), home)
        tasks = make_tasks(tmp_path)
        (tasks / "own.yaml").write_text("task: own\ndoc_to_text: !function own.text\n")
        with pytest.raises(InputError, match="lm_eval runs code"):
            spec_of(study(home, lm_section(tmp_path, "choose")), home)

    def test_programs_that_hang_or_fail_are_failed_trials_and_nothing_is_lost(
        self, tmp_path: Path, home: Path
    ) -> None:
        """Every other call hangs; the rest answer by the coefficients."""
        script = tmp_path / "program.py"
        script.write_text(
            "import json, sys, time\nr = json.load(sys.stdin)\n"
            "x = sum(map(sum, r['recipe']['field']['values']))\n"
            "if 0.9 < x: time.sleep(60)\nprint(json.dumps({'values': {'f': (x - 0.3) ** 2}}))\n"
        )
        import sys

        section = command("") | {"command": [sys.executable, str(script)]}
        data = study(
            home, section, allow_code=True, strategy="sobol", space={"granularity": "global"}
        )
        run = run_in(
            data | {"budget": {"trials": 14}, "max_consecutive_failures": 14}, tmp_path / "run"
        )
        failed = [record for record in run.log.records if record.state == "failed"]
        assert failed
        assert all(
            "1 s" in record.failure.message or "second" in record.failure.message
            for record in failed
        )
        assert run.verdict is not None
        assert fingerprint(open_run(tmp_path / "run")) == fingerprint(run)


def test_a_candidate_of_other_weights_is_scored_anew(home: Path) -> None:
    from tests.evaluators.items import opened, recipe_at

    evaluator = opened(lm_section(home, "continue"))
    scores = [
        evaluator.evaluate(Candidate(recipe_at([0.1]), text_llama(seed)), "search").values[
            "perplexity"
        ]
        for seed in (0, 1, 0)
    ]
    assert scores[0] == scores[2] != scores[1]
