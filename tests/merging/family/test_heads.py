"""Heads that do not line up: which they are, what the policies make of them, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.base_names import own_names
from mergesearch.merging.family.family import ModelFamily, align_family, open_family
from mergesearch.merging.family.head_names import classifier_heads, odd_heads
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.policies import TensorPolicies, parse_policies
from tests.merging.headed import headed_recipe, headless, labelled, relabelled, without_prefix

Pico = Callable[[str], Any]
Copy = Callable[..., Path]
HEAD = {"classifier.bias", "classifier.weight"}
#: A text model, as BERT and DistilBERT name their tensors.
TEXT = {
    "bert.embeddings.word_embeddings.weight": (50, 8),
    "bert.encoder.layer.0.output.dense.weight": (8, 8),
    "bert.encoder.layer.1.output.dense.weight": (8, 8),
}


def align(base: Path, *experts: Path, **special: Any) -> ModelFamily:
    opened = [open_checkpoint(str(path)) for path in (base, *experts)]
    return align_family(opened[0], opened[1:], TensorPolicies(**special))


def refusal(base: Path, *experts: Path, **special: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        align(base, *experts, **special)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def family(pico: Pico, copy_of: Copy) -> tuple[Path, Path, Path]:
    """A base of three labels, and experts of two and five."""
    base = pico("vit").base
    one, two = pico("vit").experts
    odd = relabelled(copy_of, one, ["no", "yes"])
    return base, odd, relabelled(copy_of, two, ["a", "b", "c", "d", "e"])


# --- which tensors are heads
# ----------------------------------------------------------------------------


def test_a_head_is_its_whole_module() -> None:
    head = {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (2, 8)}
    base = TEXT | head
    expert = base | {"classifier.out_proj.weight": (5, 8)}
    assert odd_heads([base, expert]) == set(head)
    both = {"pre_classifier.weight": (8, 8), "classifier.weight": (2, 8)}
    assert odd_heads([TEXT | both, TEXT | both | {"classifier.weight": (3, 8)}]) == set(both)


def test_heads_of_some_sources_only() -> None:
    base = TEXT | {"cls.predictions.transform.dense.weight": (8, 8)}
    expert = TEXT | {"bert.pooler.dense.weight": (8, 8), "classifier.weight": (2, 8)}
    assert odd_heads([base, expert]) == {*base, *expert} - {*TEXT}
    assert odd_heads([TEXT, TEXT]) == set()


def test_blocks_embeddings_and_vocabularies_are_no_heads() -> None:
    deeper = TEXT | {"bert.encoder.layer.2.output.dense.weight": (8, 8)}
    assert odd_heads([TEXT, deeper]) == set()
    wider = TEXT | {"bert.encoder.layer.1.output.dense.weight": (8, 9)}
    assert odd_heads([TEXT, wider]) == set()
    other = TEXT | {"bert.embeddings.word_embeddings.weight": (51, 8)}
    assert odd_heads([TEXT, other]) == set()
    words = TEXT | {"lm_head.weight": (50, 8)}
    assert odd_heads([words, words | {"lm_head.weight": (51, 8)}]) == set()


def test_classifiers_have_a_row_for_each_class() -> None:
    head = {"pre_classifier.weight": (8, 8), "classifier.weight": (3, 8), "classifier.bias": (3,)}
    assert classifier_heads([TEXT | head], [3]) == set(head)
    assert classifier_heads([TEXT | head], [4]) == set()
    # Not the embedding, though it has as many rows; nor a block.
    assert classifier_heads([TEXT | {"lm_head.weight": (50, 8)}], [50]) == set()
    assert classifier_heads([TEXT], [8]) == set()


def test_plain_networks_have_heads_too() -> None:
    base = {"net.0.weight": (16, 8), "net.2.weight": (16, 16), "net.4.weight": (2, 16)}
    assert odd_heads([base, base | {"net.4.weight": (3, 16)}]) == {"net.4.weight"}


def test_names_behind_another_prefix() -> None:
    bare = {name.removeprefix("bert."): shape for name, shape in TEXT.items()}
    expert = TEXT | {"classifier.weight": (2, 8)}
    assert own_names(bare, expert) == {name.removeprefix("bert."): name for name in TEXT}
    assert own_names(expert, bare) == {name: name.removeprefix("bert.") for name in TEXT}
    inside = {f"model.language_model.{name}": shape for name, shape in bare.items()}
    assert len(own_names(bare, inside | {"model.vision_tower.weight": (4, 4)})) == len(bare)
    assert own_names(TEXT, expert) == own_names(TEXT, {"fc.weight": (2, 8)}) == {}


# --- what the policies make of them
# ----------------------------------------------------------------------------


def test_own_heads_are_in_no_layout(family: Any) -> None:
    base, odd, even = family
    aligned = align(base, odd, even, heads="own")
    assert aligned.heads is not None
    assert aligned.heads.names == HEAD
    assert HEAD.isdisjoint(aligned.layout.names)
    assert {*aligned.layout.names} == {*open_checkpoint(str(base)).merged} - HEAD
    assert {name: head.size for name, head in aligned.heads.of.items()} == {
        odd.name: 2 * 17,
        even.name: 5 * 17,
        "base": 3 * 17,
    }
    assert {*aligned.copied} >= HEAD
    assert not aligned.rebuilt


def test_lineage_is_told_behind_another_prefix_too(family: Any, copy_of: Copy) -> None:
    base, odd, _ = family
    bare = align(without_prefix(copy_of, base, "vit."), odd, heads="own")
    behind = compare_weights(bare.base, bare.experts[0])
    plain = align(base, odd, heads="own")
    assert {"attention", "mlp"} < {*behind.roles}
    assert behind.roles == compare_weights(plain.base, plain.experts[0]).roles


def test_without_a_policy_the_message_names_the_choices(family: Any, copy_of: Copy) -> None:
    base, odd, _ = family
    message = refusal(base, odd)
    assert "expected shape [3], received [2] in 'classifier.bias', 'classifier.weight'" in message
    assert "special: {heads: own | base | average}" in message
    assert "special: {heads: own" in refusal(without_prefix(copy_of, base, "vit."), odd)
    message = refusal(headless(copy_of, base), odd)
    assert "special: {heads: own | base | average}" in message
    assert "special: {absent: base_zero | average}" in message


def test_no_hint_names_what_is_set(family: Any, copy_of: Copy) -> None:
    base, odd, _ = family
    bare = headless(copy_of, base)
    message = refusal(bare, odd, headless(copy_of, odd), absent="average")
    assert "absent: base_zero" not in message
    assert "special: {absent: own}" in message
    deeper = copy_of(base, lambda t: t | {"vit.encoder.layer.2.x.weight": torch.ones(2)})
    message = refusal(base, deeper, copy_of(base), heads="own", absent="base_zero")
    assert "heads:" not in message
    assert "absent: base_zero" not in message


def test_the_bases_head_whatever_the_experts_have(
    family: Any, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    base, odd, even = family
    recipe = headed_recipe(base, {"odd": odd, "even": even}, heads="base")
    out = read_tensors(export_model(recipe, tmp_path / "out").folder)
    assert all(torch.equal(out[name], read_tensors(base)[name]) for name in HEAD)
    message = refusal(headless(copy_of, base), odd, even, heads="base")
    assert "special.heads: base: expected a head in base" in message
    assert "set heads: own or average" in message


def test_the_average_of_heads_that_line_up(
    family: Any, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    base, odd, even = family
    other = relabelled(copy_of, even, ["no", "yes"], seed=1)
    recipe = headed_recipe(base, {"odd": odd, "other": other}, heads="average")
    out = read_tensors(export_model(recipe, tmp_path / "out").folder)
    for name in HEAD:
        mean = (read_tensors(odd)[name] + read_tensors(other)[name]) / 2
        torch.testing.assert_close(out[name], mean)
    model, account = pico_load(tmp_path / "out")
    assert model.config.num_labels == 2
    assert not account["missing_keys"]
    bare = without_prefix(copy_of, base, "vit.")
    recipe = headed_recipe(bare, {"odd": odd, "other": other}, heads="average")
    assert not pico_load(export_model(recipe, tmp_path / "bare").folder)[1]["missing_keys"]
    message = refusal(base, odd, even, heads="average")
    assert "one shape of 'classifier.bias' in all experts, received [2], [5]" in message
    assert "set heads: own or base" in message


def pico_load(folder: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder, output_loading_info=True)


def test_classifiers_of_other_labels_are_never_averaged_silently(pico: Pico, copy_of: Copy) -> None:
    base = pico("vit").base
    one, two = pico("vit").experts
    cats = copy_of(one, **labelled(["cat", "dog", "cow"]))
    cars = copy_of(two, **labelled(["car", "bus", "van"]))
    with pytest.warns(UserWarning, match=r"label sets \(id2label\) differ.*heads: own"):
        assert {*align(base, cats, cars).layout.names} >= HEAD
    aligned = align(base, cats, cars, heads="own")
    assert aligned.heads is not None
    assert aligned.heads.names == HEAD
    same = copy_of(two, **labelled(["cat", "dog", "cow"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert align(base, cats, same).heads is None
    assert align(base, cats, same, heads="own").heads is None


def test_other_classes_of_a_model_share_its_backbone(
    pico: Pico, copy_of: Copy, build_model: Any, tmp_path: Path
) -> None:
    """Experts of one architecture around a base of another, as BERT's are."""
    base = pico("bert").base
    changed = {"architectures": ["BertForSequenceClassification"], **labelled(["no", "yes"])}

    def classifier(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {n: t for n, t in tensors.items() if not n.startswith("cls.")}
        return kept | {
            "bert.pooler.dense.weight": torch.ones(16, 16),
            "classifier.weight": torch.ones(2, 16),
        }

    one, two = (copy_of(path, classifier, **changed) for path in pico("bert").experts)
    assert "expected architectures" in refusal(base, one, two)
    heads = align(base, one, two, heads="own").heads
    assert heads is not None
    assert heads.of[one.name].names == {"bert.pooler.dense.weight", "classifier.weight"}
    assert all(name.startswith("cls.") for name in heads.of["base"].names)


# --- modules that only some experts have
# ----------------------------------------------------------------------------


def test_modules_of_single_experts_are_added(
    pico: Pico, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    base = pico("llama").base
    tower = {"vision_tower.layers.0.weight": torch.ones(4, 3), "projector.weight": torch.ones(2, 4)}
    ear = {"audio_tower.weight": torch.ones(5)}
    seeing = copy_of(
        pico("llama").experts[0], lambda t: t | tower, vision_config={"hidden_size": 4}
    )
    hearing = copy_of(pico("llama").experts[1], lambda t: t | ear)
    assert "special: {absent: own}" in refusal(base, seeing, hearing)
    recipe = headed_recipe(base, {"seeing": seeing, "hearing": hearing}, absent="own")
    assert recipe.special == (("absent", "own"),)
    layout = open_family(recipe).layout
    assert {*layout.names} == {*open_checkpoint(str(base)).merged}
    folder = export_model(recipe, tmp_path / "out").folder
    out = read_tensors(folder)
    assert {*out} == {*read_tensors(base), *tower, *ear}
    assert all(torch.equal(out[name], tensor) for name, tensor in (tower | ear).items())
    assert open_checkpoint(str(folder)).config["vision_config"] == {"hidden_size": 4}
    assert open_checkpoint(str(folder / "heads" / "hearing")).names == ("audio_tower.weight",)
    assert not pico("llama").load(folder)[1]["missing_keys"]
    states = [read_tensors(path) for path in (base, seeing, hearing)]
    in_memory = merge(states[0], states[1:], coefficients=[0.25, 0.5], special={"absent": "own"})
    assert {*in_memory} == {*out}
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in out.items())


def test_modules_of_several_experts_stay_theirs(pico: Pico, copy_of: Copy) -> None:
    base = pico("llama").base
    one, two = (
        copy_of(path, lambda t: t | {"vision_tower.weight": torch.ones(4)})
        for path in pico("llama").experts
    )
    heads = align(base, one, two, absent="own").heads
    assert heads is not None
    assert heads.added == {}
    assert heads.of[one.name].names == {"vision_tower.weight"}


def test_another_depth_is_no_module(pico: Pico, copy_of: Copy) -> None:
    base = pico("llama").base
    deeper = copy_of(base, lambda t: t | {"model.layers.2.mlp.down_proj.weight": torch.ones(2, 2)})
    message = refusal(base, deeper, absent="own")
    assert "expected 'model.layers' of one depth in all sources" in message
    state = {"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(2)}
    with pytest.raises(CheckpointError, match="'layers' of one depth"):
        merge(state, [state | {"layers.2.w": torch.ones(2)}], special={"absent": "own"})


# --- state dicts, and choices that are none
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["own", "base", "average"])
def test_state_dicts(policy: str) -> None:
    base = {"body.weight": torch.zeros(4, 8), "head.weight": torch.zeros(3, 4)}
    experts = [
        {"body.weight": torch.full((4, 8), k), "head.weight": torch.full((2, 4), k)}
        for k in (1.0, 3.0)
    ]
    merged = merge(base, experts, coefficients=0.5, special={"heads": policy})
    assert torch.equal(merged["body.weight"], torch.full((4, 8), 2.0))
    expected = torch.full((2, 4), 2.0) if policy == "average" else base["head.weight"]
    assert torch.equal(merged["head.weight"], expected)
    if policy == "average":
        experts[1]["head.weight"] = torch.ones(5, 4)
        with pytest.raises(CheckpointError, match=r"average: expected one shape of 'head.weight'"):
            merge(base, experts, special={"heads": policy})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": "mine"}, "special: heads: input should be 'refuse', 'own', 'base' or 'average'"),
        ({"absent": "mine"}, "special: absent: input should be .*'own', received 'mine'"),
    ],
)
def test_choices_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_policies(given)


def test_only_headers_are_read(family: Any) -> None:
    """Heads are found, and refused, before a weight is read."""
    base, odd, even = family
    opened = [open_checkpoint(str(path)) for path in (base, odd, even)]
    for path in (odd, even):
        (path / "model.safetensors").unlink()
    assert align_family(opened[0], opened[1:], TensorPolicies(heads="own")).heads is not None
    with pytest.raises(CheckpointError, match="heads: own"):
        align_family(opened[0], opened[1:], TensorPolicies())
