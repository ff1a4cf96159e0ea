"""Merges under task masks against plain loops: masks, weights, heads, and the router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mergesearch.merging import CheckpointError, InputError
from mergesearch.merging.models.own_heads import OwnHeads, share_alike
from mergesearch.merging.routing.masked import MaskedMerge, by_tensor, held_sum
from mergesearch.merging.routing.masked_file import check_held
from mergesearch.merging.routing.task_routers import HeadRouter, trained_router
from mergesearch.merging.routing.vectors import copied_tensors
from tests.evaluators.items import pico_llama, pico_vit

TASKS = ("left", "right")
HEAD = ("classifier.weight", "classifier.bias")
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GENERATOR = torch.Generator().manual_seed(1)
#: The head of a language model, and how it writes.
WORDS = "lm_head.weight"
WRITTEN: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
SCALE = 0.5
THRESHOLD = 0.8


def tower(seed: int) -> dict[str, torch.Tensor]:
    return {n: t for n, t in copied_tensors(pico_vit(seed)).items() if n not in HEAD}


def heads() -> OwnHeads:
    """Models of both tasks around one memory, with heads of their own."""
    models = {task: pico_vit(seed) for seed, task in enumerate(TASKS, 1)}
    share_alike(models["left"], models["right"], HEAD)
    return OwnHeads(models)


def held() -> dict[str, dict[str, torch.Tensor]]:
    base = tower(0)
    experts = [tower(1), {**tower(2), "vit.layernorm.bias": base["vit.layernorm.bias"]}]
    return held_sum(base, experts, dict.fromkeys(base, SCALE), dict.fromkeys(base, THRESHOLD))


def merge(*, routed: bool = False) -> MaskedMerge:
    head = heads()
    router = HeadRouter(head, 1) if routed else None
    return MaskedMerge(head.models["left"], tower(0), held(), TASKS, router=router, head=head)


def by_hand(place: int) -> Any:
    """The model of one task: base, plus half the sum of changes wherever its mask is set."""
    base, *experts = (tower(seed) for seed in (0, 1, 2))
    experts[1]["vit.layernorm.bias"] = base["vit.layernorm.bias"]
    model = pico_vit(place + 1)
    state = model.state_dict()
    for name, origin in base.items():
        changes = [expert[name] - origin for expert in experts]
        own = changes[place]
        rest = changes[1 - place]
        state[name].copy_(origin + SCALE * sum(changes) * (own.abs() > THRESHOLD * rest.abs()))
    return model


def test_each_item_is_answered_under_the_mask_and_head_of_its_task() -> None:
    named = ["left", "right", "right", "left", "right"]
    answer = merge()(IMAGES, tasks=named)
    for index, task in enumerate(named):
        place = TASKS.index(task)
        with torch.no_grad():
            expected = by_hand(place)(IMAGES[index : index + 1]).logits[0]
        torch.testing.assert_close(answer.logits[index], expected, rtol=1e-4, atol=1e-5)
        assert answer.weights[index].tolist() == [float(place == k) for k in range(2)]


def test_tensors_that_no_expert_changes_are_not_held() -> None:
    base = tower(0)
    other = {**base, "vit.layernorm.weight": base["vit.layernorm.weight"] + 1}
    found = held_sum(base, [base, other], dict.fromkeys(base, 1.0), dict.fromkeys(base, 0.4))
    assert set(found) == {"vit.layernorm.weight"}
    assert torch.equal(found["vit.layernorm.weight"]["sum"], torch.ones(16))


def test_weights_are_written_once_while_the_task_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = merge()
    written = []
    merged = routed.merged_tensor
    monkeypatch.setattr(
        routed, "merged_tensor", lambda name, weights: written.append(name) or merged(name, weights)
    )
    for _ in range(3):
        routed(IMAGES, tasks="left")
    assert len(written) == len(held())
    routed(IMAGES, tasks="right")
    assert len(written) == 2 * len(held())


def test_a_merge_that_was_cast_is_written_anew() -> None:
    routed = merge()
    routed(IMAGES, tasks="right")
    routed.half().float()(IMAGES, tasks="right")
    expected = by_hand(1).state_dict()
    for name, tensor in routed.model.state_dict().items():
        if name in held():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_the_router_projects_features_onto_what_each_head_reads() -> None:
    routed = merge(routed=True)
    scores = []
    for place in range(2):
        model = by_hand(place)
        with torch.no_grad():
            read = model.vit(pixel_values=MANY).last_hidden_state[:, 0]
        span = torch.linalg.svd(model.classifier.weight)[2][:1]
        scores.append((read @ span.T).square().sum(dim=1).sqrt())
    expected = torch.stack(scores, dim=1)
    assert routed.router is not None
    with torch.no_grad():
        found = routed.router.scores(routed, {"pixel_values": MANY})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tasks = [TASKS[k] for k in expected.argmax(dim=1).tolist()]
    assert routed.tasks_of(MANY) == tasks
    assert len({*tasks}) == 2, "the images tell nothing apart"
    # Items whose task is not told are answered by what the router says of each.
    assert torch.equal(routed(MANY).logits, routed(MANY, tasks=tasks).logits)


def test_a_learned_router_sees_the_base_whatever_is_written() -> None:
    routed = merge()
    shift = {
        task: torch.randn(12, 1, 8, 8, generator=GENERATOR) + 3 * k for k, task in enumerate(TASKS)
    }
    observed = {task: {"pixel_values": images} for task, images in shift.items()}
    routed.router = trained_router(routed, observed, width=8, steps=60, seed=0)
    for task, images in shift.items():
        routed.write_task("right")
        assert routed.tasks_of(images).count(task) > 10
    with torch.no_grad():
        seen = pico_vit(0)(IMAGES, output_hidden_states=True).hidden_states[-1].mean(dim=1)
    expected = routed.router.network(seen)
    with torch.no_grad():
        found = routed.router.scores(routed, {"pixel_values": IMAGES})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def words(seed: int) -> Any:
    return pico_llama(seed, tie_word_embeddings=False)


def text_merge(head: OwnHeads | None = None) -> MaskedMerge:
    """Language models under masks, with the head of the first or with heads of their own."""
    model = words(0) if head is None else head.models["left"]
    base, *experts = (
        {n: t for n, t in copied_tensors(words(seed)).items() if head is None or n != WORDS}
        for seed in (0, 1, 2)
    )
    found = held_sum(base, experts, dict.fromkeys(base, SCALE), dict.fromkeys(base, THRESHOLD))
    return MaskedMerge(model, base, found, TASKS, head=head)


class ByTokens:
    """A router to which tokens below 10 are of the first task, and others of the second."""

    def scores(self, merge: MaskedMerge, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        counted = inputs["attention_mask"].bool()
        low = inputs["input_ids"] < 10
        return torch.stack([(counted & low).sum(1), (counted & ~low).sum(1)], dim=1)


def test_prompts_alone_say_whose_task_a_text_is() -> None:
    routed = text_merge()
    routed.router = ByTokens()
    prompt = torch.tensor([[1, 4, 2]])
    whole = torch.tensor([[1, 4, 2, 12, 11, 10, 13]])
    mask = torch.zeros_like(whole)
    mask[:, :3] = 1
    assert routed.tasks_of(input_ids=prompt) == ["left"]
    assert routed.tasks_of(input_ids=whole) == ["right"]
    assert routed.tasks_of(input_ids=whole, prompt_mask=mask) == ["left"]
    assert routed(input_ids=whole, prompt_mask=mask).weights.tolist() == [[1.0, 0.0]]
    plain = routed.generate(prompt, **WRITTEN)
    routed.write_task("left")
    assert torch.equal(plain, routed.model.generate(prompt, **WRITTEN))


def test_texts_are_written_under_the_mask_and_head_of_their_task() -> None:
    models = {task: words(seed) for seed, task in enumerate(TASKS, 1)}
    share_alike(models["left"], models["right"], [WORDS])
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for head, writers in ((None, None), (OwnHeads(models), models)):
        routed = text_merge(head)
        found = routed.generate(prompts, tasks=["left", "right"], **WRITTEN)
        for row, task in enumerate(TASKS):
            routed.write_task(task)
            writer = routed.model if writers is None else writers[task]
            assert torch.equal(found[row], writer.generate(prompts[row : row + 1], **WRITTEN)[0])
    assert not torch.equal(*(m.get_output_embeddings().weight for m in models.values()))
    with pytest.raises(InputError, match="expected one of left, right, received 'up'"):
        routed.generate(prompts, tasks="up", **WRITTEN)


def test_without_a_router_tasks_must_be_told() -> None:
    with pytest.raises(InputError, match=r"expected one of left, right .*no router"):
        merge()(IMAGES)
    with pytest.raises(InputError, match="expected one of left, right, received 'up'"):
        merge()(IMAGES, tasks="up")


def test_a_tensor_belongs_to_the_first_group_that_fits() -> None:
    routing = {
        "group.attention": "*attention* *qkv*",
        "group.rest": "*",
        "scale.attention": 0.2,
        "scale.rest": 0.9,
    }
    names = ["h.0.attention.w", "h.0.qkv", "h.0.mlp.w"]
    assert by_tensor(names, routing, "scale", 1.0) == dict(zip(names, (0.2, 0.2, 0.9), strict=True))
    del routing["group.rest"]
    assert by_tensor(names, routing, "scale", 1.0)["h.0.mlp.w"] == 1.0


@pytest.mark.parametrize("damage", ["name", "shape", "mask", "missing"])
def test_masks_that_do_not_fit_the_base_are_refused(damage: str) -> None:
    base = tower(0)
    stored = held()
    check_held(stored, base, 2, "bundle")
    name = next(iter(stored))
    if damage == "name":
        stored["other"] = stored.pop(name)
    elif damage == "shape":
        stored[name]["sum"] = stored[name]["sum"][..., :1]
    elif damage == "mask":
        stored[name]["mask"] = stored[name]["mask"][:1]
    else:
        del stored[name]["mask"]
    with pytest.raises(CheckpointError, match="bundle: expected the sum and the masks of 2 tasks"):
        check_held(stored, base, 2, "bundle")
