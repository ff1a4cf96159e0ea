"""Plug-ins: a package adds one of each, and a broken one gives one clear line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging.extensions.used_plugins import UsedPlugin, demand
from tests.plugins.installing import TINY, describe, forget, install
from tests.search.cli.test_cli import mergesearch, refused
from tests.search.studies import analytic, write_study
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[3]
BASE = "mergesearch."


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on this process's path; what is imported from it is forgotten."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget()


@pytest.fixture
def tiny(site: Path) -> Path:
    return install(site)


def tiny_study(models: Path, **sections: Any) -> dict[str, Any]:
    """A study that uses all that the plug-in adds."""
    data: dict[str, Any] = {
        "name": "tiny",
        "base": str(models / "base"),
        "experts": {"left": str(models / "left"), "right": str(models / "right")},
        "operator": {"name": "median", "share": 0.5},
        "strategy": {"name": "walk", "step": 0.2},
        "space": {"kind": "capped", "options": {"high": 0.5}},
        "evaluators": [{"kind": "smallness", "wanted": 0.2}],
        "budget": {"trials": 12},
        "selection": {"leaders": 1},
    }
    return data | sections


def small(**sections: Any) -> dict[str, Any]:
    return analytic(trials=6, dim=2, **sections)


# --- a package that adds one of each -------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("operators", "median"),
        ("strategies", "walk"),
        ("evaluators", "smallness"),
        ("spaces", "capped"),
    ],
)
def test_ls_lists_what_a_package_adds(what: str, name: str, tiny: Path) -> None:
    code, out, _ = mergesearch("ls", what, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows[name]["plugin"] == "tiny-plugin 1.0"
    assert [row["name"] for row in rows.values() if "plugin" in row] == [name]
    assert "plug-in of tiny-plugin 1.0" in mergesearch("ls", what)[1]


def test_check_shows_it_and_a_run_records_it(
    tiny: Path, tmp_path: Path, pico_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tiny_study(pico_models), tmp_path)
    code, out, err = mergesearch("check", study)
    assert code == 0, err
    assert "plug-in     operator 'median' of tiny-plugin 1.0" in out
    assert out.count("plug-in ") == 4
    run = tmp_path / "run"
    code, _, err = mergesearch("run", study, "--run", run, "--progress", "quiet")
    assert code == 0, err
    recorded = json.loads((run / "environment.json").read_text())["plugins"]
    assert {entry["name"] for entry in recorded} == {"median", "walk", "smallness", "capped"}
    assert {(entry["package"], entry["version"]) for entry in recorded} == {("tiny-plugin", "1.0")}
    # The same code resumes; another version does not; without the package what the run shows is
    # read all the same, and nothing goes on.
    assert mergesearch("run", study, "--run", run, "--progress", "quiet")[0] == 0
    (tiny / "tiny_plugin-1.0.dist-info").rename(tiny / "away")
    (tiny / "tiny_plugin-1.1.dist-info").mkdir()
    for name in ("METADATA", "entry_points.txt"):
        text = (tiny / "away" / name).read_text().replace("Version: 1.0", "Version: 1.1")
        (tiny / "tiny_plugin-1.1.dist-info" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "other")  # the path is read again
    line = refused("run", study, "--run", run, "--progress", "quiet")
    assert "expected the code that the recorded trials used (1.0), received another (1.1)" in line
    assert mergesearch("show", run)[0] == 0
    shutil.rmtree(tiny / "tiny_plugin-1.1.dist-info")
    monkeypatch.syspath_prepend(tmp_path / "third")
    assert mergesearch("show", run)[0] == 0
    for verb in (("export", run, "--out", tmp_path / "out"), ("run", study, "--run", run)):
        line = refused(*verb)
        assert line.endswith("received none; `pip install tiny-plugin==1.0`")


@pytest.mark.slow
def test_a_real_process_finds_it(tmp_path: Path, pico_models: Path) -> None:
    site = install(tmp_path / "site")
    study = write_study(tiny_study(pico_models), tmp_path)
    done = _process(site, "run", str(study), "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "Winner" in done.stdout


@pytest.mark.slow
def test_pip_installs_it_and_rays_workers_use_it(tmp_path: Path, pico_models: Path) -> None:
    """From a fresh folder, as a package of the index would be."""
    source = tmp_path / "source"
    shutil.copytree(TINY, source, ignore=shutil.ignore_patterns("__pycache__"))
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    study = write_study(tiny_study(pico_models), tmp_path)
    done = _process(
        site, "run", str(study), "--run", str(tmp_path / "run"), "--set", "workers.count=1"
    )
    assert done.returncode == 0, done.stderr
    assert "Winner" in done.stdout


def _process(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-m", "mergesearch", *arguments],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
        timeout=PATIENT,
    )


def test_workers_demand_the_same_version(tiny: Path) -> None:
    used = UsedPlugin("operators", "median", "tiny-plugin", "0.9")
    demand([used], "here", any_version=True)
    with pytest.raises(
        Exception,
        match=r"^workers on n: expected operator 'median' of tiny-plugin "
        r"0\.9, which the study uses, received 1\.0; `pip install",
    ):
        demand([used], "workers on n")


# --- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"operator": {"name": "median", "share": 0}}, "greater than 0, received 0"),
        ({"strategy": {"name": "walk", "stride": 1}}, "strategy.stride: unknown option of walk"),
        (
            {"evaluators": [{"kind": "smallness", "wantd": 1}]},
            "evaluators.0.wantd: unknown key; did you mean 'wanted'? known: kind, wanted",
        ),
        (
            {"evaluators": [{"kind": "smallness", "wanted": "x"}]},
            "evaluators.0.wanted: input should be a valid number",
        ),
        ({"space": {"kind": "caped"}}, "space.kind: expected one of ['capped'], received 'caped'"),
        (
            {"space": {"kind": "groups"}},
            "space.kind: expected one of ['capped'], received 'groups'",
        ),
        (
            {"space": {"kind": "capped", "options": {"low": 1}}},
            "space.options: expected high, received 'low'",
        ),
        (
            {"space": {"kind": "capped", "granularity": "block"}},
            "space.granularity: means nothing to strategy walk; keys of its space: kind, options",
        ),
    ],
)
def test_wrong_options_are_refused_before_weights_are_read(
    sections: dict[str, Any], message: str, tiny: Path, tmp_path: Path, pico_models: Path
) -> None:
    study = write_study(tiny_study(pico_models, **sections), tmp_path)
    assert message in refused("check", study)


#: Group, entry point, study that uses it, what is said.
BROKEN = {
    "import error": (
        "operators",
        "median",
        "no_such_module:X",
        {"operator": "median"},
        (
            "operator 'median' of bad 2.0: expected no_such_module:X to be imported, received "
            "ModuleNotFoundError"
        ),
    ),
    "no operator": (
        "operators",
        "median",
        "json:dumps",
        {"operator": "median"},
        (
            "operator 'median' of bad 2.0: expected an Operator or a class with a method prepare, "
            "received dumps"
        ),
    ),
    "no strategy": (
        "strategies",
        "walk",
        "json:JSONDecoder",
        {"strategy": "walk"},
        (
            "strategy 'walk' of bad 2.0: expected a StrategyInfo or a class with ask, tell, best, "
            "needs, recommends, received JSONDecoder without ask"
        ),
    ),
    "no evaluator": (
        "evaluators",
        "smallness",
        "json:dumps",
        {"evaluators": [{"kind": "smallness"}]},
        (
            "evaluator 'smallness' of bad 2.0: expected a pydantic model with kind: "
            "Literal['smallness'] and a method build, received dumps"
        ),
    ),
    "no space": (
        "spaces",
        "capped",
        "json:dumps",
        {"space": {"kind": "capped"}},
        "space 'capped' of bad 2.0: expected a SpaceKind, received function",
    ),
    "name of an operator": (
        "operators",
        "ties",
        "json:dumps",
        {"operator": "ties"},
        (
            "operator 'ties' of bad 2.0: expected a name that is free, received that of a built-in "
            "operator; rename the entry point, or uninstall the package"
        ),
    ),
    "name of a strategy": (
        "strategies",
        "sobol",
        "json:dumps",
        {"strategy": "sobol"},
        "strategy 'sobol' of bad 2.0: expected a name that is free",
    ),
    "name of an evaluator": (
        "evaluators",
        "synthetic",
        "json:dumps",
        {},
        "evaluator 'synthetic' of bad 2.0: expected a name that is free",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_gives_one_line(case: str, site: Path, tmp_path: Path) -> None:
    kind, name, value, sections, message = BROKEN[case]
    describe(site, "bad", "2.0", {BASE + kind: {name: value}})
    importlib.invalidate_caches()
    study = write_study(small(**sections), tmp_path)
    assert message in refused("check", study)
    # Everything else goes on, and `ls` says what is wrong.
    code, out, err = mergesearch("ls", kind)
    assert code == 0, err
    assert f"cannot be used: {message}" in out


def test_two_packages_of_one_name_are_refused(site: Path, tmp_path: Path) -> None:
    for package in ("one", "two"):
        describe(site, package, "1.0", {"mergesearch.strategies": {"walk": "json:dumps"}})
    study = write_study(small(strategy="walk"), tmp_path)
    message = "strategy 'walk': expected one package that adds it, received one 1.0 and two 1.0"
    assert message in refused("check", study)
    assert message in mergesearch("ls", "strategies")[1]


def test_a_broken_plugin_does_not_disturb_others(site: Path, tmp_path: Path) -> None:
    describe(site, "bad", "2.0", {"mergesearch.operators": {"median": "no_such_module:X"}})
    assert mergesearch("check", write_study(small(), tmp_path))[0] == 0
