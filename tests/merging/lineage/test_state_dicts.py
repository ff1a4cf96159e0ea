"""State dicts in memory are judged as files are: the same samples, the same words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mergesearch
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.refusal import refusal
from mergesearch.merging.lineage.state_dicts import state_lineages
from mergesearch.merging.tensors.layout import Layout
from tests.merging.lineage import twins

REASON = "a control without a common start"


def _another(state: twins.State, generator: torch.Generator) -> None:
    """Weights of another origin."""
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.std())


REFUSED: list[tuple[str, str, Callable[[twins.State, torch.Generator], None]]] = [
    ("unrelated", "llama", _another),
    ("permuted", "llama", twins.permuted_units),
    ("locked", "gpt_neox", twins.turned_neox_values),
    ("rescaled", "llama", twins.rescaled_keys),
]


def _state(family: str) -> tuple[twins.State, dict[str, Any]]:
    model = twins.build(family, 1)
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, config


@pytest.mark.parametrize(("kind", "family", "change"), REFUSED, ids=[one[0] for one in REFUSED])
def test_what_files_are_refused_for_state_dicts_are_too(
    tmp_path: Path, kind: str, family: str, change: Callable[..., None]
) -> None:
    base, config = _state(family)
    expert = twins.changed(base, change)
    one, other = (
        open_checkpoint(str(twins.save(tmp_path / name, family, state)), name)
        for name, state in (("base", base), ("e", expert))
    )
    of_files = compare_weights(one, other)
    assert of_files.kind == kind
    expected = refusal(of_files).replace(one.path, "state dict").replace(other.path, "state dict")
    with pytest.raises(CheckpointError) as raised:
        mergesearch.merge(base, {"e": expert}, config=config)
    assert str(raised.value) == f'{expected}, or pass allow_unrelated="REASON"'
    with pytest.warns(UserWarning, match=f"{kind}, with .*merged all the same, as asked: {REASON}"):
        merged = mergesearch.merge(
            base, {"e": expert}, config=config, coefficients=1.0, allow_unrelated=REASON
        )
    assert all(torch.allclose(merged[name], expert[name], atol=1e-5) for name in base)


def test_experts_of_the_base_are_merged_without_a_word() -> None:
    base, config = _state("llama")
    experts = [twins.changed(base, twins.fine_tuned, seed) for seed in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mergesearch.merge(base, experts, config=config)
        mergesearch.merge(base, [experts[0], base])
    half = {name: tensor.half() for name, tensor in experts[0].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mergesearch.merge(base, [half])


def test_one_of_several_experts_is_named() -> None:
    base, _ = _state("llama")
    tuned = twins.changed(base, twins.fine_tuned)
    with pytest.raises(CheckpointError, match=r"expert '1' \(state dict\): expected weights"):
        mergesearch.merge(base, [tuned, twins.changed(base, _another)])


#: Names and configurations of fused attentions, and the first row of each group's values of 16.
FUSED = [
    (
        "model.layers.0.attention.{}.weight",
        ("wqkv", "wo"),
        {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
        (48, 112),
    ),
    (
        "transformer.encoder.layers.0.self_attention.{}.weight",
        ("query_key_value", "dense"),
        {
            "model_type": "chatglm",
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
        (96, 112),
    ),
]


@pytest.mark.parametrize(("pattern", "words", "config", "rows"), FUSED, ids=["wqkv", "chatglm"])
def test_locked_values_are_found_in_fused_attention(
    pattern: str, words: tuple[str, str], config: dict[str, Any], rows: tuple[int, int]
) -> None:
    fused, output = (pattern.format(word) for word in words)
    generator = torch.Generator().manual_seed(0)
    base = {
        fused: torch.randn(128, 64, generator=generator),
        output: torch.randn(64, 64, generator=generator),
    }
    expert = {name: tensor.clone() for name, tensor in base.items()}
    for group, start in enumerate(rows):
        turn = torch.randn(16, 16, generator=generator)
        expert[fused][start : start + 16] = turn @ base[fused][start : start + 16]
        for head in (2 * group, 2 * group + 1):
            columns = slice(16 * head, 16 * head + 16)
            expert[output][:, columns] = base[output][:, columns] @ torch.linalg.inv(turn)
    with pytest.raises(CheckpointError, match="a model locked against merging"):
        mergesearch.merge(base, [expert], config=config)


def test_too_few_weights_are_not_judged() -> None:
    base = {"layers.0.mlp.weight": torch.ones(30, 30)}
    other = {"layers.0.mlp.weight": -torch.eye(30)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mergesearch.merge(base, [other])


class _Allocated(TorchDispatchMode):
    """Counts elements of what functions return in memory of its own."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {one.untyped_storage().data_ptr() for one in args if torch.is_tensor(one)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in inputs:
            self.elements += result.numel()
        return result


def test_samples_are_read_and_no_tensor_is_copied_whole() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: torch.ones(4096, 1024, dtype=torch.bfloat16)}
    layout = Layout.build({name: ((4096, 1024), "bfloat16")})
    with _Allocated() as allocated:
        (lineage,) = state_lineages(base, [("e", base)], layout)
    assert lineage.kind == "identical"
    assert 0 < allocated.elements < 4096 * 1024 / 20
