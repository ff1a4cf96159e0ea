"""Studies from Python: that they go on, what they hand over, and every refusal in one line."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mergesearch
from mergesearch import InputError, RunFolderError, Study
from mergesearch.evaluators import Objective
from mergesearch.merging.extensions import references
from mergesearch.merging.operators import Basis
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.search.api.frames import frame, rows_of
from mergesearch.search.workers.backends.cluster import check_objects
from tests.search.cli.test_cli import mergesearch as command
from tests.search.cli.test_cli import refused

SECTIONS: dict[str, Any] = {
    "name": "small",
    "space": {"dim": 2, "bounds": [0.0, 1.0], "start": 0.3},
    "strategy": "sobol",
    "budget": {"trials": 6},
    "selection": {"leaders": 1},
}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Objects that a test gives are not known to others."""
    yield
    references._GIVEN.clear()


def near(number: float) -> Callable[..., Any]:
    """A function that cannot be imported: how near the coefficients are to a number."""

    def score(recipe: Any) -> Any:
        return -float(((recipe.field.values - number) ** 2).sum()) - 0.1 * np.arange(20)

    return score


def small(folder: Path, **sections: Any) -> Study:
    given: dict[str, Any] = {"evaluate": near(0.5), **SECTIONS, **sections}
    return Study(run=folder / "run", **given)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def confidence(model: nn.Module) -> torch.Tensor:
    inputs = torch.linspace(-1.0, 1.0, 60).reshape(20, 3)
    return model(inputs).softmax(-1).amax(-1)


def modules(folder: Path, **sections: Any) -> Study:
    """A study of modules that are no transformers models, in memory."""
    draw = torch.Generator().manual_seed(0)
    states = [
        {
            name: torch.randn(tensor.shape, generator=draw)
            for name, tensor in build().state_dict().items()
        }
        for _ in range(3)
    ]
    given: dict[str, Any] = {
        "name": "modules",
        "base": states[0],
        "experts": {"left": states[1], "right": states[2]},
        "evaluate": confidence,
        "model_class": build,
        "space": {"granularity": "task"},
        "budget": {"trials": 12},
    }
    return Study(run=folder / "run", **given | sections)


# --- the whole journey ---------------------------------------------------------------------------


def test_modules_are_searched_shown_loaded_and_exported(tmp_path: Path) -> None:

    def confident(model: nn.Module) -> torch.Tensor:
        return confidence(model)

    study = modules(tmp_path, evaluate=confident)
    study.check()
    assert study.run("quiet") is study
    rows = study.trials(rows=True)
    assert len(rows) == 12
    assert {row["state"] for row in rows} == {"complete"}
    [winner] = study.front(rows=True)
    model = study.best_model()
    assert isinstance(model, nn.Sequential)
    exported = study.export(tmp_path / "out")
    assert exported["identical"]
    with torch.no_grad():
        scores = confidence(model).double().numpy()
    # The score of the test items, which are some of the twenty.
    assert exported["split"] == "test"
    assert exported["values"]["score"] in {
        scores[part].mean()
        for part in [mergesearch_divided(split) for split in ("search", "validation", "test")]
    }
    assert winner["trial"] == exported["trial"]
    # The command line reads it, without the functions.
    references._GIVEN.clear()
    code, out, err = command("show", tmp_path / "run", "--json")
    assert code == 0, err
    assert len(json.loads(out)["trials"]) == 12
    line = refused("export", tmp_path / "run", "--out", tmp_path / "again")
    assert line.startswith("evaluators.0.function: expected ")
    assert "of the program that began the study, which cannot be imported" in line
    assert line.endswith("in the same run folder, or move it to a module")
    # The same weights are written once, and the study goes on.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "weights").iterdir()}
    again = modules(tmp_path, evaluate=confident, max_consecutive_failures=5)
    assert len(again.run("quiet").trials(rows=True)) == 12
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(RunFolderError, match="differs in"):
        modules(tmp_path, evaluate=confident, base=build()).run("quiet")


def mergesearch_divided(split: Any) -> np.ndarray:
    from mergesearch.evaluators.python import divided

    return divided(20, (0.6, 0.2, 0.2))[split]


class Halves:
    """Half of every task vector."""

    identities = ("base_at_zero",)

    def prepare(self, base: Any, experts: Any, *, share: float = 0.5) -> Basis:
        def rows(name: str) -> list[torch.Tensor]:
            return [share * (e.read(name).float() - base.read(name).float()) for e in experts]

        return Basis("delta", len(experts), rows)


def test_a_merge_by_an_operator_of_the_users_is_exported(tmp_path: Path) -> None:
    study = modules(tmp_path, operator=Halves).run("quiet")
    assert study.export(tmp_path / "out")["identical"]
    name = f"{__name__}:Halves"
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.operator == name
    # Prepared weights of one version are not those of another.
    one = recipe.basis_key

    class Changed(Halves):
        """Half of it, in other words."""

    references.give({name: Changed})
    assert recipe.basis_key != one
    # A recipe alone runs no code.
    references._GIVEN.clear()
    references._IMPORTED.clear()
    line = refused("merge", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again")
    assert "expected an operator that this process knows" in line


@pytest.mark.slow
def test_functions_of_a_closure_travel_to_workers(tmp_path: Path) -> None:
    inline = modules(tmp_path / "inline").run("quiet").trials(rows=True)
    number = 0.5

    def scored(model: nn.Module) -> torch.Tensor:
        return confidence(model) + 0 * number

    there = modules(tmp_path / "ray", evaluate=scored, workers={"count": 1}).run("quiet")
    values = [row["score"] for row in there.trials(rows=True)]
    assert values == [row["score"] for row in inline]
    assert there.export(tmp_path / "out")["agrees"]


def test_a_study_goes_on_only_with_the_same_function(tmp_path: Path) -> None:
    small(tmp_path).run("quiet")
    assert len(small(tmp_path, budget={"trials": 6}).run("quiet").trials(rows=True)) == 6

    def score(recipe: Any) -> Any:
        return 1.0

    score.__qualname__ = near(0.5).__qualname__
    score.__module__ = near(0.5).__module__
    with pytest.raises(RunFolderError, match=r"others: evaluators\.0\.source\."):
        small(tmp_path, evaluate=score).run("quiet")


WALK = """
from mergesearch.search import Suggestion

class Walk:
    needs, recommends, count = frozenset(), False, 0

    def __init__(self, problem, seed):
        self.problem = problem

    def ask(self, count):
        asked = [Suggestion(self.count + k, self.problem.start) for k in range(count)]
        self.count += count
        return asked

    def tell(self, trials):
        pass

    def best(self):
        return []
"""


def test_a_strategy_of_a_file_goes_on_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "walking.py"
    file.write_text(WALK)
    options = {"strategy": f"{file}:Walk", "allow_code": True}
    for _ in range(2):
        assert len(small(tmp_path, **options).run("quiet").trials(rows=True)) == 6
    file.write_text(WALK.replace("return []", "return list()"))
    with pytest.raises(RunFolderError, match="expected the code that the recorded trials used"):
        small(tmp_path, **options).run("quiet")
    with pytest.raises(InputError, match=r"strategy\.name: .*:Walk runs code that the study names"):
        small(tmp_path, **options | {"allow_code": False})


def test_a_file_and_a_mapping_are_studies_too(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "name: small\nspace: {dim: 2}\nbudget: {trials: 4}\n"
        "evaluators: [{kind: synthetic, problem: sphere}]\n"
    )
    data = {
        "name": "small",
        "space": {"dim": 2},
        "budget": {"trials": 4},
        "evaluators": [{"kind": "synthetic", "problem": "sphere"}],
    }
    one = Study(tmp_path / "study.yaml", seed=3)
    two = Study(data, seed=3)
    two.check()
    assert one._spec == two._spec
    assert one.folder == two.folder == Path("runs/small")


# --- wrong input -------------------------------------------------------------------------------


def two() -> list[Callable[..., Any]]:
    return [lambda recipe: 1.0, lambda recipe: 2.0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"budget": {"trails": 3}}, "study: budget.trails: unknown key; did you mean 'trials'?"),
    ({"budgets": 3}, "study: budgets: unknown key; did you mean 'budget'?"),
    ({"strategy": {"name": "sobol", "sigma": -1}}, "study: strategy.sigma:"),
    ({"evaluate": None, "objectives": {"a": "maximize"}}, "objectives: expected a function beside"),
    ({"evaluate": None}, "study: evaluators: required key is missing"),
    ({"evaluators": []}, "evaluate: expected no evaluators beside it, received some"),
    ({"objectives": {"a": "up"}}, "study: evaluators.0.objectives.0.direction: input should be"),
    ({"evaluate": 3}, "expected a function"),
    ({"strategy": int}, "strategy builtins:int: expected a StrategyInfo or a class with ask"),
    ({"operator": int}, "operator builtins:int: expected an Operator or a class with a method"),
    (
        {"base": {}, "experts": {}},
        "base: expected a path, a torch module or a state dict, received",
    ),
    ({"base": {"w": 3}}, "base: expected a state dict of tensors, received int for 'w'"),
    ({"experts": {"a": 3}}, "experts.a: expected a path, a torch module or a state dict, received"),
    (
        {"evaluate": two()[0], "model_class": two()[1], "base": "b", "experts": ["a"]},
        "expected one object of this name, received two; define them with def or class",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_study_is_refused_in_one_line(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        small(tmp_path, **sections).check()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: nn.Linear(3, 4), "tensor '0.bias': expected shape none: the module has no such"),
        (lambda: 3, "to build a torch module, received int"),
        (lambda width: nn.Linear(3, width), "arguments, received: missing a required argument"),
        (
            lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
            "tensor '0.bias': expected shape (5,) as",
        ),
    ],
)
def test_a_builder_of_another_module_is_refused(changed: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        modules(tmp_path, model_class=changed).check()


def test_an_unknown_style_of_progress_is_refused(tmp_path: Path) -> None:
    style: Any = "loud"
    with pytest.raises(InputError, match=r"progress: expected one of auto, rich, .*'loud'"):
        small(tmp_path).run(style)
    assert not (tmp_path / "run").exists()


def test_coordinates_that_are_called_as_objectives_have_columns_of_their_own() -> None:
    point = np.array([0.25, 0.75])
    record: Any = SimpleNamespace(
        number=0,
        kind="search",
        name="",
        state="complete",
        point=point,
        failure=None,
        same_as=None,
    )
    record.values = {"left": 1.0}
    record.errors = {}
    record.seconds = {}
    left = [Objective("left", "maximize")]
    names = ("left", "right")
    rows = rows_of([record], left, names)
    assert rows[0]["left"] == 1.0
    table = frame(rows, left, names)
    assert table.columns.is_unique
    assert table.loc[0, ["left coefficient", "right"]].tolist() == [0.25, 0.75]


def test_reading_needs_a_run_and_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path)
    with pytest.raises(RunFolderError, match="expected the folder of a run, found no study"):
        study.trials()
    # In a thread, which no signal reaches.
    thread = threading.Thread(target=study.run, args=("quiet",))
    thread.start()
    thread.join()
    assert len(study.trials(rows=True)) == 6
    with pytest.raises(InputError, match=r"front: expected several objectives, received 'score'"):
        study.plot_front()
    with pytest.raises(InputError, match="best_model: expected a study whose evaluators run a"):
        study.best_model()
    with pytest.raises(InputError, match="expected a study of checkpoints, received an analytic"):
        study.export(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"expected pandas, which is not installed"):
        study.trials()


@pytest.mark.slow
def test_what_cannot_travel_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    lock = threading.Lock()

    def score(recipe: Any) -> float:
        with lock:
            return 1.0

    with pytest.raises(InputError, match="expected an object that can be sent to workers"):
        check_objects({"tests:score": score})
    with pytest.raises(InputError, match="expected an object that can be sent to workers"):
        small(tmp_path, evaluate=score, workers={"count": 1}).run("quiet")
    assert not (tmp_path / "run").exists()


def test_the_public_name_is_the_study() -> None:
    assert mergesearch.Study is Study
