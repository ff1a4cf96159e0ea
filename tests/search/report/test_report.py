"""Reports of synthetic studies: every figure in them is recomputed here from the records."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mergesearch.evaluators import Objective
from mergesearch.merging import Field, Layout, Recipe, RunFolderError, Source
from mergesearch.search.front import Normaliser, hypervolume, nondominated, to_losses
from mergesearch.search.record.trial_record import Score, TrialRecord, Verdict
from mergesearch.search.report.coefficients import block_means, heat_map, kept_of
from mergesearch.search.report.comparison import compare
from mergesearch.search.report.costs import busy_share, failures, forecast
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.kept import HeatMap
from mergesearch.search.report.masking import without_secrets
from mergesearch.search.report.progress import progress
from mergesearch.search.report.tables import result_table, rich_table, text_lines
from mergesearch.search.report.wording import plus_minus
from mergesearch.search.report.writing import ReportData, as_json, write_report
from mergesearch.search.workers.messages import Failure
from tests.pictures import drawing

#: The study of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("report")

EXPERTS = ("upright", "rotated", "mirrored", "inverted")
ANCHORS = ("base", *(f"expert {name}" for name in EXPERTS), "average", "task_arithmetic")
OBJECTIVES = (
    Objective("accuracy", "maximize"),
    Objective("cross_entropy", "minimize"),
    Objective("rotated", "maximize"),
    Objective("inverted <b>", "minimize"),
)
ITEMS = 400


def vit_layout(blocks: int = 6, width: int = 16) -> Layout:
    tensors = {"vit.embeddings.patch_embeddings.projection.weight": ((width, 1, 4, 4), "float32")}
    for block in range(blocks):
        stem = f"vit.encoder.layer.{block}"
        tensors[f"{stem}.attention.attention.query.weight"] = ((width, width), "float32")
        tensors[f"{stem}.layernorm_before.bias"] = ((width,), "float32")
        tensors[f"{stem}.output.dense.weight"] = ((width, 4 * width), "float32")
    tensors["vit.layernorm.weight"] = ((width,), "float32")
    tensors["classifier.weight"] = ((10, width), "float32")
    return Layout.build(tensors)


def make_study(
    objectives: int = 2,
    trials: int = 60,
    *,
    seed: int = 0,
    finished: bool = True,
    every_failure: int = 9,
    layout: Layout | None = None,
) -> ReportData:
    """A synthetic study: noisy quality grows as coefficients come close to a hidden optimum."""
    rng = np.random.default_rng(seed)
    names = OBJECTIVES[:objectives]
    layout = layout or vit_layout()
    starts = [*layout.segment_starts()]
    boundaries = np.array([*starts, layout.size])
    optimum = rng.uniform(0.2, 0.6, (objectives, len(EXPERTS)))
    base = Source("base", "zoo/base")
    experts = tuple(Source(name, f"zoo/{name}") for name in EXPERTS)

    def record(number: int, spread: float) -> TrialRecord:
        anchor = number < len(ANCHORS)
        mean = np.eye(4)[number - 1] if 0 < number < 5 else np.full(4, 0.25)
        center = np.zeros(4) if number == 0 else mean if anchor else optimum.mean(axis=0)
        point = center + (0 if anchor else rng.normal(0, spread, 4))
        values = point[:, None] + rng.normal(0, 0.0 if anchor else 0.05, (4, len(starts)))
        recipe = Recipe(
            base, experts, "task_arithmetic", Field(boundaries, values), layout=layout.digest
        )
        distance = np.linalg.norm(optimum - values.mean(axis=1), axis=1)
        shares = 1 / (1 + np.exp(4 * distance - 2.5)) + rng.normal(0, 0.01, objectives)
        scores = [
            s if o.direction == "maximize" else 2 * (1 - s)
            for s, o in zip(shares, names, strict=True)
        ]
        common = {
            "number": number,
            "kind": "anchor" if anchor else "search",
            "name": ANCHORS[number] if anchor else "",
            "suggestion": None if anchor else number - len(ANCHORS),
            "point": values.mean(axis=1),
            "merge": recipe,
            "tells_at_ask": 0,
            "tell_index": None,
            "seconds": {
                "merge": rng.uniform(0.01, 0.03),
                "evaluate": rng.uniform(0.2, 0.5),
                "overhead": 0.004,
            },
            "worker": f"host:{number % 2}",
            "finished": 1.7e9 + 0.4 * (number + 1),
        }
        if not anchor and number % every_failure == 0:
            odd = number % 2 == 1
            failure = Failure(
                "error" if odd else "infeasible", f"tensor block.{number} <script>alert(1)</script>"
            )
            return TrialRecord(**common, state="failed", failure=failure)
        errors = {o.name: 0.02 for o in names}
        return TrialRecord(
            **common,
            state="complete",
            values={o.name: float(v) for o, v in zip(names, scores, strict=True)},
            errors=errors,
        )

    records = [record(number, 0.3 * math.exp(-2 * number / trials)) for number in range(trials)]
    data = ReportData(
        study=f"digits-{objectives}",
        run=f"runs/digits-{objectives}",
        objectives=names,
        weights=[1 / objectives] * objectives,
        records=records,
        layout=layout,
        experts=EXPERTS,
        names=tuple(f"{expert} block {b}" for expert in EXPERTS for b in range(3)),
        lower=[-0.5] * 12,
        upper=[1.5] * 12,
        resolved={
            "name": f"digits-{objectives}",
            "seed": seed,
            "experts": {name: f"zoo/{name}" for name in EXPERTS},
            "storage": "postgresql://me:hunter2@db/x",
            "strategy": {"name": "cma_es"},
            "budget": {"trials": trials},
        },
        fingerprint={"python": "3.11", "torch": "2.13.0", "cpu": "2 cores", "host": "laptop"},
        wall_seconds=sum(sum(r.seconds.values()) for r in records) / 1.7,
        trials_per_worker={"worker 0": trials // 2, "worker 1": trials - trials // 2},
    )
    return replace(data, verdict=make_verdict(data, rng)) if finished else data


def make_verdict(data: ReportData, rng: np.random.Generator) -> Verdict:
    """Leaders re-measured with fresh noise; the best of them wins."""
    search = [
        i for i in np.argsort(data.complete.scalars) if data.complete.records[i].kind == "search"
    ][:5]
    leaders = [data.complete.records[i].number for i in search]

    def measure(number: int) -> Score:
        record = data.by_number[number]
        shift = {"maximize": -0.01, "minimize": 0.01}
        values = {
            o.name: record.values[o.name] + shift[o.direction] + rng.normal(0, 0.005)
            for o in data.objectives
        }
        return Score(values, dict.fromkeys(values, 0.015))

    anchors = [record.number for record in data.anchors]
    front = [
        data.complete.records[i].number for i in np.flatnonzero(nondominated(data.complete.losses))
    ]
    scores = {
        "validation": {n: measure(n) for n in [*anchors, *leaders]},
        "test": {n: measure(n) for n in [*anchors, leaders[0]]},
    }
    return Verdict(
        leaders[0], tuple(front) if len(data.objectives) > 1 else (), tuple(leaders), scores
    )


class Links(HTMLParser):
    """Everything on a page that a browser would fetch, and the tags it holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def plot_data(page: str, name: str) -> dict:
    """The figure of that name, as the page holds it."""
    start = page.index(f'data-for="{name}">') + len(f'data-for="{name}">')
    return json.loads(page[start : page.index("</script>", start)])


@pytest.fixture(scope="module", autouse=True)
def _drawn(_no_pictures: None) -> Iterator[None]:
    with drawing(True):
        yield


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[ReportData, Path]]:
    written = {}
    for objectives in (1, 2, 3, 4):
        data = make_study(objectives)
        folder = tmp_path_factory.mktemp(f"run{objectives}")
        write_report(data, folder)
        written[objectives] = (data, folder)
    return written


class TestFiles:
    @pytest.mark.parametrize("objectives", [1, 2, 3, 4])
    def test_each_report_holds_its_files_and_no_temporary_ones(self, reports, objectives):
        _, folder = reports[objectives]
        expected = {
            *("report.html", "report.json", "report_data.json", "trials.csv"),
            *("best_so_far.png", "coefficients.png"),
        }
        assert {p.name for p in folder.iterdir()} == expected | (
            {"front.png"} if objectives > 1 else set()
        )
        for picture in folder.glob("*.png"):
            content = picture.read_bytes()
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
            assert width > 600
            assert height > 300
            assert len(content) > 15_000

    def test_a_report_of_fewer_objectives_removes_the_old_front(self, tmp_path):
        (tmp_path / "front.png").write_bytes(b"old")
        write_report(make_study(1, 20), tmp_path)
        assert not (tmp_path / "front.png").exists()

    def test_a_folder_that_is_a_file_is_refused_in_one_line(self, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(RunFolderError, match="expected a folder that can be written") as info:
            write_report(make_study(1, 20), tmp_path / "run")
        assert "\n" not in str(info.value)

    def test_pictures_are_deterministic(self, tmp_path):
        first = tmp_path / "a"
        second = tmp_path / "b"
        for folder in (first, second):
            write_report(make_study(2, 30), folder)
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name

    def test_a_thousand_trials_are_reported_quickly(self, tmp_path):
        data = make_study(2, 1000)
        start = time.process_time()
        write_report(data, tmp_path)
        # The bar is 3 s on an idle machine; twice that keeps a busy one from failing for nothing.
        assert time.process_time() - start < 6

    def test_importing_the_report_loads_neither_plotting_library(self):
        code = (
            "import sys, mergesearch.search.report; print(sorted({'matplotlib', 'plotly', "
            "'torch', 'rich'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


class TestPage:
    @pytest.mark.parametrize("objectives", [1, 2, 3, 4])
    def test_the_page_fetches_nothing_and_holds_plotly_once(self, reports, objectives):
        page = (reports[objectives][1] / "report.html").read_text()
        assert Links(page).fetched == []
        assert page.count("plotly.js v") == 1
        assert "default-src 'none'" in page
        assert (
            "showSendToCloud: false" in page
        )  # plotly's own default is a button that uploads the data

    def test_figures_are_valid_plotly(self, reports):
        import plotly.graph_objects as go

        expected = {1: None, 2: "scatter", 3: "scatter3d", 4: "scatter"}
        for objectives, (_, folder) in reports.items():
            page = (folder / "report.html").read_text()
            names = ["progress", "coefficients"] + ["front"] * (objectives > 1)
            figures = {
                name: go.Figure(plot_data(page, name)) for name in names
            }  # raises on unknown properties
            if objectives > 1:
                assert {trace.type for trace in figures["front"].data} == {expected[objectives]}
            else:
                assert 'data-for="front"' not in page

    def test_every_anchor_and_the_winner_are_in_the_table_with_their_figures(self, reports):
        data, folder = reports[2]
        text = Links((folder / "report.html").read_text()).text
        for record in [*data.anchors, data.winner]:
            for score in (data.score(record, split) for split in ("search", "validation", "test")):
                assert plus_minus(score.values["accuracy"], score.errors["accuracy"]) in text
        assert (
            f"mergesearch export runs/digits-2 --trial {data.winner.number} --out digits-2-trial-"
            in "".join(text)
        )

    def test_hover_texts_name_trial_and_values(self, reports):
        data, folder = reports[3]
        figure = plot_data((folder / "report.html").read_text(), "front")
        star = next(trace for trace in figure["data"] if trace["name"] == "winner")
        assert f"trial {data.winner.number}" in star["text"][0]
        assert [star["x"], star["y"], star["z"]] == [
            [data.winner.values[o.name]] for o in data.objectives
        ]

    def test_names_of_users_cannot_become_markup(self, tmp_path):
        evil = "</script><img src=http://x onerror=alert(1)>[bold]$x^"
        data = make_study(2, 30)
        renamed = tuple(Objective(o.name + evil, o.direction) for o in data.objectives)

        def rename(values):
            return {name + evil: value for name, value in values.items()}

        records = [
            replace(
                r, name=r.name and r.name + evil, values=rename(r.values), errors=rename(r.errors)
            )
            for r in data.records
        ]
        scores = {
            split: {n: Score(rename(s.values), rename(s.errors)) for n, s in by_trial.items()}
            for split, by_trial in data.verdict.scores.items()
        }
        data = replace(
            data,
            study=evil,
            run=f"runs/{evil}",
            objectives=renamed,
            records=records,
            experts=tuple(name + evil for name in EXPERTS),
            verdict=replace(data.verdict, scores=scores),
            resolved={"name": evil},
            fingerprint={evil: evil},
        )
        write_report(data, tmp_path)
        page = Links((tmp_path / "report.html").read_text())
        assert "img" not in page.tags
        assert page.fetched == []
        assert page.tags.count("script") == 6  # plotly, drawing, the trials, three figures

    def test_passwords_do_not_reach_any_file(self, reports):
        folder = reports[2][1]
        for name in ("report.html", "report.json"):
            text = (folder / name).read_text()
            assert "hunter2" not in text
            assert "postgresql://me:***@db/x" in text

    def test_an_unfinished_study_has_a_report(self, tmp_path):
        data = make_study(2, 40, finished=False)
        write_report(data, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert "unfinished" in page
        assert "Best so far: trial" in page
        assert "Winner" not in page
        assert json.loads((tmp_path / "report.json").read_text())["winner"] is None

    @pytest.mark.parametrize("state", ["failed", "running"])
    def test_a_study_without_a_complete_trial_has_a_report(self, tmp_path, state):
        data = make_study(2, 12, finished=False)
        failure = Failure("lost", "worker died twice") if state == "failed" else None
        records = [
            replace(r, state=state, values={}, errors={}, failure=failure) for r in data.records
        ]
        write_report(replace(data, records=records), tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert "No trial is complete yet." in page
        assert ("worker died twice" in page) == (state == "failed")
        assert not list(tmp_path.glob("*.png"))

    def test_a_study_without_any_trial_has_a_report(self, tmp_path):
        write_report(replace(make_study(3, 8, finished=False), records=[]), tmp_path)
        assert "0 trials" in (tmp_path / "report.html").read_text()


class TestNumbers:
    @pytest.mark.parametrize("objectives", [1, 2, 3, 4])
    def test_report_json_agrees_with_the_records(self, reports, objectives):
        data, folder = reports[objectives]
        written = json.loads((folder / "report.json").read_text())
        complete = [r for r in data.records if r.state == "complete"]
        anchors = np.array(
            [to_losses(r.values, data.objectives) for r in complete if r.kind == "anchor"]
        )
        low = anchors.min(0)
        high = anchors.max(0)
        losses = np.array([to_losses(r.values, data.objectives) for r in complete])
        scaled = (losses - low) / (high - low)

        volumes = [
            hypervolume(scaled[: n + 1], np.full(objectives, 1.1)) for n in range(len(scaled))
        ]
        np.testing.assert_allclose(
            written["progress"]["hypervolume"], volumes, rtol=1e-9, atol=1e-12
        )
        if objectives == 1:
            best = np.maximum.accumulate([r.values["accuracy"] for r in complete])
        else:
            best = np.maximum.accumulate(1 - scaled.mean(axis=1))
            members = [complete[i].number for i in np.flatnonzero(nondominated(losses))]
            assert sorted(written["front"]) == members
        np.testing.assert_allclose(written["progress"]["best"], best, rtol=1e-12)
        for phase in ("merge", "evaluate", "overhead"):
            total = sum(r.seconds[phase] for r in data.records)
            assert written["seconds"][phase]["sum"] == pytest.approx(total)
        assert sum(phase["share"] for phase in written["seconds"].values()) == pytest.approx(1)
        failed = {r.number for r in data.records if r.state == "failed"}
        assert {n for group in written["failures"] for n in group["trials"]} == failed
        assert len(written["trials"]) == len(data.records)

    def test_the_comparison_is_winner_less_anchor_on_test_items(self):
        data = make_study(2)
        scores = data.verdict.scores["test"]
        ours = scores[data.winner.number]
        theirs = scores[data.best_anchor.number]
        accuracy, loss = compare(data)
        assert accuracy.improvement == pytest.approx(
            ours.values["accuracy"] - theirs.values["accuracy"]
        )
        assert loss.improvement == pytest.approx(
            theirs.values["cross_entropy"] - ours.values["cross_entropy"]
        )
        half = 1.96 * math.hypot(0.015, 0.015)
        assert accuracy.high - accuracy.improvement == pytest.approx(half)
        assert accuracy.optimism == pytest.approx(
            data.winner.values["accuracy"] - ours.values["accuracy"]
        )
        assert loss.optimism == pytest.approx(
            ours.values["cross_entropy"] - data.winner.values["cross_entropy"]
        )
        assert not accuracy.paired

    def test_the_interval_is_paired_where_items_are_known(self):
        rng = np.random.default_rng(1)
        data = make_study(1)
        hard = rng.random(ITEMS)
        items = {
            data.winner.number: {"accuracy": (hard < 0.8).astype(float)},
            data.best_anchor.number: {"accuracy": (hard < 0.7).astype(float)},
        }
        scores = {
            n: Score({"accuracy": s["accuracy"].mean()}, {"accuracy": 0.02})
            for n, s in items.items()
        }
        test = {**data.verdict.scores["test"], **scores}
        verdict = replace(data.verdict, scores={**data.verdict.scores, "test": test})
        (paired,) = compare(replace(data, verdict=verdict, items=items))
        (unpaired,) = compare(replace(data, verdict=verdict))
        difference = (
            items[data.winner.number]["accuracy"] - items[data.best_anchor.number]["accuracy"]
        )
        assert paired.paired
        assert paired.high - paired.low == pytest.approx(2 * 1.96 * difference.std(ddof=1) / 20)
        assert paired.high - paired.low < unpaired.high - unpaired.low
        # Items that do not average to the value say nothing of it.
        wrong = {n: {"accuracy": s["accuracy"] * (n + 1)} for n, s in items.items()}
        assert not compare(replace(data, verdict=verdict, items=wrong))[0].paired

    def test_the_best_anchor_is_best_on_validation_items(self):
        data = make_study(1)
        validation = {
            n: s.values["accuracy"]
            for n, s in data.verdict.scores["validation"].items()
            if n < len(ANCHORS)
        }
        assert data.best_anchor.number == max(validation, key=validation.get)
        unfinished = replace(data, verdict=None)
        search = {r.number: r.values["accuracy"] for r in data.anchors}
        assert unfinished.best_anchor.number == max(search, key=search.get)

    def test_a_given_normaliser_is_used(self):
        data = make_study(2, finished=False)
        wide = Normaliser(np.array([-2.0, 0.0]), np.array([0.0, 4.0]))
        np.testing.assert_allclose(
            replace(data, scale=wide).complete.scalars,
            0.5 * wide.normalise(data.complete.losses).sum(axis=1),
        )

    def test_best_so_far_carries_the_error_of_the_trial_that_reached_it(self):
        data = make_study(1, 30, finished=False)
        records = [
            replace(r, errors={"accuracy": r.number / 1000}) if r.values else r
            for r in data.records
        ]
        course = progress(replace(data, records=records))
        holders = [
            max(course.numbers[: n + 1], key=lambda t: records[t].values["accuracy"])
            for n in range(len(course.numbers))
        ]
        np.testing.assert_allclose(course.errors, np.array(holders) / 1000)

    def test_workers_idle_between_trials_but_not_between_sessions(self):
        record = make_study(1, 8).records[0]
        # One worker: 2 s of work in 4 s. After a day's break a new process: 3 s of work without a
        # pause.
        spans = [("a", 101.0, 1.0), ("a", 104.0, 1.0), ("b", 90002.0, 1.0), ("b", 90004.0, 2.0)]
        records = [
            replace(record, worker=w, finished=end, seconds={"evaluate": s}) for w, end, s in spans
        ]
        data = make_study(1, 8)
        assert busy_share(replace(data, records=records)) == pytest.approx(5 / 7)
        assert busy_share(replace(data, records=[replace(record, worker="", finished=0.0)])) is None

    def test_failures_that_differ_only_in_numbers_are_one_line(self):
        data = make_study(2)
        groups = failures(data)
        assert sorted(group.kind for group in groups) == ["error", "infeasible"]
        for group in groups:
            expected = [
                r.number
                for r in data.records
                if r.failure is not None and r.failure.kind == group.kind
            ]
            assert list(group.trials) == expected
            assert group.message == data.by_number[expected[0]].failure.message


class TestHeatMap:
    def test_means_agree_with_a_loop_over_single_positions(self):
        layout = vit_layout(3, 4)
        rng = np.random.default_rng(3)
        inner = np.sort(rng.choice(np.arange(1, layout.size), 40, replace=False))
        field = Field(np.array([0, *inner, layout.size]), rng.normal(size=(2, 41)))
        names, means = block_means(field, layout)
        assert names == ("embedding", "block 0", "block 1", "block 2", "final", "head")
        values = field.at(np.arange(layout.size))
        word = {"embedding": "embeddings", "final": "vit.layernorm", "head": "classifier"}
        for column, name in enumerate(names):
            pattern = word.get(name, f"layer.{name[-1]}.")
            positions = [
                p for s in layout.tensors if pattern in s.name for p in range(s.start, s.stop)
            ]
            np.testing.assert_allclose(
                means[:, column], values[:, positions].mean(axis=1), rtol=1e-12
            )

    def test_constant_coefficients_stay_exact(self):
        layout = vit_layout()
        _, means = block_means(Field.constant(layout.size, [0.3, -0.7]), layout)
        np.testing.assert_allclose(means, np.broadcast_to([[0.3], [-0.7]], means.shape), rtol=1e-15)

    def test_without_a_layout_columns_are_segments(self):
        data = replace(make_study(1, 12), layout=None)
        table = heat_map(data)
        np.testing.assert_array_equal(table.values, data.leading.recipe.field.values)
        assert table.columns[-1] == f"segment {table.values.shape[1] - 1}"

    def test_without_numbered_blocks_columns_are_modules(self):
        layout = Layout.build(
            {"embeddings.weight": ((4, 4), "float32"), "classifier.weight": ((2, 4), "float32")}
        )
        names, means = block_means(
            Field(np.array([0, 64, layout.size]), np.array([[1.0, 2.0]])), layout
        )
        assert dict(zip(names, means[0], strict=True)) in (
            {"embedding": 2.0, "head": 1.0},
            {"embedding": 1.0, "head": 2.0},
        )

    def test_more_directions_than_experts_are_numbered(self):
        data = replace(make_study(1, 12), experts=("one", "two"))
        assert heat_map(data).rows == ("direction 0", "direction 1", "direction 2", "direction 3")


class TestTable:
    def test_rows_are_the_anchors_then_the_winner(self):
        data = make_study(2)
        rows = result_table(data)
        assert [row.name for row in rows] == [*ANCHORS, "search"]
        assert [row.winner for row in rows] == [False] * len(ANCHORS) + [True]
        assert sum(row.best_anchor for row in rows) == 1
        assert all(set(row.scores) == {"search", "validation", "test"} for row in rows)

    def test_an_anchor_that_wins_is_one_row_with_both_marks(self):
        data = make_study(1)
        number = data.best_anchor.number
        data = replace(data, verdict=replace(data.verdict, winner=number))
        rows = result_table(data)
        assert len(rows) == len(ANCHORS)
        assert rows[number].marks == "winner, best anchor"
        assert "no trial beat it" in sentences(data)[0]

    def test_a_failed_anchor_is_listed_as_failed(self):
        data = make_study(1, finished=False)
        failed = replace(
            data.records[2], state="failed", values={}, errors={}, failure=Failure("error", "boom")
        )
        row = result_table(replace(data, records=[*data.records[:2], failed, *data.records[3:]]))[2]
        assert row.marks == "failed"
        assert row.scores == {}

    def test_text_lines_are_aligned_and_rich_shows_the_same_cells(self):
        from rich.console import Console

        data = make_study(2)
        lines = text_lines(data)
        assert len(lines) == 1 + 2 * (len(ANCHORS) + 1)
        column = lines[0].index("search") + len("search")
        assert all(line[column : column + 2].strip() == "" for line in lines)
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(rich_table(data))
        shown = console.export_text()
        for word in " ".join(lines[1:]).split():
            assert word in shown

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (0.84213, 0.0123, "0.842 ± 0.012"),
            (0.84213, None, "0.8421"),
            (0.84213, 0.0, "0.8421"),
            (12.3456, 2.5, "12.3 ± 2.5"),
            (0.8, 0.00996, "0.800 ± 0.010"),
            (1234.5, 30.0, "1234 ± 30"),
            (math.inf, 0.1, "inf"),
            (0.5, math.nan, "0.5"),
        ],
    )
    def test_standard_errors_decide_the_digits(self, value, error, text):
        assert plus_minus(value, error) == text


def test_secrets_are_masked_wherever_they_stand():
    given = {
        "storage": "postgresql://me:pa:ss@db/x",
        "hub_token": "hf_abc",
        "max_tokens": 5,
        "list": [{"password": "x"}, "redis://:secret@h"],
        "plain": "http://h:80/x",
    }
    assert without_secrets(given) == {
        "storage": "postgresql://me:***@db/x",
        "hub_token": "***",
        "max_tokens": 5,
        "list": [{"password": "***"}, "redis://:***@h"],
        "plain": "http://h:80/x",
    }


def test_as_json_survives_a_round_trip():
    content = as_json(make_study(2, 30))
    assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize("idle", [(), ("mirrored",), ("upright", "inverted")])
def test_experts_that_hardly_count_are_named(idle: tuple[str, ...]) -> None:
    data = make_study(1, 20)
    kept = kept_of(data)
    values = np.full((4, 3), 0.5)
    for name in idle:
        values[EXPERTS.index(name)] = (0.0, -0.01, 0.02)
    table = HeatMap(7, EXPERTS, ("block 0", "block 1", "block 2"), values)
    said = [
        line
        for line in sentences(replace(data, kept=replace(kept, coefficients=table)))
        if "hardly" in line
    ]
    below = "(coefficients below 5% of the largest in every block)"
    expected = {
        0: [],
        1: [f"Expert mirrored hardly counts in trial 7 {below}."],
        2: [f"2 experts of 4 hardly count in trial 7 {below}: upright, inverted."],
    }
    assert said == expected[len(idle)]


def test_trials_cost_beside_what_the_anchors_had_led_to_expect(tmp_path):
    data = make_study(1)
    write_report(data, tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())["predicted_trials"]
    anchors = [record for record in data.records if record.kind == "anchor"]
    evaluate = np.mean([record.seconds["evaluate"] for record in anchors])
    assert (told["anchors"], told["trials"]) == (len(ANCHORS), len(data.records))
    assert told["each"]["evaluate"] == pytest.approx(evaluate)
    page = (tmp_path / "report.html").read_text()
    assert f"{len(data.records) * evaluate:.1f} s</td>" in page
    assert forecast(replace(data, records=anchors)) is None
