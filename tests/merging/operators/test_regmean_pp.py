"""RegMean++ against forward passes of whole models, and which blocks it takes or refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.models.blocks import block_chains, passage
from mergesearch.merging.models.calibration_spec import Calibration
from tests.merging.operators.calibrated import images, save_items
from tests.merging.operators.pico_runs import loaded, rows_of

WIDTH = 4
BOTH = ("regmean", "regmean_pp")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(self.norm(hidden)).tanh()


class Tower(nn.Module):
    """An embedding, three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for block in self.layers:
            hidden = block(hidden)
        return self.head(hidden)


class Skipping(Tower):
    """The last block sees the first one's output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](self.embed(x))
        return self.head(self.layers[2](first + self.layers[1](first)))


class Remembering(Tower):
    """Blocks are handed an output of earlier blocks besides the hidden state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        first = self.layers[0](hidden)
        second = self.layers[1](first)
        return self.head(self.layers[2](second, first))


class BlockWithMemory(Block):
    def forward(self, hidden: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden) + (0.0 if earlier is None else 5 * earlier)


def states(
    model: nn.Module, shared: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights of a base and two experts that agree on tensors whose names start with ``shared``."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    tuned = [
        {
            n: t + torch.randn(t.shape, generator=generator) * (not n.startswith(shared))
            for n, t in base.items()
        }
        for _ in range(2)
    ]
    return base, tuned


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(9, 3, generator=torch.Generator().manual_seed(seed))}]


def calibrated(model: nn.Module) -> Calibration:
    return Calibration(model, {"0": batches(0), "1": batches(1)})


def test_is_regmean_block_after_block() -> None:
    """The reference runs whole models, with one expert's block on merged lower blocks."""
    base, experts = states(Tower())
    merged = merge(
        base, experts, operator="regmean_pp", calibration=calibrated(Tower()), reduce=0.9
    )
    model = Tower().double()
    mean = {name: (experts[0][name] + experts[1][name]) / 2 for name in base}
    expected = {name: tensor.double() for name, tensor in mean.items()}
    for index in range(3):
        grams = []
        for k, expert in enumerate(experts):
            own = {n: t.double() for n, t in expert.items() if n.startswith(f"layers.{index}.")}
            model.load_state_dict(expected | own)
            seen: list[torch.Tensor] = []
            hook = model.layers[index].linear.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(batches(k)[0]["x"].double())
            hook.remove()
            gram = seen[0].T @ seen[0] / 9
            grams.append(0.9 * gram + 0.1 * gram.diagonal().diag())
        name = f"layers.{index}.linear.weight"
        weighted = sum(
            expert[name].double() @ gram for expert, gram in zip(experts, grams, strict=True)
        )
        expected[name] = weighted @ torch.linalg.inv(sum(grams))
        assert torch.allclose(merged[name].double(), expected[name], atol=2e-4), name
    for name in ("embed.weight", "head.weight", "layers.1.linear.bias"):
        assert torch.allclose(merged[name], mean[name], atol=1e-6)


def test_first_block_is_that_of_regmean_where_embeddings_agree() -> None:
    base, experts = states(Tower(), shared=("embed.",))
    one, other = (
        merge(base, experts, operator=operator, calibration=calibrated(Tower()))
        for operator in ("regmean", "regmean_pp")
    )
    assert torch.allclose(one["layers.0.linear.weight"], other["layers.0.linear.weight"], atol=1e-5)
    assert not torch.allclose(
        one["layers.1.linear.weight"], other["layers.1.linear.weight"], atol=1e-2
    )


def test_finds_the_outermost_blocks(build_model: Callable[..., nn.Module]) -> None:
    assert [(c.name, len(c.blocks)) for c in block_chains(build_model("vit"))] == [
        ("vit.layers", 2)
    ]
    assert [c.blocks[1] for c in block_chains(build_model("llama"))] == ["model.layers.1"]
    assert [c.blocks[1] for c in block_chains(build_model("gpt2"))] == ["transformer.h.1"]
    assert (
        block_chains(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    )  # numbers, but no blocks


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_calls_blocks_as_the_model_does(build_model: Callable[..., nn.Module], name: str) -> None:
    model = build_model(name).eval()
    model.config.use_cache = False
    given = {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    if name != "vit":
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        given = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": mask}
    (chain,) = block_chains(model)
    with torch.no_grad():
        captured = passage(model, chain, lambda: model(**given))
    hidden = captured.entry
    for call, block in zip(captured.calls, chain.blocks, strict=True):
        assert not torch.equal(hidden, captured.exit)
        hidden = call.repeat(model.get_submodule(block), hidden)
    assert torch.equal(hidden, captured.exit)


def vision(folder: Path, label: int) -> str:
    return str(save_items(folder / str(label), images(6, label)))


def test_merges_a_vit_from_its_checkpoints(pico: Callable[[str], Any], tmp_path: Path) -> None:
    family = pico("vit")
    own = {
        "data": {
            expert.name: vision(tmp_path / "items", seed)
            for seed, expert in enumerate(family.experts)
        },
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "batch_size": 4,
    }
    arenas = tmp_path / "arenas"
    rows, plain = (
        rows_of(family.base, family.experts, operator, arenas, calibration=own)
        for operator in ("regmean_pp", "regmean")
    )
    # The second block by hand: merged embeddings and first block, then each expert's second block.
    base = loaded(family.base, own["model_class"])
    models = [loaded(expert, own["model_class"]) for expert in family.experts]
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(model.get_parameter(name) for model in models) / 2)
            if name.startswith("vit.layers.0."):
                parameter.copy_(base.get_parameter(name) + rows[_stored(name)].double().sum(dim=0))
    for held in ("attention.q_proj", "mlp.fc2"):
        name = f"vit.layers.1.{held}"
        grams = []
        for seed, model in enumerate(models):
            stream = copy.deepcopy(merged)
            seen = []
            stream.vit.layers[1].load_state_dict(model.vit.layers[1].state_dict())
            stream.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                stream(torch.tensor(images(6, seed)["pixels"]).double()[:, None])
            x = seen[0].flatten(0, -2)
            gram = x.T @ x / len(x)
            grams.append(0.95 * gram + 0.05 * gram.diagonal().diag())
        key = _stored(f"{name}.weight")
        for row, model, gram in zip(rows[key], models, grams, strict=True):
            delta = model.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
            assert torch.allclose(
                row.double(), delta @ gram @ torch.linalg.inv(sum(grams)), atol=2e-4
            ), name
        assert not torch.allclose(rows[key], plain[key], atol=1e-5)


def _stored(name: str) -> str:
    """The stored name of a parameter in a block."""
    renamed = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for held, stored in renamed.items():
        name = name.replace(held, stored)
    return name


class TestRefusals:
    def test_of_names_without_blocks(self) -> None:
        base = {"embed.weight": torch.zeros(2, 2)}
        with pytest.raises(
            RecipeError,
            match="operator regmean_pp: expected numbered residual blocks among the tens",
        ):
            merge(base, [base], operator="regmean_pp", calibration=Calibration(Tower(), batches(0)))

    def test_of_blocks_that_do_not_run(self) -> None:
        class Idle(Tower):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.embed(x))

        base, experts = states(Idle())
        with pytest.raises(
            CheckpointError, match=r"expected residual blocks in Idle, named like .* found none"
        ):
            merge(base, experts, operator="regmean_pp", calibration=calibrated(Idle()))

    @pytest.mark.parametrize("times", [0, 2])
    def test_of_blocks_that_do_not_run_once(self, times: int) -> None:
        class Odd(Tower):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.layers[1](self.layers[0](self.embed(x)))
                for _ in range(times):
                    hidden = self.layers[2](hidden)
                return self.head(hidden)

        base, experts = states(Odd())
        with pytest.raises(
            CheckpointError, match="expected blocks layers that run one after another"
        ):
            merge(base, experts, operator="regmean_pp", calibration=calibrated(Odd()))

    def test_of_blocks_on_other_outputs(self) -> None:
        base, experts = states(Skipping())
        with pytest.raises(
            CheckpointError, match="each on the output of the one before, received another order"
        ):
            merge(base, experts, operator="regmean_pp", calibration=calibrated(Skipping()))

    def test_of_blocks_that_are_given_more(self) -> None:
        model = Remembering()
        model.layers[2] = BlockWithMemory()
        base, experts = states(model)
        with pytest.raises(
            CheckpointError, match="on the block before alone, received some that are given more"
        ):
            merge(base, experts, operator="regmean_pp", calibration=calibrated(model))
