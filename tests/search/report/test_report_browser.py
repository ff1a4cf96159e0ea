"""The report in a real browser: clicks, keys, and a phone's width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.search.record.trial_record import TrialSummary
from mergesearch.search.report.coefficients import with_kept
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import Between
from mergesearch.search.report.page.panel import panel_data
from mergesearch.search.report.page.runs_page import runs_page
from mergesearch.search.report.preference import preferred
from mergesearch.search.report.writing import write_report
from tests.browser import CHROMIUM, Browser, browsing
from tests.search.report.test_between import study
from tests.search.report.test_report import make_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    pytest.mark.xdist_group("report in a browser"),
]
DESK = 1400
PHONE = 390

#: The place of a trial's point in the window, in the first panel that has it.
PLACE = """(() => {
  const div = document.getElementById("%s");
  div.scrollIntoView({block: "center"});
  const box = div.getBoundingClientRect();
  for (const trace of div._fullData) {
    const at = trace.customdata ? trace.customdata.indexOf(%d) : -1;
    if (at < 0 || trace.type !== "scatter") { continue; }
    const x = div._fullLayout[trace.xaxis.replace("x", "xaxis")];
    const y = div._fullLayout[trace.yaxis.replace("y", "yaxis")];
    return [box.left + x._offset + x.c2p(trace.x[at]), box.top + y._offset + y.c2p(trace.y[at])];
  }
})()"""

#: Elements that hold text of their own and the contrast of each, below what WCAG 2 AA asks for.
FAINT = """(() => {
  const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map(
    (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce(
    (sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parsed(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) { return colour; }
    }
    return [255, 255, 255];
  };
  const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll("main *")].filter(
    (e) => !e.closest("svg, script, option, optgroup") && own(e) && e.getClientRects().length).map(
    (e) => {
      const style = getComputedStyle(e), a = light(parsed(style.color)), b = light(behind(e));
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      return {text: e.textContent.slice(0, 40), ratio, least: large ? 3 : 4.5};
    }).filter((each) => each.ratio < each.least);
})()"""

#: Text that reaches beyond the window, but for boxes that scroll.
CUT = """[...document.querySelectorAll("main *")].filter(
  (e) => !e.closest(".scroll, pre, svg") && e.getClientRects().length
  && e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"""

#: Everything that can be focused, and of it what has the focus.
CONTROLS = """[...document.querySelectorAll(
  "button, input, select, summary, a[href], [tabindex='0']")].filter(
  (e) => e.getClientRects().length && !e.disabled
  && (e.tagName === "SUMMARY" || !e.closest("details:not([open])")))"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[ReportData, str]]:
    written = {}
    for objectives in (1, 2, 3, 4):
        data = make_study(objectives, 90)
        folder = tmp_path_factory.mktemp(f"study{objectives}")
        write_report(data, folder)
        written[objectives] = (data, f"file://{folder}/report.html")
    return written


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(browser, studies, tmp_path):
    """Opens the report of a study; a picture of how it was left is kept."""

    def opened(objectives: int, width: int) -> ReportData:
        data, url = studies[objectives]
        browser.open(url, width)
        browser.until("document.querySelector('#told h3') !== null")
        return data

    yield opened
    browser.picture(tmp_path / "report.png", whole=True)
    assert browser.complaints == []
    assert [
        url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))
    ] == []


def loneliest(data: ReportData) -> TrialSummary:
    """The member of the front, other than the winner, that is farthest from all other points."""
    if len(data.objectives) == 1:
        return data.front[-1]
    names = [objective.name for objective in data.objectives[:2]]
    points = np.array([[r.values[name] for name in names] for r in data.complete.records])
    scaled = points / np.ptp(points, axis=0)
    distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = dict(zip((r.number for r in data.complete.records), distances.min(1), strict=True))
    others = (record for record in data.front if record is not data.winner)
    return max(others, key=lambda record: nearest[record.number])


def told(browser: Browser) -> str:
    return str(browser.run("document.getElementById('told').innerText"))


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize(("objectives", "name"), [(1, "progress"), (2, "front"), (4, "front")])
def test_a_click_on_a_point_fills_the_panel(shown, browser, objectives, name, width):
    data = shown(objectives, width)
    assert f"trial {data.winner.number} · winner" in told(browser)
    alone = loneliest(data)
    browser.click(*browser.run(PLACE % (name, alone.number)))
    browser.until(
        f"document.querySelector('#told h3').textContent.startsWith('trial {alone.number} ')"
    )
    text = told(browser)
    assert f"mergesearch export {data.run} --trial {alone.number} --out" in text
    assert f"mergesearch recipe {data.run} --trial {alone.number}" in text
    assert all(expert in text for expert in data.experts)
    place = alone.number if name == "progress" else alone.values["accuracy"]
    browser.until(
        f"document.getElementById('{name}').data.some("
        f"(t) => t.hoverinfo === 'skip' && t.x.length === 1 && t.x[0] === {place!r})"
    )
    panel = browser.run(
        "(() => { const b = document.getElementById('panel').getBoundingClientRect();"
        " return [b.top, b.bottom, b.right]; })()"
    )
    assert panel[0] < 900
    assert panel[1] > 0
    assert panel[2] <= width


def test_a_click_in_the_cube_fills_the_panel(shown, browser):
    data = shown(3, DESK)
    other = next(r for r in data.front if r is not data.winner)
    # What plotly calls when a point under the mouse is clicked: there, it is read from the card.
    event = f"{{points: [{{customdata: {other.number}}}]}}"
    browser.run(f"document.getElementById('front').emit('plotly_click', {event})")
    assert told(browser).startswith(f"trial {other.number} ")


def test_a_command_is_copied(shown, browser):
    shown(2, DESK)
    x, y = browser.run(
        "(() => { const b = document.querySelector('#told button').getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    browser.run("document.querySelector('#told button').scrollIntoView()")
    x, y = browser.run(
        "(() => { const b = document.querySelector('#told button').getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    browser.click(x, y)
    browser.until("document.querySelector('#told button').textContent === 'copied'")


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_runs_are_compared_in_one_picture(browser, studies, tmp_path, width):
    runs = [replace(studies[3][0], run="runs/first"), replace(make_study(3, seed=1), run="second")]
    (tmp_path / "compare.html").write_text(runs_page(runs))
    browser.open(f"file://{tmp_path}/compare.html", width)
    browser.until("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length === 6")
    browser.picture(tmp_path / "compare.png", whole=True)
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(CUT) == []
    assert browser.run(FAINT) == []


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_weights_show_what_is_expected_between_the_trials(browser, tmp_path, width):
    data = study(3, noise=0.01)
    write_report(data, tmp_path)
    browser.open(f"file://{tmp_path}/report.html", width)
    browser.until("document.querySelector('#between details') !== null")
    browser.run("document.querySelector('#between summary').click()")
    shown = panel_data(with_kept(data))["between"]["expected"]
    rows = "[...document.querySelectorAll('#between tr')].map((r) => r.cells[1].textContent)"
    for m in range(3):
        set_slider = """(() => { const all = document.querySelectorAll('#weights input');
          all.forEach((each, m) => { each.value = m === %d ? 100 : 0; });
          all[0].dispatchEvent(new Event("input")); })()"""
        browser.run(set_slider % m)
        row = next(each for each in shown if each["w"][m] == 1)
        assert browser.run(rows)[:3] == row["v"]
        text = browser.run("document.querySelector('#between').innerText")
        assert "expected, not measured" in text
        assert f"{data.objectives[m].name} 100 %" in text
        assert row["x"] in text
    assert browser.run(CUT) == []
    assert browser.run(FAINT) == []
    browser.picture(tmp_path / "between.png", whole=True)
    assert browser.complaints == []


def test_where_nothing_is_expected_the_page_says_why(browser, tmp_path):
    data = with_kept(study(3, noise=0.01))
    why = "trials that were left out are predicted hardly better than by a mean: <b>"
    data = replace(data, kept=replace(data.kept, between=Between(why=why)))
    write_report(data, tmp_path)
    browser.open(f"file://{tmp_path}/report.html", DESK)
    browser.until("document.querySelector('#between p') !== null")
    told = browser.run("document.querySelector('#between').textContent")
    assert told == f"Between the trials nothing is expected: {why}."


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_weights_pick_the_compromise_that_prefer_finds(shown, browser, objectives):
    data = shown(objectives, DESK)
    names = [objective.name for objective in data.objectives]
    for only in range(objectives):
        for m in range(objectives):
            browser.run(f"document.querySelectorAll('#weights input')[{m}].focus()")
            browser.press("End" if m == only else "Home")
        expected = preferred(data, [f"{names[only]}=1"]).number
        assert browser.run("document.getElementById('compromise').textContent").endswith(
            f"trial {expected}."
        )
        assert told(browser).startswith(f"trial {expected} ")
    browser.press("Home")
    assert "at least one" in browser.run("document.getElementById('compromise').textContent")


@pytest.mark.parametrize(("objectives", "name"), [(3, "pairs"), (4, "front")])
def test_what_is_brushed_in_one_panel_stands_out_in_all(shown, browser, objectives, name):
    shown(objectives, DESK)
    corner, other = browser.run(f"""(() => {{
      const div = document.getElementById("{name}");
      div.scrollIntoView({{block: "center"}});
      const box = div.getBoundingClientRect(), x = div._fullLayout.xaxis, y = div._fullLayout.yaxis;
      const left = box.left + x._offset, top = box.top + y._offset;
      return [[left + 0.5 * x._length, top + 3], [left + x._length - 3, top + y._length - 3]];
    }})()""")
    browser.drag(corner, other)
    browser.until(
        f"document.getElementById('{name}').data.every((t) => t.selectedpoints || !t.customdata)"
    )
    chosen = browser.run(f"""document.getElementById("{name}").data.filter((t) => t.customdata).map(
      (t) => [t.name, t.selectedpoints.map((at) => t.customdata[at])])""")
    by_class: dict[str, list[list[int]]] = {}
    for kind, numbers in chosen:
        by_class.setdefault(kind, []).append(numbers)
    for panels in by_class.values():
        assert len(panels) == objectives * (objectives - 1) // 2
        assert all(numbers == panels[0] for numbers in panels)
    count = sum(len(panels[0]) for panels in by_class.values())
    assert 0 < count < 80


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_nothing_is_cut_on_a_phone(shown, browser, objectives):
    shown(objectives, PHONE)
    assert browser.run("document.documentElement.scrollWidth") == PHONE
    assert browser.run(CUT) == []
    row = browser.run(
        "[...document.querySelectorAll('.results tr.winner td')].map((e) => {"
        " const b = e.getBoundingClientRect(); return [b.left, b.right, b.height]; })"
    )
    assert row
    assert all(left >= 0 and right <= PHONE and height > 0 for left, right, height in row)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(shown, browser, dark):
    browser.dark(dark)
    try:
        shown(2, DESK)
        assert browser.run(FAINT) == []
    finally:
        browser.dark(False)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_keyboard_reaches_every_control(shown, browser, width):
    shown(3, width)
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    browser.run(f"{CONTROLS}.forEach((e, i) => {{ e.dataset.order = i; }})")
    count = browser.run(f"{CONTROLS}.length")
    reached = set()
    for _ in range(count + 5):
        browser.press("Tab")
        reached.add(browser.run("document.activeElement.dataset.order"))
    missed = set(map(str, range(count))) - reached
    assert missed == set(), browser.run(
        f"{CONTROLS}.filter((e) => {json.dumps(sorted(missed))}.includes(e.dataset.order))"
        ".map((e) => e.outerHTML.slice(0, 100))"
    )
