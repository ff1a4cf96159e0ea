"""Scores of rounded weights: the rounding, the scores, and weights that are as they were after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mergesearch.evaluators.spec.quantised
from mergesearch.evaluators import Batch
from mergesearch.merging import InputError
from mergesearch.merging.models.quantised import KINDS, QuantisedKind, quantised_weights, rounded
from mergesearch.search.spec.comparison import evaluation_digest
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import validate
from tests.evaluators.items import (
    build,
    candidate_at,
    classification,
    opened,
    pico_llama,
    pico_vit,
)

PLAIN = {"name": "accuracy", "metric": "accuracy"}
ROUNDED = {"name": "rounded", "metric": "cross_entropy"}


def kinds() -> list[Any]:
    """All kinds, the one that needs a package only where that is there."""
    import importlib.util

    missing = importlib.util.find_spec("gguf") is None
    skip = pytest.mark.skipif(missing, reason="gguf is not installed")
    return [pytest.param(kind, marks=skip) if kind == "q4_k" else kind for kind in KINDS]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_int8_and_int4_by_hand() -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(3, 300)).astype(np.float32)
    matrix[1] = 0
    for kind, greatest, group in (("int8", 127, 300), ("int4", 7, 128)):
        expected = np.zeros_like(matrix)
        for row in range(3):
            for start in range(0, 300, group):
                part = matrix[row, start : start + group]
                scale = np.abs(part).max() / np.float32(greatest)
                if scale > 0:
                    expected[row, start : start + group] = np.rint(part / scale) * scale
        ours = rounded(torch.from_numpy(matrix), kind).numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        assert len(np.unique(ours[0, :128])) <= 2 * greatest + 1
        assert not np.array_equal(ours, matrix)


def test_q4_k_is_what_a_gguf_file_holds() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from mergesearch.merging.models.q4_k import quantised

    for columns, kind in ((512, "Q4_K"), (96, "Q8_0"), (50, "F16")):
        matrix = np.random.default_rng(0).normal(size=(2, columns)).astype(np.float32)
        own = gguf.GGMLQuantizationType[kind]
        blocks = quantised(matrix) if kind == "Q4_K" else gguf.quants.quantize(matrix, own)
        ours = rounded(torch.from_numpy(matrix), "q4_k").numpy()
        assert np.array_equal(ours, gguf.quants.dequantize(blocks, own))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("make", [pico_vit, pico_llama])
def test_matrices_are_rounded_and_come_back(make: Any, kind: QuantisedKind) -> None:
    model = make()
    before = bits(model)
    with quantised_weights([model, model], kind):
        now = bits(model)
    changed = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    for name in changed:
        weight = before[name]
        assert torch.equal(now[name], rounded(weight.flatten(1), kind).view(weight.shape)), name
    linear = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    assert changed == linear - {"lm_head.weight"}
    with pytest.raises(ZeroDivisionError), quantised_weights([model], kind):
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_turned_matrices_and_fused_experts() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = gpt2.state_dict()[name].clone()  # (inputs, outputs)
    with quantised_weights([gpt2], "int8"):
        assert torch.equal(gpt2.state_dict()[name], rounded(weight.T, "int8").T)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    fused = {n: p.detach().clone() for n, p in mixtral.named_parameters() if p.ndim == 3}
    assert fused
    with quantised_weights([mixtral], "int4"):
        for name, weight in fused.items():
            expected = torch.stack([rounded(expert, "int4") for expert in weight])
            assert torch.equal(mixtral.get_parameter(name), expected), name


def test_heads_share_weights_that_are_rounded_once(model: Any) -> None:
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "classifier" not in name:
            parameter.data = model.get_parameter(name).data
    before = bits(model)
    with quantised_weights([model, other], "int4"):
        name = "vit.layers.0.mlp.fc1.weight"
        assert torch.equal(model.state_dict()[name], rounded(before[name], "int4"))
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in before.items())


def test_scores_of_rounded_weights(model: Any, data: Path) -> None:
    plain = opened(classification(data, PLAIN, ROUNDED))
    both = opened(
        classification(data, PLAIN), classification(data, ROUNDED, quantise="int4"), folder=data
    )
    before = bits(model)
    measured = both.evaluate(candidate_at([0.0], model), "search")
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in before.items())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                flat = module.weight.flatten(1)
                module.weight.copy_(rounded(flat, "int4").view(module.weight.shape))
    exact = plain.evaluate(candidate_at([0.0], model), "search").values
    expected = plain.evaluate(candidate_at([0.0], copied), "search").values
    assert measured.values == {"accuracy": exact["accuracy"], "rounded": expected["rounded"]}
    assert expected["rounded"] != exact["rounded"]


def test_one_evaluator_alone_keeps_its_abilities(model: Any, data: Path) -> None:
    plain = opened(classification(data, ROUNDED))
    alone = opened(classification(data, ROUNDED, quantise="int8"))
    assert alone.objectives == plain.objectives
    assert (alone.selects, alone.provides, alone.differentiable, alone.additive) == (
        plain.selects,
        plain.provides,
        plain.differentiable,
        plain.additive,
    )
    some = np.array([1, 4, 5])
    values = alone.evaluate(candidate_at([0.0], model), "search", some).values
    assert values != plain.evaluate(candidate_at([0.0], model), "search", some).values


def test_gradients_are_those_at_the_rounded_weights(data: Path) -> None:
    model = pico_vit()
    copied = copy.deepcopy(model)
    with quantised_weights([model], "int8"):
        copied.load_state_dict(model.state_dict())
    section = classification(data, ROUNDED, quantise="int8")
    opened(section).backward(candidate_at([0.0], model), Batch(), {"rounded": 1.0})
    plain = opened(classification(data, ROUNDED))
    plain.backward(candidate_at([0.0], copied), Batch(), {"rounded": 1.0})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, copied.get_parameter(name).grad), name


def test_the_digest_changes_only_where_it_is_set(data: Path) -> None:
    def study(**options: Any) -> StudySpec:
        section = classification(data, PLAIN, **options)
        sources = {"name": "s", "base": "b", "experts": {"e": "e"}}
        return validate(sources | {"evaluators": [section], "budget": {"trials": 2}}, "study")

    plain = study()
    assert "quantise" not in plain.to_dict()["evaluators"][0]
    assert evaluation_digest(plain) == evaluation_digest(study(quantise=None))
    rounded_ones = {evaluation_digest(study(quantise=kind)) for kind in ("int8", "int4")}
    assert len(rounded_ones - {evaluation_digest(plain)}) == 2


def test_refusals(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*sections: dict[str, Any]) -> str:
        with pytest.raises(InputError) as error:
            build(*sections)
        return str(error.value)

    line = refused(classification(data), {"kind": "distance", "quantise": "int8"})
    assert line.startswith(
        "evaluators.1.quantise: expected an evaluator that runs one merged model"
    )
    monkeypatch.setattr(mergesearch.evaluators.spec.quantised, "find_spec", lambda _name: None)
    line = refused(classification(data, quantise="q4_k"))
    assert line.startswith("evaluators.0.quantise: expected the package gguf")
