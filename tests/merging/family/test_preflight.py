"""What does not fit its base is refused from headers alone, by the names of its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.preflight import check_family, layout_of
from mergesearch.merging.tensors.layout import Layout


def _open(*folders: Path) -> list[Checkpoint]:
    return [open_checkpoint(str(folder)) for folder in folders]


def _refusal(base: Path, expert: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_family(*_open(base), _open(expert))
    message = str(caught.value)
    assert "\n" not in message
    assert str(expert) in message
    assert str(base) in message
    return message


@pytest.mark.parametrize(
    "name", ["vit", "bert", "llama", "llama_tied", "llama_bf16", "gpt2", "resnet"]
)
def test_experts_of_a_base_share_its_layout(name, pico):
    family = pico(name)
    base, *experts = _open(family.base, *family.experts)
    layout = check_family(base, experts)
    assert layout == layout_of(base)
    assert layout.names == base.names
    assert {spec.name: (spec.shape, spec.dtype) for spec in layout.tensors} == base.merged


def test_order_of_storage_does_not_change_the_layout(pico, copy_of):
    base = pico("vit").base
    turned = copy_of(base, lambda tensors: dict(reversed(tensors.items())))
    assert layout_of(*_open(turned)).digest == layout_of(*_open(base)).digest


def test_other_precisions_are_allowed(pico, copy_of):
    base = pico("llama").base
    half = copy_of(base, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert all(spec.dtype == "float32" for spec in check_family(*_open(base), _open(half)).tensors)
    assert all(spec.dtype == "bfloat16" for spec in check_family(*_open(half), _open(base)).tensors)


def test_a_tied_copy_on_one_side_only_is_allowed(pico, copy_of):
    base = pico("gpt2").base
    twice = copy_of(base, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    assert check_family(*_open(base), _open(twice)) == check_family(*_open(twice), _open(base))


def test_a_tied_base_refuses_an_untied_expert(pico):
    message = _refusal(pico("llama_tied").base, pico("llama").base)
    assert "extra 'lm_head.weight'" in message


def test_carried_tensors_are_not_compared(pico, copy_of):
    base = pico("resnet").base
    bare = copy_of(base, lambda t: {name: v for name, v in t.items() if v.is_floating_point()})
    assert check_family(*_open(base), _open(bare)) == check_family(*_open(bare), _open(base))


def test_missing_and_extra_tensors_are_both_listed(pico, copy_of):
    base = pico("vit").base

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("classifier.", "head."): t for name, t in tensors.items()}

    message = _refusal(base, copy_of(base, rename))
    assert (
        "missing 'classifier.bias', 'classifier.weight'; extra 'head.bias', 'head.weight'"
        in message
    )


def test_long_lists_are_shortened_with_their_count(pico, copy_of):
    base = pico("vit").base
    message = _refusal(base, copy_of(base, lambda t: {"classifier.bias": t["classifier.bias"]}))
    total = len(open_checkpoint(str(base)).names) - 1
    assert f"and {total - 6} more ({total} in all)" in message
    assert message.count("'vit.") + message.count("'classifier.") == 6


def test_other_shapes(pico, copy_of):
    base = pico("vit").base
    message = _refusal(base, copy_of(base, lambda t: t | {"classifier.weight": torch.zeros(3, 8)}))
    assert "expected shape [3, 16], received [3, 8] in 'classifier.weight'" in message


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_other_vocabularies_are_called_so(name, pico, build_model, tmp_path):
    build_model(name, vocab_size=101).save_pretrained(tmp_path / "larger")
    message = _refusal(pico(name).base, tmp_path / "larger")
    assert "expected vocabulary size 96, received 101 in " in message
    assert "mbed" in message or "wte" in message


def test_floating_point_against_integers(pico, copy_of):
    base = pico("vit").base
    integer = copy_of(base, lambda t: t | {"classifier.bias": torch.zeros(3, dtype=torch.int64)})
    assert "tensor 'classifier.bias': expected float32, received int64" in _refusal(base, integer)
    assert "tensor 'classifier.bias': expected int64, received float32" in _refusal(integer, base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["Other"]),
        ("num_attention_heads", 4),
        ("rope_parameters", {"a": 1}),
    ],
)
def test_settings_that_change_the_meaning_of_tensors(key, value, pico, copy_of):
    base = pico("llama").base
    message = _refusal(base, copy_of(base, **{key: value}))
    assert f"expected {key} " in message
    assert f"received {value!r}" in message


def test_a_single_file_has_no_configuration_to_compare(pico):
    family = pico("vit")
    assert check_family(*_open(family.base), _open(family.experts[0] / "model.safetensors"))


def test_nothing_to_merge(tmp_path):
    save_file({"steps": torch.zeros(1, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected floating-point tensors"):
        layout_of(open_checkpoint(str(tmp_path / "x.safetensors")))


def test_only_headers_are_read(pico, copy_of, monkeypatch):
    family = pico("vit")
    folder = copy_of(family.base)
    checkpoint = open_checkpoint(str(folder))
    # With the weights gone, a look at them would fail.
    (folder / "model.safetensors").unlink()
    assert isinstance(check_family(checkpoint, [checkpoint]), Layout)
