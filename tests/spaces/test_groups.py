"""Tensors get roles by name, and groups cover a layout, for real and for arbitrary names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import InputError, Layout
from mergesearch.spaces import GRANULARITIES, Granularity, TensorRole, classify, group_tensors

ROLES = {
    # ViT as stored before transformers 5, and as held in memory
    "vit.encoder.layer.3.attention.attention.query.weight": TensorRole(
        3, "attention", "", "attention"
    ),
    "vit.encoder.layer.3.attention.output.dense.bias": TensorRole(3, "attention", "", "attention"),
    "vit.encoder.layer.3.intermediate.dense.weight": TensorRole(3, "mlp", "", "mlp"),
    "vit.encoder.layer.3.output.dense.weight": TensorRole(3, "mlp", "", "mlp"),
    "vit.encoder.layer.3.layernorm_before.weight": TensorRole(3, "norm", "", "attention"),
    "vit.encoder.layer.3.layernorm_after.weight": TensorRole(3, "norm", "", "mlp"),
    "encoder.layer.11.layernorm_after.bias": TensorRole(11, "norm", "", "mlp"),
    "vit.layers.3.attention.q_proj.weight": TensorRole(3, "attention", "", "attention"),
    "vit.layers.3.mlp.fc1.weight": TensorRole(3, "mlp", "", "mlp"),
    "vit.embeddings.cls_token": TensorRole(None, "embedding", "", "embedding"),
    "vit.layernorm.weight": TensorRole(None, "norm", "", "final"),
    "classifier.weight": TensorRole(None, "head", "", "head"),
    # BERT
    "bert.encoder.layer.10.attention.self.query.weight": TensorRole(
        10, "attention", "", "attention"
    ),
    "bert.encoder.layer.10.attention.output.LayerNorm.weight": TensorRole(
        10, "norm", "", "attention"
    ),
    "bert.encoder.layer.10.output.LayerNorm.bias": TensorRole(10, "norm", "", "mlp"),
    "bert.embeddings.LayerNorm.weight": TensorRole(None, "norm", "", "embedding"),
    "bert.pooler.dense.weight": TensorRole(None, "head", "", "head"),
    "cls.predictions.transform.LayerNorm.weight": TensorRole(None, "norm", "", "head"),
    "cls.predictions.decoder.weight": TensorRole(None, "head", "", "head"),
    # GPT-2, with and without prefix
    "transformer.h.0.attn.c_attn.weight": TensorRole(0, "attention", "", "attention"),
    "h.0.mlp.c_proj.bias": TensorRole(0, "mlp", "", "mlp"),
    "h.7.ln_1.weight": TensorRole(7, "norm", "", "attention"),
    "h.7.ln_2.weight": TensorRole(7, "norm", "", "mlp"),
    "wpe.weight": TensorRole(None, "embedding", "", "embedding"),
    "transformer.ln_f.weight": TensorRole(None, "norm", "", "final"),
    # Llama and its relatives
    "model.layers.31.self_attn.q_proj.weight": TensorRole(31, "attention", "", "attention"),
    "model.layers.31.self_attn.q_norm.weight": TensorRole(31, "norm", "", "attention"),
    "model.layers.31.input_layernorm.weight": TensorRole(31, "norm", "", "attention"),
    "model.layers.31.post_attention_layernorm.weight": TensorRole(31, "norm", "", "mlp"),
    "layers.2.mlp.gate_proj.weight": TensorRole(2, "mlp", "", "mlp"),
    "model.embed_tokens.weight": TensorRole(None, "embedding", "", "embedding"),
    "model.norm.weight": TensorRole(None, "norm", "", "final"),
    "lm_head.weight": TensorRole(None, "head", "", "head"),
    # the number of an expert is no block
    "model.layers.2.mlp.experts.17.gate_proj.weight": TensorRole(2, "mlp", "", "mlp"),
    "model.layers.2.block_sparse_moe.experts.7.w1.weight": TensorRole(2, "mlp", "", "mlp"),
    "model.layers.2.mlp.shared_expert.up_proj.weight": TensorRole(2, "mlp", "", "mlp"),
    "experts.3.layers.weight": TensorRole(None, "mlp", "", "mlp"),
    # towers
    "vision_model.encoder.layers.4.self_attn.k_proj.weight": TensorRole(
        4, "attention", "vision", "attention"
    ),
    "text_model.encoder.layers.4.layer_norm2.weight": TensorRole(4, "norm", "text", "mlp"),
    "vision_tower.vision_model.encoder.layers.4.mlp.fc2.bias": TensorRole(
        4, "mlp", "vision", "mlp"
    ),
    "visual.blocks.5.attn.qkv.weight": TensorRole(5, "attention", "vision", "attention"),
    "model.language_model.layers.5.mlp.up_proj.weight": TensorRole(5, "mlp", "text", "mlp"),
    "vision_model.head.layernorm.weight": TensorRole(None, "norm", "vision", "head"),
    "vision_model.post_layernorm.weight": TensorRole(None, "norm", "vision", "final"),
    # no known family: words tell the module; entries of a Sequential are no blocks
    "mixer.blocks.12.conv.weight": TensorRole(12, "convolution", "", "convolution"),
    "encoder.block.3.layer.0.SelfAttention.q.weight": TensorRole(3, "attention", "", "attention"),
    "projector.0.weight": TensorRole(None, "projector", "", "projector"),
    # a single letter tells a projection only where attention stands around it
    "layers.0.attn.o.weight": TensorRole(0, "attention", "", "attention"),
    "layers.0.O.weight": TensorRole(0, "other", "", "other"),
    "O.0.weight": TensorRole(None, "other", "", "other"),
    "D.0.weight": TensorRole(None, "other", "", "other"),
    "layers.0.mixer.D": TensorRole(0, "state_space", "", "state_space"),
    # nothing that is known: numbered blocks still count
    "model.layers.4.foo.weight": TensorRole(4, "other", "", "other"),
    "foo.0.weight": TensorRole(None, "other", "", "other"),
    "sublayers.3.weight": TensorRole(None, "other", "", "other"),
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_role(name: str, role: TensorRole) -> None:
    assert classify(name) == role


def test_every_parameter_of_a_real_model_has_a_module(family: str, shapes_of: Callable) -> None:
    other = [
        name
        for name in shapes_of(family)
        if "other" in (classify(name).module, classify(name).part)
    ]
    assert not other


def test_every_block_of_a_real_model_has_attention_mlp_and_norms(
    family: str, shapes_of: Callable
) -> None:
    roles = {classify(name) for name in shapes_of(family)}
    blocks = {(role.tower, role.block) for role in roles if role.block is not None}
    towers = {"vision": 3, "text": 2} if family in ("clip", "siglip") else {"": 3}
    assert blocks == {(tower, block) for tower, count in towers.items() for block in range(count)}
    for tower, block in blocks:
        of_block = {(p.module, p.part) for p in roles if (p.tower, p.block) == (tower, block)}
        expected = {
            ("attention", "attention"),
            ("mlp", "mlp"),
            ("norm", "attention"),
            ("norm", "mlp"),
        }
        assert of_block == expected
    assert {"embedding", "head"} <= {role.part for role in roles}


def test_modules_follow_the_words_of_the_names(family: str, shapes_of: Callable) -> None:
    for name in shapes_of(family):
        role = classify(name)
        words = name.lower().replace("_", "")
        if "norm" in words or "layrnorm" in words or ".ln" in words:
            assert role.module == "norm", name
        elif role.block is not None:
            assert (role.module == "attention") == ("attn" in words or "attention" in words), name


def test_stored_names_are_placed_as_the_names_in_memory(tmp_path: Path) -> None:
    import transformers
    from safetensors import safe_open

    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as stored:
        names = list(stored.keys())
    memory = [name for name, _ in model.named_parameters()]
    assert sorted(map(repr, map(classify, names))) == sorted(map(repr, map(classify, memory)))


def test_mixture_of_experts_stored_one_by_one_stays_in_its_block(tmp_path: Path) -> None:
    import transformers
    from safetensors import safe_open

    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as stored:
        experts = [name for name in stored.keys() if ".experts." in name]  # noqa: SIM118 - not a mapping
    assert experts
    assert {classify(name).block for name in experts} == {0, 1}
    assert {classify(name).module for name in experts} == {"mlp"}


def test_group_names_of_a_vision_transformer(layout_of: Callable) -> None:
    names = {
        granularity: [g.name for g in group_tensors(layout_of("vit"), granularity)]
        for granularity in GRANULARITIES
    }
    assert names["global"] == names["task"] == ["all"]
    assert names["module"] == ["attention", "mlp", "norm", "embedding", "head"]
    assert names["block"] == ["embedding", "block 0", "block 1", "block 2", "final", "head"]
    assert names["block_module"] == [
        "embedding",
        *(f"block {block}/{part}" for block in range(3) for part in ("attention", "mlp")),
        "final",
        "head",
    ]
    assert names["tensor"] == list(layout_of("vit").names)


def test_each_tower_has_its_own_depth(layout_of: Callable) -> None:
    depths = {
        group.name: group.depth
        for group in group_tensors(layout_of("clip"), "block")
        if group.depth is not None
    }
    assert depths == {
        "text/block 0": 0.0,
        "text/block 1": 1.0,
        "vision/block 0": 0.0,
        "vision/block 1": 0.5,
        "vision/block 2": 1.0,
    }


def test_depth_counts_the_blocks_present() -> None:
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in (3, 7, 8, 40, 41)]
    layout = Layout.build(dict.fromkeys(names, ((4,), "float32")))
    groups = group_tensors(layout, "block")
    assert [group.name for group in groups] == [
        "block 3",
        "block 7",
        "block 8",
        "block 40",
        "block 41",
    ]
    assert [group.depth for group in groups] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_ten_blocks_are_in_numeric_order() -> None:
    layout = Layout.build({f"h.{block}.mlp.c_fc.weight": ((4,), "float32") for block in range(12)})
    assert [group.name for group in group_tensors(layout, "block")] == [
        f"block {block}" for block in range(12)
    ]


def test_no_blocks_is_refused() -> None:
    layout = Layout.build({"weight": ((3,), "float32"), "bias": ((1,), "float32")})
    with pytest.raises(InputError, match=r"'block' needs numbered blocks.*'bias'.*use 'task'"):
        group_tensors(layout, "block")


NAMES = st.sampled_from(
    [*ROLES, "weight", "layers.0.weight", "a.b.c", "model.layers.9.other.weight"]
)
SHAPES = st.lists(st.integers(0, 70), max_size=2).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=20),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_groups_cover_every_tensor_once(
    shapes: dict[str, tuple[int, ...]], granularity: Granularity
) -> None:
    layout = Layout.build({name: (shape, "float32") for name, shape in shapes.items()})
    if granularity in ("block", "block_module") and all(
        classify(name).block is None for name in shapes
    ):
        granularity = "module"
    groups = group_tensors(layout, granularity)
    assert sorted(name for group in groups for name in group.tensors) == sorted(layout.names)
    assert sum(group.parameters for group in groups) == layout.parameters
    assert len({group.name for group in groups}) == len(groups)
    # The ranges tile the flat index: no gap, no overlap, padding included.
    ranges = sorted(span for group in groups for span in group.ranges)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert (ranges[-1][1] if ranges else 0) == layout.size
    for group in groups:
        for name in group.tensors:
            spec = layout.by_name[name]
            assert spec.size == 0 or any(
                start <= spec.start and spec.stop <= stop for start, stop in group.ranges
            )


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ("global", "task"),
        ("task", "module"),
        ("module", "tensor"),
        ("block", "block_module"),
        ("block_module", "tensor"),
    ],
)
def test_finer_granularities_split_coarser_ones(
    coarse: Granularity, fine: Granularity, family: str, layout_of: Callable
) -> None:
    members = [set(group.tensors) for group in group_tensors(layout_of(family), coarse)]
    for group in group_tensors(layout_of(family), fine):
        assert sum(set(group.tensors) <= tensors for tensors in members) == 1
