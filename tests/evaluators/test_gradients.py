"""Evaluators that run backwards give the gradients of their losses, however a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

from mergesearch.evaluators import Batch, Evaluator
from mergesearch.evaluators.items import batch_indices
from mergesearch.evaluators.model_items import read_items
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from tests.evaluators.items import (
    DOMAINS,
    build,
    candidate_at,
    classification,
    opened,
    pico_llama,
    pico_vit,
    save,
    three_splits,
    token_splits,
)

TEMPERATURE = 2.0
HIDDEN = 0.3


def section(kind: str, **options: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "domain": "domain",
        "id": "id",
        "objectives": [{"name": "loss"}],
        **options,
    }


CASES: dict[str, dict[str, Any]] = {
    "classification": classification("data", {"name": "loss", "metric": "cross_entropy"}),
    "entropy": section("entropy", data="data"),
    "alignment": section(
        "alignment",
        data="data",
        temperature=TEMPERATURE,
        hidden_weight=HIDDEN,
        layers=[1, 2],
        teachers={"day": "teacher", "night": "other"},
    ),
    "language model": section("language_model", data="tokens", labels="labels"),
    "entropy of tokens": section(
        "entropy",
        data="tokens",
        inputs={"input_ids": "input_ids"},
        model_class="AutoModelForCausalLM",
    ),
    "alignment of tokens": section(
        "alignment",
        data="tokens",
        inputs={"input_ids": "input_ids"},
        model_class="AutoModelForCausalLM",
        teachers=dict.fromkeys(DOMAINS, "llama"),
        layers=[-1],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    save(folder / "data", three_splits())
    save(folder / "tokens", token_splits())
    pico_vit(seed=5).double().save_pretrained(folder / "teacher")
    pico_vit(seed=6).double().save_pretrained(folder / "other")
    pico_llama(seed=5).double().save_pretrained(folder / "llama")
    return folder


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def evaluator(case: str, folder: Path) -> Evaluator:
    return opened(CASES[case], folder=folder)


@pytest.fixture
def model(evaluator: Evaluator) -> Any:
    return (
        pico_llama() if evaluator.model_class == "AutoModelForCausalLM" else pico_vit()
    ).double()


def gradient(
    evaluator: Evaluator, model: Any, batch: Batch, weights: dict[str, float]
) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    slope = evaluator.backward(candidate_at([0.0], model), batch, weights)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return slope.loss, torch.cat([part.ravel() for part in parts])


def item_loss(
    case: str, model: Any, table: dict[str, Any], index: int, folder: Path
) -> torch.Tensor:
    """The loss of one item, from its definition."""
    domain = table["domain"][index]
    if "pixels" in table:
        inputs = {"pixel_values": torch.tensor(table["pixels"][index]).double()[None, None]}
    else:
        inputs = {"input_ids": torch.tensor(table["input_ids"][index])[None]}
    output = model(**inputs, output_hidden_states=True)
    logits = output.logits[0].reshape(-1, output.logits.shape[-1])
    p = logits.softmax(-1)
    if case == "classification":
        return -p[0, table["label"][index]].log()
    if case == "language model":
        labels = torch.tensor(table["labels"][index])[1:]
        return -torch.stack(
            [p[t, label].log() for t, label in enumerate(labels) if label >= 0]
        ).mean()
    if case.startswith("entropy"):
        return -(p * p.log()).sum(-1).mean()
    from mergesearch.merging.models.loading import load_model

    name = {"day": "teacher", "night": "other"}[domain] if "pixels" in table else "llama"
    kind = "AutoModelForImageClassification" if "pixels" in table else "AutoModelForCausalLM"
    with torch.no_grad():
        taught = load_model(str(folder / name), kind)(**inputs, output_hidden_states=True)
    hot, layers, weight = (TEMPERATURE, [1, 2], HIDDEN) if "pixels" in table else (1.0, [-1], 1.0)
    expected = (taught.logits[0].reshape(-1, logits.shape[-1]) / hot).softmax(-1)
    kl = hot**2 * (expected * (expected.log() - (logits / hot).log_softmax(-1))).sum(-1).mean()
    squares = [((output.hidden_states[at] - taught.hidden_states[at]) ** 2).mean() for at in layers]
    return kl + weight * sum(squares) / len(squares)


def table_of(case: str) -> dict[str, Any]:
    return (token_splits() if case == "language model" or "tokens" in case else three_splits())[
        "search"
    ]


def test_the_gradient_is_that_of_the_loss_by_its_definition(
    case: str, evaluator: Evaluator, model: Any, folder: Path
) -> None:
    loss, result = gradient(evaluator, model, Batch(), {"loss": 1.0})
    table = table_of(case)
    means = []
    for domain in DOMAINS:
        indices = [index for index, name in enumerate(table["domain"]) if name == domain]
        means.append(
            torch.stack([item_loss(case, model, table, index, folder) for index in indices]).mean()
        )
    model.zero_grad()
    expected = torch.stack(means).mean()
    expected.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(
        result, torch.cat([part.ravel() for part in parts]), rtol=1e-8, atol=1e-10
    )
    measured = evaluator.evaluate(candidate_at([0.0], model), "search").values["loss"]
    assert measured == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("size", [None, 4, 2])
def test_the_mean_over_shares_is_the_gradient_of_the_batch(
    evaluator: Evaluator, model: Any, size: int | None
) -> None:
    batch = Batch(number=1, size=size, seed=3)
    loss, whole = gradient(evaluator, model, batch, {"loss": 1.0})
    # With two items in a batch, one of three shares is empty.
    parts = [
        gradient(evaluator, model, replace(batch, share=share, shares=3), {"loss": 1.0})
        for share in range(3)
    ]
    assert np.mean([part for part, _ in parts]) == pytest.approx(loss, rel=1e-6)
    # Llama normalises in fp32 whatever its dtype, and attention picks another kernel where there is
    # no padding.
    near = 1e-12 if isinstance(model, ViTForImageClassification) else 1e-6
    torch.testing.assert_close(sum(part for _, part in parts) / 3, whole, rtol=1e-9, atol=near)
    costs = [evaluator.batch_cost(replace(batch, share=share, shares=3)) for share in range(3)]
    assert (
        sum(costs)
        == evaluator.batch_cost(batch)
        == (evaluator.size("search") if size is None else 2 * size)
    )


def test_micro_batches_change_nothing(case: str, model: Any, folder: Path) -> None:
    result = [
        gradient(
            opened(CASES[case] | {"batch_size": size}, folder=folder), model, Batch(), {"loss": 1.0}
        )[1]
        for size in (256, 3)
    ]
    torch.testing.assert_close(result[0], result[1], rtol=1e-8, atol=1e-11)


def test_one_graph_at_a_time(folder: Path) -> None:
    """What autograd keeps at most is that of one domain, however many there are."""

    def peak(domains: int) -> int:
        splits = three_splits(24)
        for table in splits.values():
            table["domain"] = [str(index % domains) for index in range(24)]
        evaluator = opened(
            section("entropy", data=str(save(folder / f"domains {domains}", splits))), folder=folder
        )
        alive = 0
        most = 0

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal alive, most
                self.tensor = tensor
                self.size = tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            evaluator.backward(candidate_at([0.0], pico_vit()), Batch(size=3), {"loss": 1.0})
        return most

    one = peak(1)
    assert one > 1000
    assert [peak(count) for count in (2, 4, 8)] == [one] * 3


def test_only_objectives_with_a_weight_count_and_in_proportion(folder: Path) -> None:
    objectives = [
        {"name": "day", "metric": "cross_entropy", "domains": ["day"]},
        {"name": "both", "metric": "cross_entropy"},
        {"name": "right", "metric": "accuracy"},
        {"name": "worst", "metric": "cross_entropy", "reduce": "worst"},
    ]
    evaluator = opened(classification("data", *objectives), folder=folder)
    model = pico_vit().double()
    assert evaluator.differentiable == ("day", "both")
    parts = {name: gradient(evaluator, model, Batch(), {name: 1.0})[1] for name in ("day", "both")}
    joint = gradient(evaluator, model, Batch(), {"day": 0.25, "both": 3.0})[1]
    torch.testing.assert_close(
        joint, 0.25 * parts["day"] + 3.0 * parts["both"], rtol=1e-9, atol=1e-12
    )
    assert opened(classification("data", objectives[2]), folder=folder).provides == {"items"}


def test_smooth_losses_that_are_no_objectives_are_offered_as_proxies(folder: Path) -> None:
    right = {"metric": "accuracy"}
    alone = opened(classification("data", right), folder=folder)
    listed = opened(classification("data", right, {"metric": "cross_entropy"}), folder=folder)
    assert (alone.proxies, alone.differentiable) == (("cross_entropy",), ())
    assert (listed.proxies, listed.differentiable) == ((), ("cross_entropy",))
    model = pico_vit().double()
    batch = Batch(number=1, size=4)
    results = [gradient(e, model, batch, {"cross_entropy": 1.0}) for e in (alone, listed)]
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    # Beside an evaluator that has it as an objective, the name stands for that one alone.
    other = classification("data", {"name": "again", "metric": "accuracy"})
    both = opened(classification("data", {"metric": "cross_entropy"}), other, folder=folder)
    assert both.proxies == ()
    assert both.batch_cost(batch) == both.batch_cost(batch, ["cross_entropy"]) == 8
    entropy = section("entropy", data="data", objectives=[{"name": "entropy"}])
    mixed = opened(other, entropy, folder=folder)
    assert (mixed.proxies, mixed.differentiable) == (("cross_entropy",), ("entropy",))
    assert mixed.batch_cost(batch) == 8
    assert mixed.batch_cost(batch, ["cross_entropy", "entropy"]) == 16


def test_a_loss_that_is_not_finite_stops(folder: Path) -> None:
    evaluator = opened(CASES["entropy"], folder=folder)
    model = pico_vit()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        evaluator.backward(candidate_at([0.0], model), Batch(), {"loss": 1.0})


class TestBatches:
    DOMAINS = np.array(["a", "b", "a", "a", "b", "a", "a"])

    def stream(self, batch: Batch, count: int) -> Iterator[dict[str, list[int]]]:
        for number in range(count):
            result = batch_indices(self.DOMAINS, replace(batch, number=number))
            yield {name: indices.tolist() for name, (indices, _) in result.items()}

    def test_every_round_holds_every_item_once(self) -> None:
        taken = [index for each in self.stream(Batch(size=2), 10) for index in each["a"]]
        members = np.flatnonzero(self.DOMAINS == "a").tolist()
        for start in range(0, 20, 5):
            assert sorted(taken[start : start + 5]) == members
        assert taken[:5] != taken[5:10] or taken[5:10] != taken[10:15]

    def test_seeds_shuffle_and_samples_limit(self) -> None:
        one, same, other = (list(self.stream(Batch(size=2, seed=seed), 6)) for seed in (0, 0, 1))
        assert one == same
        assert one != other
        few = {index for each in self.stream(Batch(size=2, samples=3), 10) for index in each["a"]}
        assert len(few) == 3

    def test_a_small_domain_gives_all_it_has_once(self) -> None:
        for each in self.stream(Batch(size=4), 3):
            assert sorted(each["b"]) == [1, 4]


class TestAlignment:
    def test_an_expert_is_aligned_with_itself(self, folder: Path) -> None:
        same = CASES["alignment"] | {"teachers": dict.fromkeys(DOMAINS, "teacher")}
        evaluator = opened(same, folder=folder)
        model = pico_vit(seed=5).double()
        loss, result = gradient(evaluator, model, Batch(), {"loss": 1.0})
        assert abs(loss) < 1e-12
        assert float(result.abs().max()) < 1e-9
        assert (
            evaluator.evaluate(candidate_at([0.0], pico_vit().double()), "test").values["loss"]
            > 0.01
        )

    def test_domains_without_an_expert_are_refused(self, folder: Path) -> None:
        lonely = CASES["alignment"] | {"teachers": {"day": "teacher"}}
        with pytest.raises(InputError, match=r"teachers: .*'night'"):
            build(lonely, folder=folder).check()

    def test_experts_that_are_not_there_are_refused_by_check(self, folder: Path) -> None:
        lost = CASES["alignment"] | {"teachers": dict.fromkeys(DOMAINS, "./nowhere")}
        with pytest.raises(MergesearchError, match="nowhere"):
            build(lost, folder=folder).check()
        several = CASES["alignment"] | {"domain": None}
        with pytest.raises(InputError, match=r"domain: required key is missing"):
            build(several, folder=folder).check()

    def test_layers_that_are_not_there_are_refused(self, folder: Path) -> None:
        evaluator = opened(CASES["alignment"] | {"layers": [9]}, folder=folder)
        with pytest.raises(InputError, match="layers"):
            evaluator.evaluate(candidate_at([0.0], pico_vit().double()), "search")


class TestLanguageModel:
    def test_it_is_the_loss_of_transformers_and_padding_changes_nothing(self, folder: Path) -> None:
        model = pico_llama().double()
        table = token_splits()["search"]
        result = opened(CASES["language model"], folder=folder).evaluate(
            candidate_at([0.0], model), "search"
        )
        for index, score in enumerate(result.items["loss"]):
            ids, labels = (
                torch.tensor(table[name][index])[None] for name in ("input_ids", "labels")
            )
            with torch.no_grad():
                assert score == pytest.approx(
                    float(model(input_ids=ids, labels=labels).loss), rel=1e-6
                )


class TestItems:
    """Columns that a model is called with."""

    def test_ragged_numbers_stay_what_they_are(self) -> None:
        rows = np.array(
            [np.array([0.3, 0.7], np.float32), np.array([1.5], np.float32)], dtype=object
        )
        items = read_items({"input_values": rows}, "entropy")
        assert [row.tolist() for row in items.inputs["input_values"]] == [
            pytest.approx([0.3, 0.7]),
            [1.5],
        ]

    def test_ids_are_padded_with_the_models_own_token(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForSequenceClassification

        sizes = {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                **sizes, intermediate_size=32, pad_token_id=3, initializer_range=0.5
            )
            model = LlamaForSequenceClassification(config).double().eval()
        options = {"data": "tokens", "inputs": {"input_ids": "input_ids"}}
        kind = "AutoModelForSequenceClassification"
        one, all_at_once = (
            opened(section("entropy", **options, model_class=kind, batch_size=size), folder=folder)
            for size in (1, 8)
        )
        scores = [
            e.evaluate(candidate_at([0.0], model), "search").items["loss"]
            for e in (one, all_at_once)
        ]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)

    @pytest.mark.parametrize(
        ("column", "value", "reason"),
        [
            ("labels", [-100, 5], "as many labels as tokens"),
            ("labels", "none count", "that counts"),
            ("input_ids", [], "not empty"),
        ],
    )
    def test_items_that_say_nothing_are_refused(
        self, tmp_path: Path, column: str, value: Any, reason: str
    ) -> None:
        splits = token_splits()
        table = splits["validation"]
        table[column][1] = [-100] * len(table["input_ids"][1]) if value == "none count" else value
        save(tmp_path / "tokens", splits)
        with pytest.raises(InputError, match=reason):
            opened(CASES["language model"], folder=tmp_path)

    def test_arguments_called_as_roles_are_refused(self) -> None:
        with pytest.raises(ValueError, match="received label"):
            build(CASES["entropy"] | {"inputs": {"pixel_values": "pixels", "label": "label"}})


class TestTransductive:
    def test_the_search_items_are_the_test_items_where_it_is_asked_for(self, folder: Path) -> None:
        plain, asked = (
            opened(CASES["entropy"] | {"transductive": value}, folder=folder)
            for value in (False, True)
        )
        candidate = candidate_at([0.0], pico_vit().double())
        assert (plain.transductive, asked.transductive) == (False, True)
        assert (
            asked.evaluate(candidate, "search").values == asked.evaluate(candidate, "test").values
        )
        assert (
            plain.evaluate(candidate, "search").values != plain.evaluate(candidate, "test").values
        )
        assert (
            asked.evaluate(candidate, "validation").values
            == plain.evaluate(candidate, "validation").values
        )

    def test_shared_items_are_refused_otherwise(self, tmp_path: Path) -> None:
        splits = three_splits()
        splits["search"] = splits["test"]
        save(tmp_path / "data", splits)
        with pytest.raises(InputError, match="disjoint"):
            build(CASES["entropy"], folder=tmp_path).check()

    def test_labelled_kinds_have_no_such_option(self) -> None:
        with pytest.raises(ValueError, match="transductive"):
            build(CASES["classification"] | {"transductive": True})


def test_uniform_answers_have_the_entropy_of_all_classes(folder: Path) -> None:
    model = pico_vit().double()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    value = (
        opened(CASES["entropy"], folder=folder)
        .evaluate(candidate_at([0.0], model), "search")
        .values["loss"]
    )
    assert value == pytest.approx(np.log(4), rel=1e-12)
