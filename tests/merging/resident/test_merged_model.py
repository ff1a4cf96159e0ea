"""A bound model computes what transformers computes from exported weights, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import (
    CheckpointError,
    Field,
    InputError,
    MergesearchError,
    NonFiniteError,
    Recipe,
    RecipeError,
    Source,
)
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.in_memory import merge_stream
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel

# Experts count their steps and batches; that merges say so is tested with the policies for special
# tensors.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

Pico = Callable[[str], Any]

AUTO = {
    "ViTForImageClassification": "AutoModelForImageClassification",
    "ResNetForImageClassification": "AutoModelForImageClassification",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
}
FAMILIES = ["vit", "bert", "gpt2", "llama", "llama_tied", "llama_bf16", "resnet"]


def recipe_of(base: Path, experts: Sequence[Path], operator: str = "average") -> Recipe:
    sources = tuple(Source(path.name, str(path)) for path in experts)
    special = (("batch_norm", "merge"),) if "resnet" in str(base) else ()
    field = Field.constant(1, [0.0] * len(sources))
    return Recipe(Source("base", str(base)), sources, operator, field, special=special)


def bind(family: Any, folder: Path, operator: str = "average", **options: Any) -> MergedModel:
    arenas = open_arenas(recipe_of(family.base, family.experts, operator), folder / "arenas")
    return MergedModel(load_model(str(family.base), AUTO[family.model_class]), arenas, **options)


def output(model: torch.nn.Module) -> torch.Tensor:
    """Logits for fixed input of the kind that the model takes."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if model.config.model_type in ("vit", "resnet"):
            size = getattr(model.config, "image_size", 16)
            pixels = torch.randn((2, 1, size, size), generator=generator)
            return model(pixel_values=pixels.to(model.dtype)).logits
        return model(input_ids=torch.randint(0, 96, (2, 9), generator=generator)).logits


def constant(merged: MergedModel, coefficients: Sequence[float]) -> Field:
    return Field.constant(merged.merged.numel(), coefficients)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_one_hot_average_computes_what_the_expert_computes(
    pico: Pico, tmp_path: Path, name: str
) -> None:
    family = pico(name)
    merged = bind(family, tmp_path)
    outputs = []
    for coefficients, path in zip(
        ([1, 0], [0, 1], [0, 0]), (*family.experts, family.base), strict=True
    ):
        merged.write(constant(merged, coefficients))
        outputs.append(output(merged.model))
        assert torch.equal(outputs[-1], output(family.load(path)[0].eval()))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("operator", ["average", "task_arithmetic"])
@pytest.mark.parametrize("name", FAMILIES)
def test_holds_the_bits_that_an_export_writes(
    pico: Pico, tmp_path: Path, name: str, operator: str
) -> None:
    family = pico(name)
    merged = bind(family, tmp_path, operator)
    base, *experts = (open_checkpoint(str(path)) for path in (family.base, *family.experts))
    layout = open_arenas(
        recipe_of(family.base, family.experts, operator), tmp_path / "arenas"
    ).layout
    middle = layout.tensors[len(layout.tensors) // 2].start
    field = Field(np.array([0, middle, layout.size]), np.array([[0.3, 0.5], [0.1, -0.2]]))
    merged.write(field)
    for tensor_name, tensor in merge_stream(base, experts, operator, {}, field, layout):
        spec = layout.by_name[tensor_name]
        assert torch.equal(merged.merged[spec.start : spec.stop].view(spec.shape), tensor)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_lies_in_the_buffer_and_ties_share_a_slice(
    pico: Pico, tmp_path: Path, name: str
) -> None:
    merged = bind(pico(name), tmp_path)
    first = merged.merged.data_ptr()
    last = merged.merged.data_ptr() + merged.merged.nbytes
    parameters = dict(merged.model.named_parameters(remove_duplicate=False))
    assert all(first <= p.data_ptr() < last for p in parameters.values())
    if name == "llama_tied":
        assert (
            parameters["lm_head.weight"].data_ptr()
            == parameters["model.embed_tokens.weight"].data_ptr()
        )
    merged.check_binding()


def test_writing_leaves_the_arenas_alone_and_depends_on_nothing_before(
    pico: Pico, tmp_path: Path
) -> None:
    family = pico("vit")
    arenas = open_arenas(recipe_of(family.base, family.experts), tmp_path)
    before = np.array(arenas.memory)
    merged = MergedModel(
        load_model(str(family.base), "AutoModelForImageClassification"), arenas, threads=2
    )
    merged.write(constant(merged, [0.3, 0.4]))
    bits = merged.merged.clone()
    merged.write(constant(merged, [5, -5]))
    merged.write(constant(merged, [0.3, 0.4]))
    assert torch.equal(merged.merged, bits)
    assert np.array_equal(arenas.memory, before)


def test_integer_buffers_stay_those_of_the_base(pico: Pico, tmp_path: Path) -> None:
    family = pico("resnet")
    merged = bind(family, tmp_path)
    merged.write(constant(merged, [1, 0]))
    base = family.load(family.base)[0].state_dict()
    counters = [name for name, tensor in base.items() if not tensor.is_floating_point()]
    assert counters
    assert all(torch.equal(merged.model.state_dict()[name], base[name]) for name in counters)


@pytest.mark.parametrize("operator", ["average", "task_arithmetic"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_named(
    pico: Pico, tmp_path: Path, bad: float, operator: str
) -> None:
    merged = bind(pico("vit"), tmp_path, operator)
    good = constant(merged, [0.5, 0.5])
    layout = merged.layout
    spec = layout.tensors[3]
    edges = [0, spec.start, layout.tensors[5].start, layout.size]
    with pytest.raises(NonFiniteError) as caught:
        merged.write(Field(np.array(edges), np.array([[0.1, bad, 0.1], [0.1, 0.2, 0.3]])))
    assert caught.value.where == f"tensor {spec.name!r}"
    merged.write(good)  # the next trial is not harmed
    assert torch.isfinite(output(merged.model)).all()


def test_large_but_finite_weights_are_not_refused(
    pico: Pico, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    huge = copy_of(
        pico("vit").base, lambda tensors: {n: torch.full_like(t, 3e38) for n, t in tensors.items()}
    )
    arenas = open_arenas(recipe_of(pico("vit").base, [huge]), tmp_path / "arenas")
    merged = MergedModel(
        load_model(str(pico("vit").base), "AutoModelForImageClassification"), arenas
    )
    merged.write(constant(merged, [1.0]))
    assert torch.isinf(merged.merged.sum())


def test_a_model_that_was_moved_or_cast_is_refused(pico: Pico, tmp_path: Path) -> None:
    merged = bind(pico("vit"), tmp_path)
    merged.model.double()
    with pytest.raises(
        MergesearchError, match=r"expected inside the merged buffer.*do not move or cast"
    ):
        merged.write(constant(merged, [0.5, 0.5]))


def test_refuses_a_field_of_another_size(pico: Pico, tmp_path: Path) -> None:
    merged = bind(pico("vit"), tmp_path)
    with pytest.raises(RecipeError, match="expected a field of 2 directions, received 3"):
        merged.write(constant(merged, [0.1, 0.2, 0.3]))


def test_mixed_dtypes_round_each_tensor_to_its_own(
    pico: Pico, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    family = pico("vit")
    base = copy_of(
        family.base, lambda ts: {n: t.bfloat16() if "attention" in n else t for n, t in ts.items()}
    )
    arenas = open_arenas(recipe_of(base, family.experts), tmp_path / "arenas")
    merged = MergedModel(load_model(str(base), "AutoModelForImageClassification"), arenas)
    field = constant(merged, [0.3, 0.3])
    merged.write(field)
    assert merged.merged.dtype == torch.float32
    sources = [open_checkpoint(str(path)) for path in (base, *family.experts)]
    streamed = dict(merge_stream(sources[0], sources[1:], "average", {}, field, arenas.layout))
    assert {t.dtype for t in streamed.values()} == {torch.bfloat16, torch.float32}
    for spec in arenas.layout.tensors:
        held = merged.merged[spec.start : spec.stop].view(spec.shape)
        assert torch.equal(held, streamed[spec.name].float())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and an expert that are mixtures of experts.

    They are stored expert by expert, and held in memory as fused tensors.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    root = tmp_path_factory.mktemp("mixtral")
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    folders = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(root / str(seed))
        folders.append(root / str(seed))
    return folders


def test_parts_of_fused_parameters_are_written_in_place(
    mixtral: list[Path], tmp_path: Path
) -> None:
    arenas = open_arenas(recipe_of(mixtral[0], mixtral[1:]), tmp_path)
    assert any(name.endswith("experts.3.w1.weight") for name in arenas.layout.names)
    merged = MergedModel(load_model(str(mixtral[0]), "AutoModelForCausalLM"), arenas)
    merged.write(constant(merged, [1.0]))
    expert = load_model(str(mixtral[1]), "AutoModelForCausalLM")
    state = merged.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expert.state_dict().items())
    assert torch.equal(output(merged.model), output(expert))


def test_refuses_a_class_that_needs_weights_that_are_not_there(pico: Pico) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"expected every weight of .*QuestionAnswering, missing \['qa_outputs",
    ):
        load_model(str(pico("bert").base), "AutoModelForQuestionAnswering")


def test_refuses_a_class_that_leaves_stored_weights_out(pico: Pico, tmp_path: Path) -> None:
    family = pico("llama")
    arenas = open_arenas(recipe_of(family.base, family.experts), tmp_path)
    model = load_model(str(family.base), "AutoModel")
    with pytest.raises(
        CheckpointError, match=r"tensor 'lm_head.weight': expected a parameter of LlamaModel"
    ):
        MergedModel(model, arenas)


@pytest.mark.parametrize(
    "name", ["AutoModelForEverything", "ViTForImageClassification", "AutoTokenizer"]
)
def test_refuses_what_is_no_auto_class(pico: Pico, name: str) -> None:
    with pytest.raises(
        InputError, match=rf"expected a transformers auto class .*received '{name}'"
    ):
        load_model(str(pico("vit").base), name)


def test_refuses_a_checkpoint_without_configuration(pico: Pico) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder with config\.json"):
        load_model(str(pico("vit").base / "model.safetensors"), "AutoModelForImageClassification")


def test_loads_in_evaluation_mode_in_the_stored_dtype(
    pico: Pico, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(str(pico("llama_bf16").base), "AutoModelForCausalLM")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "Loading weights" not in capfd.readouterr().err
