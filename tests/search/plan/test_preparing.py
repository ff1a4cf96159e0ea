"""How long studies of real shapes prepare, from sparse headers and given rates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.effort import preparation_seconds
from mergesearch.merging.family.family import align_family
from mergesearch.merging.family.rates import CARD_RATES, Rates
from mergesearch.merging.operators import get_operator
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.tensors.layout import Layout
from mergesearch.search.plan.cards import KNOWN_CARDS, PlannedCard
from mergesearch.search.plan.preparing import (
    CORE_RATES,
    card_rates,
    duration,
    preparing_line,
    preparing_of,
)
from tests.headers import LLAMA_8B, write_llama

H200 = KNOWN_CARDS["h200-141"]
#: Half as fast as the core that decides whether measuring is worth it.
SLOW = Rates(1e9, multiply=45e9, multiply_wide=20e9, few=4e9, every=2e9, measured=True)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    base = open_checkpoint(str(write_llama(tmp_path_factory.mktemp("8b"), LLAMA_8B)))
    return align_family(base, [base], TensorPolicies()).layout


def study(layout: Layout | None, operator: str, threads: int = 1) -> Any:
    """What an estimate looks at in a plan: 8B and four experts."""
    workers = SimpleNamespace(threads=threads, prepare="cpu", address=None)
    template = SimpleNamespace(operator=operator, options={}, experts=range(4))
    return SimpleNamespace(layout=layout, template=template, spec=SimpleNamespace(workers=workers))


def never() -> Rates:
    raise AssertionError("measured without need")


def test_8b_and_four_experts_by_tsv_take_hours_or_minutes(layout: Layout) -> None:
    found = preparing_of(study(layout, "tsv"), H200, lambda: SLOW)
    assert found is not None
    assert found.measured
    tsv = get_operator("tsv")
    assert found.seconds == preparation_seconds(tsv, layout, 4, SLOW)
    assert found.card_seconds == preparation_seconds(tsv, layout, 4, CARD_RATES["h200-141"])
    # Pinned: rates are given, so that only a change of what is counted can move them.
    assert preparing_line(found) == (
        "preparing   about 9.8 h on 1 core of this machine, "
        "about 17 min on h200-141 (workers.prepare: card)"
    )


def test_nothing_is_measured_where_an_operator_only_reads(layout: Layout) -> None:
    found = preparing_of(study(layout, "ties"), PlannedCard("96 GB", 96 * 10**9), never)
    assert found is not None
    assert found.seconds == preparation_seconds(get_operator("ties"), layout, 4, CORE_RATES)
    assert preparing_line(found) == (
        "preparing   about 2 min on 1 core of this machine, no rates of 96 GB are known"
    )
    small = Layout.build({"w": ((8, 32), "bfloat16")})
    few = preparing_of(study(small, "tsv"), None, never)
    assert few is not None
    assert preparing_line(few) == "preparing   less than 10 s on 1 core of this machine"
    assert preparing_of(study(None, "tsv"), H200, never) is None


def test_runs_of_the_experts_come_on_top(layout: Layout) -> None:
    found = preparing_of(study(layout, "regmean"), None, lambda: SLOW)
    assert found is not None
    assert preparing_line(found).endswith(", beside what the operator runs on its items")


def test_cards_are_known_by_the_names_that_torch_has_for_them() -> None:
    for key in CARD_RATES:
        assert card_rates(KNOWN_CARDS[key]) is CARD_RATES[key]
    for name, key in {
        "NVIDIA H200": "h200-141",
        "NVIDIA H100 80GB HBM3": "h100-80",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA B200": "b200-192",
    }.items():
        assert card_rates(PlannedCard(name, 10**11)) == CARD_RATES[key]
    assert card_rates(PlannedCard("NVIDIA GH200 480GB", 10**11)) is None


def test_durations_are_as_exact_as_estimates_are() -> None:
    words = [duration(seconds) for seconds in (3, 40, 400, 5000, 15_000)]
    assert words == ["less than 10 s", "about 40 s", "about 7 min", "about 83 min", "about 4.2 h"]
