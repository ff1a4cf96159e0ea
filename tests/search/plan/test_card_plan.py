"""What studies of real shapes need on cards, from sparse headers: no weight is there to be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.family import align_family
from mergesearch.merging.operators import get_operator
from mergesearch.merging.policies import TensorPolicies
from mergesearch.search.plan.card_needs import CardSettings, Demand
from mergesearch.search.plan.card_plan import CardPlan, plan_cards
from mergesearch.search.plan.card_report import refusal, why
from mergesearch.search.plan.cards import KNOWN_CARDS, parse_card, smallest_that_fits
from tests.headers import LLAMA_8B, LLAMA_70B, QWEN_HALF_B, write_adapter, write_llama

GB = 10**9
PARAMETERS_8B = 8_030_261_248
#: Perplexity of one window of 2,048 tokens at a time: what the bars for 8B are planned with.
WINDOWS = {"kind": "perplexity", "data": "texts", "batch_size": 1, "max_length": 2048}

MakeDemand = Callable[..., Demand]


@pytest.fixture
def demand(tmp_path: Path) -> MakeDemand:
    """``demand(config, experts, operator, rank=..., gradients=..., **evaluator)``."""

    def make(
        config: dict[str, Any],
        experts: int,
        operator: str = "task_arithmetic",
        *,
        rank: int = 0,
        gradients: bool = False,
        **evaluator: Any,
    ) -> Demand:
        base = write_llama(tmp_path / "base", config)
        # Copies of one expert: planning looks at headers, and files are opened once for each.
        other = write_llama(tmp_path / "expert", config)
        path = f"{base}+{write_adapter(tmp_path / 'adapter', config, rank)}" if rank else str(other)
        family = align_family(
            open_checkpoint(str(base)),
            [open_checkpoint(path, f"expert {index}") for index in range(experts)],
            TensorPolicies(),
        )
        chosen = get_operator(operator)
        merged = {key: value for key, value in (WINDOWS | evaluator).items() if value is not ...}
        sections = parse_evaluators([merged])
        return Demand(family, chosen, chosen.complete({}), sections, gradients)

    return make


def plan(demand: Demand, card: str, count: int = 1, **settings: Any) -> CardPlan:
    return plan_cards(demand, CardSettings(**settings), parse_card(card), count)


def test_8b_and_four_experts_take_100_gb_by_task_arithmetic(demand: MakeDemand) -> None:
    planned = plan(demand(LLAMA_8B, 4), "h200-141")
    card = planned.fullest
    assert planned.demand.family.layout.parameters == PARAMETERS_8B
    assert card.base == card.merged == 2 * PARAMETERS_8B
    assert card.rows == 8 * PARAMETERS_8B
    assert planned.peak < 98 * GB
    assert planned.fits
    assert why(planned) == "stored, exact: the smallest exact form of task_arithmetic"
    assert planned.node.disk == 10 * PARAMETERS_8B


def test_rounded_weights_take_a_copy_of_them(demand: MakeDemand) -> None:
    plain = plan(demand(QWEN_HALF_B, 2), "h200-141").fullest
    rounded = plan(demand(QWEN_HALF_B, 2, quantise="int4"), "h200-141").fullest
    assert rounded.batch == plain.batch + plain.merged
    assert rounded.total == plain.total + plain.merged


def test_8b_and_four_experts_take_53_gb_by_ties(demand: MakeDemand) -> None:
    """Of 4.7 bits an element: 16 for a fifth of them, one of the mask, half a one of starts."""
    ties = demand(LLAMA_8B, 4, "ties")
    planned = plan(ties, "h200-141")
    assert planned.fullest.rows == pytest.approx(4 * PARAMETERS_8B * 4.7 / 8, rel=1e-6)
    assert planned.weights.is_exact
    assert planned.fits
    assert planned.peak < 53 * GB < 100 * GB
    assert why(planned) == "packed, exact: the smallest exact form of ties, of which rows keep 20%"
    assert plan(ties, "a100-80").fits
    # With every expert whole, the masks' 4.0 GB were 1.7 too many.
    masked = plan(ties, "h200-141", rows="masked")
    masks = masked.fullest.rows - 8 * PARAMETERS_8B
    assert masks == pytest.approx(4 * PARAMETERS_8B / 8, rel=1e-6)
    assert masked.weights.is_exact
    assert masked.peak < 95 * 2**30
    assert 1.6 * GB < masked.peak - 100 * GB < 1.8 * GB < masks


def test_8b_and_eight_experts_fit_one_h200_by_int8(demand: MakeDemand) -> None:
    eight = demand(LLAMA_8B, 8)
    exact = plan(eight, "h200-141")
    assert not exact.fits
    assert exact.advice() == ("rows: int8",)
    assert plan(eight, "h200-141", 8).advice() == ("workers.gpus: 2", "rows: int8")
    message = str(refusal(exact))
    assert message.startswith("memory: expected at most 145.6 GB on each of 1 card (h200-141), ")
    assert message.endswith("; set rows: int8")
    assert "\n" not in message
    planned = plan(eight, "h200-141", rows="int8")
    assert planned.fits
    assert planned.peak < 100 * GB
    assert why(planned) == "int8, approximate: the study says rows: int8"
    assert plan(eight, "b200-192").fits


def test_8b_and_sixteen_adapters_fit_an_a100(demand: MakeDemand) -> None:
    planned = plan(demand(LLAMA_8B, 16, rank=16), "a100-80")
    # 16 ranks of 16 in fp32: 41.9 million numbers for each adapter, and nothing for other tensors.
    assert planned.fullest.rows == 16 * 4 * 41_943_040
    assert planned.weights.by_encoding.keys() == {"factors"}
    assert why(planned) == "factors, exact: every expert is an adapter of the base"
    assert planned.peak < 37 * GB
    assert planned.fits


def test_adapters_whose_rows_are_whole_are_kept_in_fp32(demand: MakeDemand) -> None:
    planned = plan(demand(LLAMA_8B, 2, "ties", rank=16), "h200-141")
    # 7.9 bits of fp32 numbers, or 4.7 of bf16 ones.
    assert planned.weights.by_encoding.keys() == {"packed"}
    whole = plan(demand(LLAMA_8B, 2, "ties", rank=16), "h200-141", rows="masked")
    assert whole.weights.by_encoding["dense"] > whole.weights.by_encoding["masked"] > 0


def test_70b_and_three_experts_lie_on_eight_cards(demand: MakeDemand) -> None:
    three = demand(LLAMA_70B, 3)
    planned = plan(three, "h200-141", 8, gpus=8)
    assert planned.fits
    assert len(planned.cards) == 8
    assert not planned.settings.on_host
    assert planned.node.disk == pytest.approx(4 * 141.1 * GB, rel=0.001)
    # Layers are not cut, so that the fullest card holds a little more than an eighth.
    eighth = (planned.weights.base + planned.weights.rows + planned.weights.merged) / 8
    assert eighth < planned.peak < 1.1 * eighth
    assert planned.most_workers == 1


def test_main_memory_is_named_where_cards_hold_the_weights_alone(demand: MakeDemand) -> None:
    planned = plan(demand(LLAMA_70B, 3), "h100-80", 8, gpus=8)
    assert planned.fits
    assert planned.settings.on_host
    assert planned.fullest.base == planned.fullest.rows == 0
    assert planned.node.host > planned.node.disk
    assert not plan(demand(LLAMA_70B, 3), "a100-40", 2, gpus=2).fits
    followed = demand(LLAMA_70B, 3, gradients=True, kind="language_model", max_length=...)
    assert not plan(followed, "h100-80", 8, gpus=8).fits


def test_hidden_states_are_main_memory_of_every_worker(demand: MakeDemand) -> None:
    without = demand(QWEN_HALF_B, 2)
    keeping = replace(without, hidden_states=10**9)
    before, after = (plan(each, "h100-80", 2, per_gpu=2).node for each in (without, keeping))
    assert after.host - before.host == 4 * 10**9
    assert after.disk == before.disk


def test_half_a_billion_and_twelve_experts_serve_four_workers_of_a_card(
    demand: MakeDemand,
) -> None:
    twelve = demand(QWEN_HALF_B, 12)
    four = plan(twelve, "a100-40", per_gpu=4)
    one = plan(twelve, "a100-40")
    assert four.fits
    assert (four.fullest.base, four.fullest.rows) == (one.fullest.base, one.fullest.rows)
    assert four.fullest.merged == 4 * one.fullest.merged
    assert four.fullest.batch == 4 * one.fullest.batch
    # One more process holds what they share.
    assert four.fullest.context == 5 * one.fullest.context
    assert one.most_workers == four.most_workers > 4
    small = plan(twelve, "l4-24", per_gpu=8)
    assert small.advice() == ("workers.per_gpu: 3",)
    assert small.most_workers == 3


def test_a_batch_that_is_too_large_is_halved_in_the_advice(demand: MakeDemand) -> None:
    evaluator = {"kind": "entropy", "model_class": "AutoModelForCausalLM", "batch_size": 64}
    many = demand(LLAMA_8B, 4, max_length=..., **evaluator)
    planned = plan(many, "h200-141", 8)
    assert planned.batch.rows == 64
    assert planned.advice()[:2] == ("batch_size: 32", "workers.gpus: 2")
    assert "64 rows of 1,024 tokens as assumed for texts" in str(refusal(planned))
    assert plan(many, "h200-141", divisor=2).fits
    assert plan(many, "h200-141", divisor=64).batch.rows == 1


def test_texts_are_bounded_in_tokens_and_logits(demand: MakeDemand) -> None:
    windows = plan(demand(LLAMA_8B, 1, batch_size=64, max_length=4096), "h200-141").batch
    assert (windows.rows, windows.tokens) == (8, 4096)
    written = {"kind": "generation", "target": "answer", "max_new_tokens": 1024, "batch_size": 8}
    texts = plan(demand(LLAMA_8B, 1, max_length=..., **written), "h200-141").batch
    # Keys and values of 8 texts of 2,048 tokens in 32 layers of 8 heads of 128 numbers.
    assert texts.cache == 2 * 8 * 2048 * 8 * 128 * 32 * 2


def test_gradients_take_a_buffer_and_the_activations_of_all_layers(demand: MakeDemand) -> None:
    evaluator = {"kind": "language_model", "batch_size": 1, "max_length": ...}
    followed = plan(demand(LLAMA_8B, 2, gradients=True, **evaluator), "h200-141").fullest
    scored = plan(demand(LLAMA_8B, 2, **evaluator), "h200-141").fullest
    assert followed.gradient == followed.merged
    assert scored.gradient == 0
    assert followed.batch > 5 * scored.batch


def test_an_engine_beside_the_model_takes_its_share(demand: MakeDemand) -> None:
    evaluator = {"kind": "generation", "target": "answer", "engine": "vllm", "max_length": ...}
    planned = plan(demand(LLAMA_8B, 2, **evaluator), "h200-141")
    assert planned.fullest.engine == int(0.4 * planned.card.total)


def test_two_settings_are_advised_where_one_is_not_enough(demand: MakeDemand) -> None:
    four = demand(LLAMA_8B, 4)
    assert plan(four, "a100-80", per_gpu=3).advice() == ("workers.per_gpu: 1 with rows: int8",)
    assert plan(four, "a100-80", rows="int8").fits
    hopeless = plan(demand(LLAMA_70B, 3), "l4-24")
    assert hopeless.advice() == ()
    assert "take more cards, or larger ones" in str(refusal(hopeless))


def test_cards_are_known_by_name_or_by_size() -> None:
    assert parse_card("H200-141") is KNOWN_CARDS["h200-141"]
    assert parse_card("96").total == 96 * GB
    assert smallest_that_fits(97 * GB) == "h200-141"
    assert smallest_that_fits(10**13) is None
    for wrong in ("h9000", "-3", "0", "nan", "inf"):
        with pytest.raises(InputError, match=r"--card: expected GB of memory or one of t4-16, "):
            parse_card(wrong)
    # A card has about what its name says.
    for name, card in KNOWN_CARDS.items():
        assert 0.97 < card.total / (float(name.rpartition("-")[2]) * GB) < 1.1


def test_a_worker_has_no_more_cards_than_there_are(demand: MakeDemand) -> None:
    with pytest.raises(InputError, match="expected at most the 2 cards, received 4"):
        plan(demand(LLAMA_8B, 1), "h200-141", 2, gpus=4)
