"""Whole studies on pretend cards find what studies in main memory find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.merging.models.hidden_states.store import HiddenStore
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.workers.backends.ray_pool import RayPool
from tests.cluster import Cluster
from tests.pretend.device import Cards
from tests.search.conftest import model_study
from tests.search.studies import fingerprint, spec_of

ON_CARD = {"backend": "inline", "gpus": 1}
ON_HOST = {"backend": "inline"}


@pytest.fixture(scope="module")
def study(pico_models: Path, pico_items: Path) -> dict[str, Any]:
    budget = {"budget": {"trials": 8}, "selection": {"leaders": 1}}
    return model_study(pico_models, pico_items, **budget)


def run(study: dict[str, Any], folder: Path, workers: dict[str, Any]) -> Run:
    return run_study(spec_of(study | {"workers": workers}, folder.parent), folder)


@pytest.fixture(scope="module")
def in_main_memory(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(study, tmp_path_factory.mktemp("host") / "run", ON_HOST)


def test_a_study_on_a_card_is_that_in_main_memory(
    cards: Cards, study: dict[str, Any], in_main_memory: Run, tmp_path: Path
) -> None:
    with cards.counting() as counted, cards.peak() as peak:
        found = run(study, tmp_path / "run", ON_CARD)
    assert fingerprint(found) == fingerprint(in_main_memory)
    assert found.verdict is not None
    assert in_main_memory.verdict is not None
    assert found.verdict.winner == in_main_memory.verdict.winner
    assert counted.operations > 500
    assert cards.counters(1).operations == 0
    assert cards_of(found) == {"pretend card 0"}
    # Base, two experts and merged weights at least.
    weights = (Path(study["base"]) / "model.safetensors").stat().st_size
    assert 3 * weights < peak[0] < 12 * weights


def test_a_card_that_breaks_ends_the_study_and_the_same_command_ends_it_well(
    cards: Cards, study: dict[str, Any], in_main_memory: Run, tmp_path: Path
) -> None:
    cards.break_after(1000)
    with pytest.raises(StudyFailedError, match="illegal memory access"):
        run(study, tmp_path / "run", ON_CARD)
    cards.reset()
    assert fingerprint(run(study, tmp_path / "run", ON_CARD)) == fingerprint(in_main_memory)


@pytest.fixture(scope="session")
def cluster_with_cards(request: pytest.FixtureRequest) -> Cluster:
    """The cluster, whose workers have a pretend card for each GPU that it has in name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEND_CARDS", "4")
        cluster: Cluster = request.getfixturevalue("cluster")
    return cluster


@pytest.fixture
def all_loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the workers of every pool, which gets its first trial once all of them have loaded.

    A study begins with the first one, which may be done before another has loaded.
    """
    begin = RayPool.__init__
    found: list[int] = []

    def begin_with_all(pool: RayPool, *arguments: Any, **named: Any) -> None:
        begin(pool, *arguments, **named)
        found.extend(pool.pids())

    monkeypatch.setattr(RayPool, "__init__", begin_with_all)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_of_a_cluster_have_cards_of_their_own(
    cluster_with_cards: Cluster,
    study: dict[str, Any],
    in_main_memory: Run,
    all_loaded: list[int],
    tmp_path: Path,
) -> None:
    address = cluster_with_cards.address
    workers = {"count": 2, "gpus": 1, "address": address, "cache": str(tmp_path / "cache")}
    found = run(study, tmp_path / "run", workers)
    assert len(set(all_loaded)) == 2
    host = {each.recipe.digest: each.values for each in in_main_memory.log.records}
    same = [each for each in found.log.records if each.recipe.digest in host]
    assert same
    assert all(each.values == host[each.recipe.digest] for each in same)
    assert len(found.log.records) == len(in_main_memory.log.records)
    assert len({each.worker for each in found.log.records}) == 2
    assert len(cards_of(found)) == 2


def cards_of(run: Run) -> set[str | None]:
    """Names of the devices that trials ran on."""
    names = {device.name for device in run.folder.devices().values()}
    assert all(name is not None and name.startswith("pretend card ") for name in names)
    return names


@pytest.mark.slow
def test_lower_blocks_of_a_model_on_a_card_need_not_run_again(
    cards: Cards, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[HiddenStore] = []
    make = HiddenStore.__init__

    def remember(store: HiddenStore, limit: int) -> None:
        make(store, limit)
        stores.append(store)

    monkeypatch.setattr(HiddenStore, "__init__", remember)
    refining = study | {"strategy": "block_coordinate", "budget": {"trials": 40}}
    whole = run(refining, tmp_path / "host" / "run", ON_HOST | {"hidden_states_gb": 0})
    assert not stores
    found = run(refining, tmp_path / "card" / "run", ON_CARD)
    assert cards_of(found) == {"pretend card 0"}
    assert sum(store.found for store in stores) > 0
    assert fingerprint(found) == fingerprint(whole)
