"""``start: {priors: [...]}``: a study of other experts begins at coefficients by role and depth."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Layout
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.start.role_profile import RoleProfile, field_by_profiles, profile_of
from mergesearch.search.runs.start.warm_start import WarmStart, find_warm_start
from tests.search.conftest import model_study
from tests.search.studies import analytic, fingerprint, run_in, spec_of

ATTENTION = "model.layers.{}.self_attn.q_proj.weight"
MLP = "model.layers.{}.mlp.up_proj.weight"


def _llama(blocks: int, *others: str) -> Layout:
    names = [*others, *(name.format(b) for b in range(blocks) for name in (ATTENTION, MLP))]
    return Layout.build(dict.fromkeys(names, ((4, 4), "float32")))


def _field(layout: Layout, values: dict[str, list[float]]) -> Field:
    """A field with these coefficients of the directions in each tensor."""
    starts = [*layout.segment_starts(), layout.size]
    columns = [values[name] for name in layout.names]
    return Field(np.array(starts), np.array(columns).T)


def _profile(layout: Layout, values: dict[str, list[float]], default: float) -> RoleProfile:
    return profile_of(layout, _field(layout, values), default, values)


def _at(layout: Layout, field: Field, name: str) -> list[float]:
    return field.at([layout.by_name[name].start])[:, 0].tolist()


class TestRoleProfile:
    """Two experts in two blocks: attention 0.2 and 0.4, then 0.6; MLP 0.5 throughout."""

    shallow = _llama(2)
    profile = _profile(
        shallow,
        {
            ATTENTION.format(0): [0.1, 0.3],
            MLP.format(0): [0.5, 0.5],
            ATTENTION.format(1): [0.8, 0.4],
            MLP.format(1): [0.4, 0.6],
        },
        default=0.5,
    )

    def test_another_depth_and_number_of_experts_interpolates(self) -> None:
        deep = _llama(3)
        field, known = field_by_profiles(deep, 4, 0.3, [self.profile])
        expected = {0: 0.2 / 0.5, 1: 0.4 / 0.5, 2: 0.6 / 0.5}
        for block, ratio in expected.items():
            attention = _at(deep, field, ATTENTION.format(block))
            assert attention == pytest.approx([0.3 * ratio] * 4)
            assert _at(deep, field, MLP.format(block)) == pytest.approx([0.3] * 4)
        assert known == 6

    def test_runs_count_alike_and_only_for_roles_that_they_have(self) -> None:
        attention = [ATTENTION.format(0), ATTENTION.format(1)]
        other = profile_of(self.shallow, Field.constant(self.shallow.size, [1.0]), 0.5, attention)
        field, _ = field_by_profiles(self.shallow, 1, 1.0, [self.profile, other])
        first = _at(self.shallow, field, ATTENTION.format(0))
        assert first == pytest.approx([(0.4 + 2.0) / 2])
        assert _at(self.shallow, field, MLP.format(0)) == pytest.approx([1.0])

    def test_a_role_of_which_nothing_is_known_takes_the_default(self) -> None:
        layout = _llama(2, "lm_head.weight", "strange.weight")
        field, known = field_by_profiles(layout, 2, 0.3, [self.profile])
        assert _at(layout, field, "lm_head.weight") == [0.3, 0.3]
        assert _at(layout, field, "strange.weight") == [0.3, 0.3]
        assert known == 4

    def test_experts_may_change_places(self) -> None:
        values = {name: [0.1 * i, 0.9 - 0.2 * i] for i, name in enumerate(self.shallow.names)}
        swapped = {name: row[::-1] for name, row in values.items()}
        one, other = (
            field_by_profiles(self.shallow, 2, 0.3, [_profile(self.shallow, v, 0.3)])[0]
            for v in (values, swapped)
        )
        assert one == other


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, pico_models: Path, pico_items: Path) -> Run:
    """A finished run on two experts, without anchors."""
    folder = tmp_path_factory.mktemp("priors")
    data = _study(pico_models, pico_items, name="a")
    return run_study(spec_of(data, folder), folder / "a")


def _study(models: Path, items: Path, **sections: object) -> dict:
    small = {
        "strategy": "sobol",
        "budget": {"trials": 4},
        "anchors": "none",
        "selection": {"leaders": 1},
    }
    return model_study(models, items, **(small | sections))


def _found(data: dict, folder: Path) -> WarmStart:
    plan = plan_study(spec_of(data, folder))
    assert plan.spec.start is not None
    return find_warm_start(plan, plan.spec.start)


def test_the_same_study_begins_at_the_mean_of_the_winners_experts(
    source: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    start = {"priors": [str(source.folder.path)] * 2}
    found = _found(_study(pico_models, pico_items, start=start), tmp_path)
    winner = source.trial(None)
    assert winner.point is not None
    mean = winner.point.reshape(2, -1).mean(axis=0)
    np.testing.assert_allclose(found.point.reshape(2, -1), [mean, mean], rtol=1e-12)


def test_other_experts_take_their_own_default_and_stay_in_the_box(
    source: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    start = {"priors": [str(source.folder.path)]}
    experts = {name: str(pico_models / "left") for name in ("x", "y", "z")}
    data = _study(pico_models, pico_items, start=start, experts=experts, operator="average")
    winner = source.trial(None)
    assert winner.point is not None
    ratios = winner.point.reshape(2, -1).mean(axis=0) / 0.3
    found = _found(data, tmp_path).point.reshape(3, -1)
    np.testing.assert_allclose(found, [np.clip(ratios / 3, None, 1.0)] * 3, rtol=1e-12)
    narrow = data | {"space": {"granularity": "block", "bounds": [0.0, 0.1], "start": 0.05}}
    assert _found(narrow, tmp_path).point.max() <= 0.1


def test_the_start_is_measured_first_and_a_resumed_study_needs_the_runs_no_more(
    source: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    shutil.copytree(source.folder.path, tmp_path / "a")
    start = {"priors": [str(tmp_path / "a")]}
    data = _study(pico_models, pico_items, name="b", start=start)
    whole = run_study(spec_of(data, tmp_path), tmp_path / "b")
    first = whole.log.records[0]
    assert (first.kind, first.name) == ("anchor", "priors from a")
    begun = whole.plan.begin
    assert begun is not None
    assert whole.plan.space.decode(begun).digest == first.recipe.digest
    warnings = whole.log.get_attr("warnings")
    assert any("priors from a, whose" in line for line in warnings)
    journal = (tmp_path / "b" / "journal.log").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "journal.log").write_bytes(b"".join(journal[: len(journal) // 2]))
    shutil.rmtree(tmp_path / "a")
    again = run_study(spec_of(data, tmp_path), tmp_path / "b")
    assert fingerprint(again) == fingerprint(whole)
    assert again.log.get_attr("warnings") == warnings


def test_what_is_shared_with_the_runs_is_named(
    source: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = _study(pico_models, pico_items, start={"priors": [str(source.folder.path)]})
    swapped = {"search": "test", "validation": "validation", "test": "search"}
    data["evaluators"] = [data["evaluators"][0] | {"splits": swapped}]
    data["experts"] = {"left": data["experts"]["left"], "base2": data["base"]}
    notes = _found(data, tmp_path).notes
    shared = "priors from a, whose {} items may be {} items of this study (24 of the same content)"
    assert notes == (
        f"start: {shared.format('search', 'test')}",
        f"start: {shared.format('validation', 'validation')}",
        "start: priors from a, which merged models of this study: base, left, base2",
    )


def test_items_that_no_one_names_are_said_to_be_unknown(
    source: Run, pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = _study(pico_models, pico_items, start={"priors": [str(source.folder.path)]})
    data["allow_code"] = True
    data["evaluators"] = [
        {
            "kind": "command",
            "command": "true",
            "model": "none",
            "objectives": [{"name": "x", "direction": "maximize"}],
        }
    ]
    notes = _found(data, tmp_path).notes
    assert "it cannot be told whether its items are validation or test items" in notes[0]
    assert "(command)" in notes[0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"operator": "ties"}, r"same meaning as ties \(sparse, .*\), received task_arithmetic"),
        ({"start": {"priors": ["nowhere"]}}, "start.priors: .*expected the folder of a run"),
        ({"start": {"priors": ["unfinished"]}}, "start.priors: .*expected a finished study"),
        ({"start": {"priors": ["box"]}}, "box: expected a space of coefficients over tensors"),
        ({"start": {}}, "expected one of run, priors, scores"),
        ({"start": {"priors": ["a"], "trial": 3}}, "expected trial with run only"),
    ],
)
def test_what_cannot_be_begun_at_is_refused(
    source: Run,
    pico_models: Path,
    pico_items: Path,
    tmp_path: Path,
    sections: dict,
    message: str,
) -> None:
    names = sections.get("start", {}).get("priors", [])
    if "unfinished" in names:
        shutil.copytree(source.folder.path, tmp_path / "unfinished")
        lines = (tmp_path / "unfinished" / "journal.log").read_bytes().splitlines(keepends=True)
        (tmp_path / "unfinished" / "journal.log").write_bytes(b"".join(lines[: len(lines) // 2]))
    if "box" in names:
        run_in(analytic("box", trials=4, strategy="sobol"), tmp_path / "box")
    start = {"start": {"priors": [str(source.folder.path)]}}
    data = _study(pico_models, pico_items, **(start | sections))
    with pytest.raises(InputError, match=message):
        _found(data, tmp_path)
