"""Roles, towers and blocks of many architectures, read from the names of their tensors."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.merging import Layout
from mergesearch.merging.tensors.roles import TensorRole, block_axes, roles_of
from mergesearch.search.plan.anchors import lines_field
from mergesearch.spaces import group_tensors
from tests.architectures.structure import NAMES, expected_towers, shapes_of, share_without_a_role
from tests.architectures.table import PAGE, STRUCTURE, described, rows_of

#: Share of the parameters that may be without a role.
BAR = 0.05


def test_there_are_forty_architectures_at_least() -> None:
    assert len(NAMES) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_nearly_every_parameter_has_a_role(name: str) -> None:
    assert share_without_a_role(shapes_of(name)) <= BAR


@pytest.mark.parametrize("name", NAMES)
def test_towers_and_their_blocks_are_found(name: str) -> None:
    expected = expected_towers(name)
    axes = block_axes(roles_of(shapes_of(name)).values())
    assert {tower: len(blocks) for tower, blocks in axes.items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_granularity_has_groups(name: str) -> None:
    layout = Layout.build({tensor: (shape, "float32") for tensor, shape in shapes_of(name).items()})
    towers = block_axes(roles_of(layout.names).values())
    blocks = group_tensors(layout, "block")
    assert sum(group.depth is not None for group in blocks) == sum(map(len, towers.values()))
    assert len({group.name for group in blocks}) == len(blocks)
    for granularity in ("module", "block_module", "tensor"):
        groups = group_tensors(layout, granularity)
        assert sum(len(group.tensors) for group in groups) == len(layout.names)


def roles(name: str) -> dict[str, TensorRole]:
    return dict(roles_of(shapes_of(name)))


def depth_order(name: str) -> list[str]:
    """Blocks of the main tower as tables show them, in the order of depth."""
    found = {role.block: role.block_name for role in roles(name).values() if not role.tower}
    return [label for block, label in sorted((b, n) for b, n in found.items() if b is not None)]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("swin", ["0.0", "1.0", "1.1"]),
        ("timm_resnet", ["1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1"]),
        ("timm_efficientnet", ["0.0", "1.0", "1.1", "2.0", "2.1"]),
        ("diffusers_flux", [f"{p}transformer {n}" for p in ("", "single_") for n in (0, 1)]),
        ("flux_original", ["double 0", "double 1", "single 0", "single 1", "single 2"]),
        (
            "diffusers_unet",
            [
                *("down 0.0", "down 1.0", "mid 0.0", "mid 0.1"),
                *("up 0.0", "up 0.1", "up 1.0", "up 1.1"),
            ],
        ),
        (
            "latent_diffusion_unet",
            [*(f"input {n}" for n in range(3)), "middle 0", *(f"output {n}" for n in range(3))],
        ),
    ],
)
def test_stages_are_one_depth_axis_in_order(name: str, order: list[str]) -> None:
    assert depth_order(name) == order


@pytest.mark.parametrize(
    ("name", "tensor", "block", "module", "part"),
    [
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight", 1, "attention", "attention"),
        ("t5", "decoder.block.1.layer.2.layer_norm.weight", 1, "norm", "mlp"),
        ("mamba", "backbone.layers.1.mixer.conv1d.weight", 1, "state_space", "state_space"),
        ("mamba", "backbone.layers.1.norm.weight", 1, "norm", "state_space"),
        ("jamba", "model.layers.1.feed_forward.router.weight", 1, "mlp", "mlp"),
        ("swin", "swin.encoder.layers.0.downsample.reduction.weight", 0, "convolution", None),
        ("convnext", "convnext.encoder.stages.2.layers.1.pwconv1.weight", 3, "mlp", "mlp"),
        ("convnext", "convnext.encoder.stages.2.downsampling_layer.1.weight", 2, None, None),
        ("whisper", "model.encoder.conv1.weight", None, "convolution", "embedding"),
        ("rwkv", "rwkv.blocks.1.feed_forward.key.weight", 1, "mlp", "mlp"),
        ("blip2", "language_projection.weight", None, "projector", "projector"),
        ("diffusers_flux", "single_transformer_blocks.1.norm.linear.weight", 3, "modulation", None),
        ("diffusers_unet", "up_blocks.0.upsamplers.0.conv.weight", 5, "convolution", None),
        ("diffusers_unet", "mid_block.resnets.1.time_emb_proj.weight", 3, "modulation", None),
        ("timm_resnet", "layer3.0.bn1.weight", 4, "norm", "convolution"),
        ("timm_resnet", "fc.weight", None, "head", "head"),
    ],
)
def test_what_a_tensor_is(
    name: str, tensor: str, block: int | None, module: str | None, part: str | None
) -> None:
    role = roles(name)[tensor]
    assert role.block == block
    assert module in (None, role.module)
    assert part in (None, role.part)


def test_tensors_outside_the_blocks_belong_to_their_tower() -> None:
    sam = roles("sam")
    assert sam["vision_encoder.neck.conv1.weight"].tower == "vision"
    assert sam["mask_decoder.mask_tokens.weight"].tower == "mask_decoder"
    assert sam["prompt_encoder.no_mask_embed.weight"].tower == ""
    assert roles("florence2")["model.language_model.shared.weight"].tower == "text"


def test_lists_that_stand_side_by_side_are_no_blocks() -> None:
    names = [
        *(f"tower.layers.{n}.{m}.weight" for n in range(2) for m in ("attn.q", "mlp.fc1")),
        *(f"heads.{n}.{m}.weight" for n in range(3) for m in ("dense", "out")),
        *(f"projector.{n}.weight" for n in (0, 2)),
    ]
    found = roles_of(names)
    assert {name for name in names if found[name].block is None} == set(names[4:])


def test_an_unknown_list_of_equal_modules_is_a_tower() -> None:
    names = [f"a.cells.{n}.{m}.weight" for n in range(3) for m in ("attn.q", "mlp.fc1", "norm1")]
    found = roles_of([*names, "b.layers.0.attn.q.weight", "b.layers.0.mlp.fc1.weight"])
    assert found["a.cells.2.mlp.fc1.weight"] == TensorRole(2, "mlp", "a", "mlp")
    assert found["b.layers.0.attn.q.weight"] == TensorRole(0, "attention", "b", "attention")


def test_the_table_says_what_is_found() -> None:
    rows = rows_of(PAGE.read_text())
    assert list(rows) == NAMES
    for name, cells in rows.items():
        assert cells[:STRUCTURE] == described(name), "python -m tests.architectures.table"


def test_each_tower_of_a_segmenter_is_scaled_along_its_own_depth() -> None:
    shapes = shapes_of("sam")
    layout = Layout.build({name: (shape, "float32") for name, shape in shapes.items()})
    field = lines_field(layout, directions=1, base=0.5, rise=0.4)
    assert field is not None
    expected = {
        **{f"vision_encoder.layers.{n}.mlp.lin1.weight": 0.5 + 0.2 * n for n in range(3)},
        **{f"mask_decoder.transformer.layers.{n}.mlp.lin1.weight": 0.5 + 0.4 * n for n in range(2)},
        "mask_decoder.upscale_conv1.weight": 0.5,
    }
    for name, value in expected.items():
        start = layout.by_name[name].start
        segment = np.searchsorted(field.boundaries, start, side="right") - 1
        assert field.values[0, segment] == pytest.approx(value)
