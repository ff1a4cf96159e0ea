"""RegMean on stacked experts is RegMean on each of their matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from mergesearch.merging import merge
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.models.parameter_views import parameter_views
from mergesearch.merging.operators.parts.stack_gram import stack_weights

EXPERTS = 3
HIDDEN = 5
INNER = 4

State = dict[str, torch.Tensor]


class Stacked(nn.Module):
    """Vectors go through the expert of their largest component; the last one gets none."""

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        shape = (EXPERTS + 1, *((HIDDEN, INNER) if turned else (INNER, HIDDEN)))
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(shape))})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        stack = self.experts["up"]
        routes = inputs[:, :EXPERTS].argmax(dim=1)
        out = inputs.new_zeros(len(inputs), INNER)
        for expert in range(EXPERTS):
            own = inputs[routes == expert]
            member = stack[torch.tensor(expert)]
            out[routes == expert] = own @ member if self.turned else linear(own, member)
        return out


class Apart(nn.Module):
    """The same with a linear layer for each expert."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.mlp = nn.ModuleList(
                nn.Linear(HIDDEN, INNER, bias=False) for _ in range(EXPERTS + 1)
            )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        routes = inputs[:, :EXPERTS].argmax(dim=1)
        out = inputs.new_zeros(len(inputs), INNER)
        for expert in range(EXPERTS):
            out[routes == expert] = self.mlp[expert](inputs[routes == expert])
        return out


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.block(inputs)


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _regmean(module: nn.Module, base: State, experts: dict[str, State]) -> State:
    batches = {
        name: [{"inputs": _draw(40, HIDDEN, seed=seed)}] for seed, name in enumerate(experts, 20)
    }
    return merge(base, experts, operator="regmean", calibration=Calibration(module, batches))


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_is_merged_as_its_matrices_are(turned: bool) -> None:
    base = _draw(EXPERTS + 1, INNER, HIDDEN, seed=0)
    stacks = {name: base + _draw(*base.shape, seed=seed) for seed, name in enumerate("ab", 1)}

    def stored(stack: torch.Tensor) -> State:
        held = stack.transpose(1, 2) if turned else stack
        return {"block.experts.up": held.contiguous()}

    def apart(stack: torch.Tensor) -> State:
        return {f"mlp.{number}.weight": matrix for number, matrix in enumerate(stack)}

    merged = _regmean(
        Wrapped(Stacked(turned=turned)), stored(base), {n: stored(s) for n, s in stacks.items()}
    )["block.experts.up"]
    expected = _regmean(Apart(), apart(base), {n: apart(s) for n, s in stacks.items()})
    together = torch.stack([expected[f"mlp.{number}.weight"] for number in range(EXPERTS + 1)])
    torch.testing.assert_close(merged, together.transpose(1, 2) if turned else together)
    mean = sum(stacks.values()) / 2
    assert torch.allclose(together[EXPERTS], mean[EXPERTS]), "no vector went there"
    assert not torch.allclose(together[0], mean[0], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)
@pytest.mark.parametrize("operator", ["regmean", "regmean_pp"])
def test_experts_of_mixtures_are_no_plain_average(
    operator: str, kind: str, config: dict[str, Any]
) -> None:
    import transformers

    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(**sizes, **config)
        model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = {
        name: {
            n: t + 0.02 * _draw(*t.shape, seed=seed) if t.is_floating_point() else t
            for n, t in base.items()
        }
        for seed, name in enumerate("ab", 1)
    }
    tokens = torch.randint(3, 30, (6, 8), generator=torch.Generator().manual_seed(1))
    batches = {"a": [{"input_ids": tokens[:3]}], "b": [{"input_ids": tokens[3:]}]}
    calibration = Calibration(model, batches)
    merged = merge(base, experts, operator=operator, calibration=calibration)
    stacks = [name for name, tensor in base.items() if tensor.ndim == 3]
    assert len(stacks) == 2
    for name in stacks:
        mean = (experts["a"][name] + experts["b"][name]) / 2
        assert (merged[name] - mean).norm() > 0.1 * (mean - base[name]).norm()


def test_stored_matrices_of_single_experts_are_found_in_the_stack() -> None:
    """Mixtral stores a tensor for each, which transformers fuses and stacks."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 2, "vocab_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    found = {
        name: (place.parameter.rpartition(".")[2], *place.members)
        for name, place in stack_weights(model, parameter_views(model)).items()
    }
    where = "model.layers.0.block_sparse_moe.experts"
    assert found == {
        f"{where}.{expert}.{word}.weight": (stack, expert)
        for expert in range(2)
        for word, stack in (
            ("w1", "gate_up_proj"),
            ("w2", "down_proj"),
            ("w3", "gate_up_proj"),
        )
    }
