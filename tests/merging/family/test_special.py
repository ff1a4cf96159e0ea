"""Policies for special tensors: on disk, in memory, and in a search."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mergesearch.merging import CheckpointError, Field, Recipe, RecipeError, Source, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model, folder_of_base
from mergesearch.merging.family.family import ModelFamily, align_family, open_family
from mergesearch.merging.family.special_tensors import running_statistics
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.policies import TensorPolicies, parse_policies
from mergesearch.merging.recipe_file import load_recipe, save_recipe
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel

# Resnets count their batches, and the counts of experts differ.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

Pico = Callable[[str], Any]
Copy = Callable[..., Path]
State = dict[str, torch.Tensor]


def recipe_of(
    base: Path,
    experts: Sequence[Path],
    coefficients: Sequence[float],
    operator: str = "task_arithmetic",
    **choices: Any,
) -> Recipe:
    sources = tuple(Source(f"expert {k}", str(path)) for k, path in enumerate(experts))
    special = TensorPolicies(**choices).choices
    recipe = Recipe(
        Source("base", str(base)),
        sources,
        operator,
        Field.constant(1, coefficients),
        special=special,
    )
    return recipe.with_field(Field.constant(open_family(recipe).layout.size, coefficients))


def align(base: Path, experts: Sequence[Path], **special: Any) -> ModelFamily:
    opened = [open_checkpoint(str(path)) for path in (base, *experts)]
    return align_family(opened[0], opened[1:], TensorPolicies(**special))


def searched(recipe: Recipe, folder: Path, model_class: str) -> MergedModel:
    """The resident model of a worker, written once."""
    arenas = open_arenas(recipe, folder)
    with folder_of_base(open_family(recipe), folder) as base:
        merged = MergedModel(load_model(base, model_class), arenas)
    merged.write(recipe.field)
    return merged


def agree(merged: MergedModel, exported: Path, family: Any) -> None:
    """Whether the searched model is the exported one, bit for bit."""
    model, account = family.load(exported)
    assert not account["missing_keys"]
    expected = model.state_dict()
    result = merged.model.state_dict()
    floating = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    assert floating
    assert all(torch.equal(result[name], expected[name]) for name in floating)


# --- how policies are written
# ----------------------------------------------------------------------------


def test_only_choices_that_differ_from_the_defaults_are_part_of_a_recipe(tmp_path: Path) -> None:
    field = Field.constant(4, [1.0])
    plain = Recipe(Source("b", "/b"), (Source("e", "/e"),), "average", field)
    assert plain.digest == "c8399dda2038b725"  # of recipes written before there were policies
    assert "special" not in plain.to_dict()
    same = replace(plain, special=TensorPolicies(vocabulary="same", tied="refuse").choices)
    assert (same, same.digest) == (plain, plain.digest)
    chosen = replace(plain, special=TensorPolicies(tied="untie", scalars="log").choices)
    assert chosen.special == (("scalars", "log"), ("tied", "untie"))
    assert chosen.digest != plain.digest
    assert chosen.basis_key != plain.basis_key
    for recipe in (plain, chosen):
        save_recipe(recipe, tmp_path / "recipe.json")
        assert load_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"vocabulary": "merge"},
            r"special: vocabulary: input should be 'same', .* received 'merge'",
        ),
        (
            {"batchnorm": "base"},
            "special: unknown key 'batchnorm'; known keys are vocabulary, batch_norm",
        ),
        (
            {"batch_norm": "recalibrate"},
            "special: expected calibration with batch_norm: recalibrate, and only there",
        ),
        (
            {"calibration": {"data": "x", "model_class": "AutoModel", "inputs": {"a": "b"}}},
            "expected calibration with",
        ),
        ("base", "special: expected a mapping with some of vocabulary, batch_norm"),
        (["base"], "special: expected a mapping with some of vocabulary, batch_norm"),
    ],
)
def test_choices_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_policies(given)
    data = Recipe(Source("b", "/b"), (), "average", Field.constant(4, [1.0])).to_dict()
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data | {"special": given})


def test_shorthand_recipes_may_choose(pico: Pico, tmp_path: Path) -> None:
    family = pico("resnet")
    data = {
        "base": str(family.base),
        "experts": [str(path) for path in family.experts],
        "operator": "average",
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(data | {"special": {"batch_norm": "base"}}))
    recipe = load_recipe(path)
    assert recipe.special == (("batch_norm", "base"),)
    layout = align(family.base, family.experts, batch_norm="base").layout
    assert (recipe.layout, recipe.field.size) == (layout.digest, layout.size)
    assert layout.size < align(family.base, family.experts, batch_norm="merge").layout.size
    assert export_model(recipe, tmp_path / "out").folder.is_dir()
    path.write_text(yaml.safe_dump(data | {"special": {"batch_norm": "all"}}))
    with pytest.raises(RecipeError, match="special: batch_norm: input should be"):
        load_recipe(path)


# --- running statistics
# ----------------------------------------------------------------------------


def test_running_statistics_are_known_by_their_pairs() -> None:
    names = [
        "a.running_mean",
        "a.running_var",
        "a.weight",
        "running_mean",
        "running_var",
        "b.running_mean",
        "c.var",
    ]
    assert running_statistics(names) == (
        "a.running_mean",
        "a.running_var",
        "running_mean",
        "running_var",
    )


@pytest.fixture
def normalised(pico: Pico, copy_of: Copy) -> tuple[Path, list[Path]]:
    """A pico ResNet and two experts whose running statistics differ."""
    family = pico("resnet")

    def shifted(seed: int) -> Callable[[State], State]:
        generator = torch.Generator().manual_seed(seed)

        def shift(tensors: State) -> State:
            return {
                name: t + torch.rand(t.shape, generator=generator) if "running" in name else t
                for name, t in tensors.items()
            }

        return shift

    return copy_of(family.base, shifted(0)), [
        copy_of(path, shifted(k)) for k, path in enumerate(family.experts, 1)
    ]


def statistics(folder: Path) -> State:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.tensors if "running" in name}


def test_running_statistics_need_a_policy(normalised: Any, read_tensors: Any) -> None:
    base, experts = normalised
    with pytest.raises(
        CheckpointError, match=r"a policy for the running statistics .*base \| merge \| recali"
    ):
        align(base, experts)
    with pytest.raises(CheckpointError, match="base: expected a policy for the running statistics"):
        merge(read_tensors(base), [read_tensors(path) for path in experts])


@pytest.mark.parametrize("operator", ["task_arithmetic", "average"])
def test_statistics_of_the_base_stay_exactly(
    normalised: Any, pico: Pico, read_tensors: Any, tmp_path: Path, operator: str
) -> None:
    base, experts = normalised
    recipe = recipe_of(base, experts, [0.7, 0.6], operator, batch_norm="base")
    assert not any("running" in name for name in open_family(recipe).layout.names)
    out = export_model(recipe, tmp_path / "out").folder
    assert all(
        torch.equal(tensor, statistics(base)[name]) for name, tensor in statistics(out).items()
    )
    agree(
        searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification"),
        out,
        pico("resnet"),
    )
    in_memory = merge(
        read_tensors(base),
        [read_tensors(path) for path in experts],
        operator=operator,
        coefficients=[0.7, 0.6],
        special={"batch_norm": "base"},
    )
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in read_tensors(out).items())


@pytest.mark.parametrize("operator", ["task_arithmetic", "average", "ties", "slerp", "iso_cts"])
def test_statistics_are_merged_linearly_whatever_the_operator(
    normalised: Any, pico: Pico, tmp_path: Path, operator: str
) -> None:
    base, experts = normalised
    chosen = OPERATORS[operator]
    count = 1 if chosen.experts[1] == 1 else 2
    options = chosen.complete({})
    coefficients = [0.25, 0.5][: chosen.directions(count, options)]
    recipe = recipe_of(base, experts[:count], coefficients, operator, batch_norm="merge")
    out = export_model(recipe, tmp_path / "out").folder
    own = statistics(base)
    others = [statistics(path) for path in experts[:count]]
    for name, tensor in statistics(out).items():
        changes = [other[name].double() - own[name].double() for other in others]
        if len(coefficients) < count:
            changes = [sum(changes) / count]
        expected = own[name].double() + sum(
            c * d for c, d in zip(coefficients, changes, strict=True)
        )
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    agree(
        searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification"),
        out,
        pico("resnet"),
    )


def test_other_operators_do_not_count_statistics_among_the_weights(normalised: Any) -> None:
    seen: list[Sequence[str]] = []
    ties = OPERATORS["ties"]

    def prepare(base: Any, experts: Any, **options: Any) -> Any:
        seen.extend(source.names for source in (base, *experts))
        return ties.prepare(base, experts, **options)

    family = align(*normalised, batch_norm="merge")
    basis = family.prepare(replace(ties, prepare=prepare), ties.complete({}))
    names = [name for name in family.layout.names if "running" not in name]
    assert [list(source_names) for source_names in seen] == [names] * 3
    assert len(names) < len(family.layout.names)
    statistic = next(name for name in family.layout.names if "running" in name)
    difference = family.experts[1].read(statistic) - family.base.read(statistic)
    assert torch.equal(basis.rows(statistic)[1], difference)


def test_variances_stay_positive_and_say_so(normalised: Any, pico: Pico, tmp_path: Path) -> None:
    base, experts = normalised
    recipe = recipe_of(base, experts, [-9.0, 0.0], batch_norm="merge")
    with pytest.warns(UserWarning, match=r"running_var': variances became negative"):
        out = export_model(recipe, tmp_path / "out").folder
    result = {name: tensor for name, tensor in statistics(out).items() if name.endswith("var")}
    assert all(bool((tensor > 0).all()) for tensor in result.values())
    assert any(
        bool((tensor == torch.finfo(torch.float32).tiny).any()) for tensor in result.values()
    )
    with pytest.warns(UserWarning, match="variances became negative"):
        merged = searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification")
    agree(merged, out, pico("resnet"))


def test_variances_of_zero_are_kept() -> None:
    base = {"n.running_mean": torch.zeros(3), "n.running_var": torch.tensor([0.0, 1.0, 2.0])}
    expert = {"n.running_mean": torch.ones(3), "n.running_var": torch.tensor([0.0, 3.0, 1.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = merge(base, [expert], coefficients=0.0, special={"batch_norm": "merge"})
        half = merge(base, [expert], coefficients=0.5, special={"batch_norm": "merge"})
    assert torch.equal(same["n.running_var"], base["n.running_var"])
    assert half["n.running_var"].tolist() == [0.0, 2.0, 1.5]


def _images(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(0)
    items = Dataset.from_dict({"pixels": rng.random((12, 16, 16)).astype("float32").tolist()})
    DatasetDict({"train": items}).save_to_disk(folder)
    return folder


def test_recalibration_gives_the_statistics_of_the_merged_model(
    normalised: Any, pico: Pico, tmp_path: Path
) -> None:
    from mergesearch.merging.resident.recalibration import open_recalibration

    base, experts = normalised
    calibration = {
        "data": str(_images(tmp_path / "images")),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "batch_size": 6,
    }
    recipe = recipe_of(
        base, experts, [0.5, 0.4], "ties", batch_norm="recalibrate", calibration=calibration
    )
    out = export_model(recipe, tmp_path / "out").folder
    merged = searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification")
    recalibration = open_recalibration(open_family(recipe))
    assert recalibration is not None
    assert [batch["pixel_values"].shape for batch in recalibration.batches] == [(6, 1, 16, 16)] * 2
    recalibration.apply(merged.model)
    agree(merged, out, pico("resnet"))
    # The first layer's mean does not depend on other statistics: the average of its inputs over all
    # items.
    convolution = merged.model.resnet.embedder.embedder.convolution
    with torch.inference_mode():
        inputs = convolution(torch.cat([batch["pixel_values"] for batch in recalibration.batches]))
    name = "resnet.embedder.embedder.normalization.running_mean"
    torch.testing.assert_close(
        statistics(out)[name], inputs.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    again = load_recipe(out / "recipe.yaml")
    assert again.special == recipe.special
    with pytest.raises(RecipeError, match=r"special\.calibration\.data: expected a folder"):
        align(
            base,
            experts,
            batch_norm="recalibrate",
            calibration=calibration | {"data": str(tmp_path / "no")},
        )
    special = {"batch_norm": "recalibrate", "calibration": calibration}
    with pytest.raises(
        RecipeError, match=r"for state dicts, which cannot be run, received recalibrate"
    ):
        merge({"a": torch.ones(1)}, [{"a": torch.ones(1)}], special=special)


# --- scalars
# ----------------------------------------------------------------------------

SCALARS = {"gain": (2.0, 8.0, 0.5), "logit_scale": (2.0, 3.0, 1.0), "shift": (-1.0, 2.0, 3.0)}


def scalar_states(dtype: torch.dtype = torch.float32) -> list[State]:
    return [
        {"layer.weight": torch.arange(6.0).view(2, 3) * (k + 1), "one": torch.tensor([2.0 + k])}
        | {name: torch.tensor(values[k], dtype=dtype) for name, values in SCALARS.items()}
        for k in range(3)
    ]


@pytest.mark.parametrize("operator", ["task_arithmetic", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scalars_are_averaged_as_logarithms(operator: str, dtype: torch.dtype) -> None:
    base, *experts = scalar_states(dtype)
    with pytest.warns(UserWarning, match="scalars: 'shift' are not positive everywhere"):
        result = merge(
            base, experts, operator=operator, coefficients=[0.25, 0.5], special={"scalars": "log"}
        )
    plain = merge(base, experts, operator=operator, coefficients=[0.25, 0.5])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert result["gain"].item() == pytest.approx(2 * 4**0.25 * 0.25**0.5, rel=tolerance)
    assert plain["gain"].item() == pytest.approx(2 + 0.25 * 6 - 0.5 * 1.5, rel=tolerance)
    assert result["gain"].dtype == dtype
    # A temperature that is stored as a logarithm already, vectors, and scalars of either sign are
    # as ever.
    for name in set(base) - {"gain"}:
        assert torch.equal(result[name], plain[name])
    with pytest.warns(UserWarning, match="scalars"):
        zero = merge(base, experts, operator=operator, coefficients=0.0, special={"scalars": "log"})
    assert all(torch.equal(zero[name], base[name]) for name in base)


def test_scalars_of_the_base_stay_exactly() -> None:
    base, *experts = scalar_states()
    result = merge(
        base, experts, operator="average", coefficients=[0.3, 0.6], special={"scalars": "base"}
    )
    assert all(torch.equal(result[name], base[name]) for name in SCALARS)
    assert not torch.equal(result["layer.weight"], base["layer.weight"])
    assert result["one"].item() == pytest.approx(2 + 0.3 + 1.2)


def _clip(folder: Path, seed: int, scale: float) -> Path:
    """A pico CLIP, whose temperature is a scalar parameter, and a learned gain beside it."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    text = tower | {"vocab_size": 11, "max_position_embeddings": 6, "eos_token_id": 2}
    vision = tower | {"image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    with torch.no_grad():
        model.logit_scale.fill_(scale)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("policy", ["merge", "log", "base"])
def test_a_searched_scalar_is_the_exported_one(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from transformers import CLIPModel

    # As if the model stored its temperature itself.
    monkeypatch.setattr("mergesearch.merging.family.log_scalars.is_logarithm", lambda name: False)
    base = _clip(tmp_path / "base", 0, 2.0)
    experts = [_clip(tmp_path / "one", 1, 8.0), _clip(tmp_path / "two", 2, 0.5)]
    recipe = recipe_of(
        base, experts, [0.25, 0.5], "ties" if policy == "base" else "average", scalars=policy
    )
    out = export_model(recipe, tmp_path / "out").folder
    expected = {"merge": 2 + 0.25 * 6 - 0.5 * 1.5, "log": 2 * 4**0.25 * 0.25**0.5, "base": 2.0}[
        policy
    ]
    assert open_checkpoint(str(out)).read("logit_scale").item() == pytest.approx(expected, rel=1e-6)
    if policy == "log":
        with pytest.raises(
            RecipeError,
            match="operator fisher: expected sources that can be run as they are stored",
        ):
            open_family(recipe).check(OPERATORS["fisher"])
    load = SimpleNamespace(
        load=lambda path: CLIPModel.from_pretrained(path, output_loading_info=True)
    )
    agree(searched(recipe, tmp_path / "arenas", "AutoModel"), out, load)


# --- tensors that some sources lack
# ----------------------------------------------------------------------------


@pytest.fixture
def headless(pico: Pico, copy_of: Copy) -> tuple[Path, tuple[Path, Path]]:
    """A pico ViT whose base has no classifier; the experts', two labels each, are their own."""
    family = pico("vit")
    base = copy_of(
        family.base, lambda t: {n: v for n, v in t.items() if not n.startswith("classifier.")}
    )
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}

    def two_labels(tensors: State) -> State:
        return {n: v[:2].clone() if n.startswith("classifier.") else v for n, v in tensors.items()}

    one, two = (copy_of(path, two_labels, **labels) for path in family.experts)
    return base, (one, two)


@pytest.mark.parametrize("policy", ["average", "base_zero"])
def test_new_heads(
    headless: Any, pico: Pico, read_tensors: Any, tmp_path: Path, policy: str
) -> None:
    base, experts = headless
    with pytest.raises(
        CheckpointError, match=r"extra 'classifier.bias'.*special: \{absent: base_zero \| average\}"
    ):
        align(base, experts)
    recipe = recipe_of(base, experts, [0.25, 0.5], absent=policy)
    out = export_model(recipe, tmp_path / "out").folder
    heads = [read_tensors(path)["classifier.weight"] for path in experts]
    weights = (0.5, 0.5) if policy == "average" else (0.25, 0.5)
    expected = sum(c * head for c, head in zip(weights, heads, strict=True))
    torch.testing.assert_close(read_tensors(out)["classifier.weight"], expected, rtol=0, atol=1e-6)
    assert ("classifier.weight" in open_family(recipe).layout.names) == (policy == "base_zero")
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    agree(
        searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification"), out, pico("vit")
    )
    in_memory = merge(
        read_tensors(base),
        [read_tensors(e) for e in experts],
        coefficients=[0.25, 0.5],
        special={"absent": policy},
    )
    assert set(in_memory) == set(read_tensors(out))
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in read_tensors(out).items())


def test_heads_that_do_not_go_together(headless: Any, copy_of: Copy) -> None:
    base, (one, two) = headless
    other = copy_of(two, id2label={"0": "cat", "1": "dog"})
    with pytest.raises(
        CheckpointError,
        match=r"expected the same id2label in all experts, whose heads the base lacks",
    ):
        align(base, [one, other], absent="average")
    longer = copy_of(two, lambda t: t | {"classifier.bias": torch.zeros(5)})
    with pytest.raises(
        CheckpointError, match=r"which the base lacks: expected one shape .*\[2\], \[5\]"
    ):
        align(base, [one, longer], absent="average")
    without = copy_of(base)
    with pytest.raises(CheckpointError, match=r"extra 'classifier.bias', 'classifier.weight'"):
        align(base, [one, without], absent="average")


def test_tensors_that_experts_lack_are_kept(
    pico: Pico, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    family = pico("vit")

    def bare(tensors: State) -> State:
        return {name: t for name, t in tensors.items() if not name.startswith("classifier.")}

    none = [copy_of(path, bare) for path in family.experts]
    one = [copy_of(family.experts[0], bare), family.experts[1]]
    with pytest.raises(CheckpointError, match=r"missing 'classifier.bias', 'classifier.weight'"):
        align(family.base, none)
    head, other = (
        read_tensors(path)["classifier.weight"] for path in (family.base, family.experts[1])
    )
    recipe = recipe_of(family.base, none, [0.3, 0.4], "average", absent="average")
    out = export_model(recipe, tmp_path / "none").folder
    assert torch.equal(read_tensors(out)["classifier.weight"], head)
    agree(searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification"), out, family)
    out = export_model(
        recipe_of(family.base, one, [0.3, 0.4], absent="base_zero"), tmp_path / "one"
    ).folder
    torch.testing.assert_close(read_tensors(out)["classifier.weight"], head + 0.4 * (other - head))
    states = [read_tensors(path) for path in (family.base, *one)]
    in_memory = merge(
        states[0], states[1:], coefficients=[0.3, 0.4], special={"absent": "base_zero"}
    )
    assert torch.equal(in_memory["classifier.weight"], read_tensors(out)["classifier.weight"])


# --- ties
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert"])
@pytest.mark.parametrize("turned", [False, True], ids=["tied base", "untied base"])
def test_untying(
    name: str, turned: bool, pico: Pico, build_model: Any, tmp_path: Path, read_tensors: Any
) -> None:
    family = pico(name)
    untied = tmp_path / "untied"
    build_model(name, seed=5, tie_word_embeddings=False).save_pretrained(untied)
    base, experts = (
        (untied, [family.base, family.experts[0]])
        if turned
        else (family.base, [untied, family.experts[0]])
    )
    with pytest.raises(
        CheckpointError, match=r"(extra|missing) .*give all sources heads of their own with .*untie"
    ):
        align(base, experts)
    with pytest.raises(CheckpointError, match=r"extra|missing"):
        align(base, experts, absent="average")
    recipe = recipe_of(base, experts, [0.25, 0.5], tied="untie")
    out = export_model(recipe, tmp_path / "out").folder
    states = [read_tensors(path) for path in (base, *experts)]
    merged = read_tensors(out)
    head = next(n for n in merged if n.endswith(("lm_head.weight", "decoder.weight")))
    embedding = next(
        n
        for n in merged
        if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    )
    heads = [state.get(head, state[embedding]) for state in states]
    expected = heads[0] + 0.25 * (heads[1] - heads[0]) + 0.5 * (heads[2] - heads[0])
    torch.testing.assert_close(merged[head], expected, rtol=0, atol=1e-6)
    assert not torch.equal(merged[head], merged[embedding])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    auto = "AutoModelForMaskedLM" if name == "bert" else "AutoModelForCausalLM"
    agree(searched(recipe, tmp_path / "arenas", auto), out, family)


def test_an_expert_whose_copies_differ(
    pico: Pico, copy_of: Copy, read_tensors: Any, tmp_path: Path
) -> None:
    family = pico("gpt2")
    odd = copy_of(
        family.experts[0], lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}
    )
    recipe = recipe_of(family.base, [odd], [1.0])
    with pytest.raises(CheckpointError, match=r"expected tied tensors .* to be equal"):
        export_model(recipe, tmp_path / "refused")
    out = export_model(recipe_of(family.base, [odd], [1.0], tied="untie"), tmp_path / "out").folder
    merged = read_tensors(out)
    expert = read_tensors(odd)
    torch.testing.assert_close(
        merged["lm_head.weight"], expert["lm_head.weight"], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        merged["transformer.wte.weight"], expert["transformer.wte.weight"], rtol=0, atol=1e-5
    )


def test_nothing_is_untied_where_all_are_tied(pico: Pico) -> None:
    family = pico("llama_tied")
    aligned = align(family.base, family.experts, tied="untie")
    assert aligned.layout == align(family.base, family.experts).layout
    assert not aligned.rebuilt


def test_state_dicts_are_untied_on_request() -> None:
    shared = torch.ones(3)
    base = {"a": shared, "b": shared}
    expert = {"a": torch.ones(3) * 2, "b": torch.ones(3) * 4}
    with pytest.raises(CheckpointError, match="tied in the base"):
        merge(base, [expert])
    result = merge(base, [expert], coefficients=1.0, special={"tied": "untie"})
    assert result["a"].tolist() == [2.0] * 3
    assert result["b"].tolist() == [4.0] * 3


# --- integers, and what does not go together
# -----------------------------------------------------------------------


def test_integers_that_differ_are_warned_of(pico: Pico, copy_of: Copy, tmp_path: Path) -> None:
    family = pico("vit")
    base, same, other = (
        copy_of(family.base, lambda t, k=k: t | {"position_ids": torch.arange(4) + k})
        for k in (0, 0, 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_model(recipe_of(base, [same], [1.0]), tmp_path / "same")
    expected = "integer tensors differ and are copied from the base: 'position_ids'"
    with pytest.warns(UserWarning, match=expected):
        out = export_model(recipe_of(base, [same, other], [1.0, 1.0]), tmp_path / "out").folder
    assert open_checkpoint(str(out)).read("position_ids").tolist() == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match=expected):
        open_arenas(recipe_of(base, [other], [1.0]), tmp_path / "arenas")
    with pytest.warns(
        UserWarning, match="integer tensors differ and are copied from the base: 'n'"
    ):
        merge(
            {"a": torch.ones(1), "n": torch.tensor(1)}, [{"a": torch.ones(1), "n": torch.tensor(2)}]
        )


def test_state_dicts_have_no_tokens() -> None:
    state = {"a": torch.ones(1)}
    with pytest.raises(RecipeError, match=r"special\.vocabulary: expected same for state dicts"):
        merge(state, [state], special={"vocabulary": "union"})
    with pytest.raises(RecipeError, match="special: unknown key 'vocab'"):
        merge(state, [state], special={"vocab": "union"})


def test_policies_combine(pico: Pico, tmp_path: Path, copy_of: Copy) -> None:
    """A head that the base lacks, statistics of the base, in one model."""
    family = pico("resnet")
    base = copy_of(
        family.base, lambda t: {n: v for n, v in t.items() if not n.startswith("classifier.")}
    )
    recipe = recipe_of(
        base, family.experts, [0.25, 0.5], "ties", absent="average", batch_norm="base"
    )
    out = export_model(recipe, tmp_path / "out").folder
    agree(searched(recipe, tmp_path / "arenas", "AutoModelForImageClassification"), out, family)
    assert all(torch.equal(t, statistics(family.base)[n]) for n, t in statistics(out).items())
