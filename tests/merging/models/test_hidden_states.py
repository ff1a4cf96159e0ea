"""Forward passes that skip lower blocks: the bits of whole ones, and whole where it is not safe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergesearch.merging.models.hidden_states.store import HiddenStore
from mergesearch.merging.models.hidden_states.towers import HiddenStates
from tests.architectures.arrays import arrays, inputs_of
from tests.architectures.catalogue import ARCHITECTURES

BLOCKS = 4
MOVING = BLOCKS - 1
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT = _SIZES | {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Name -> class, configuration class and its options.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "sliding windows": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _TEXT | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3},
    ),
    "encoder": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "tuples": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 16, "n_layer": BLOCKS, "n_head": 2},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _SIZES | {"image_size": 8, "patch_size": 4}),
}


def built(name: str) -> nn.Module:
    import transformers

    model, config, options = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made.eval()


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    """Batches of several sizes, texts with padding."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return [{"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)} for n in (3, 1)]
    made = []
    for items, length in ((3, 7), (2, 5)):
        ids = torch.randint(3, 40, (items, length), generator=generator)
        mask = torch.ones(items, length, dtype=torch.long)
        mask[0, length - 2 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made if name == "encoder" else [batch | {"use_cache": False} for batch in made]


class Trials:
    """Trials that move the last block alone, of a model beside the same model without memory."""

    def __init__(self, model: nn.Module, limit: int = 10**9) -> None:
        self.model = model
        self.store = HiddenStore(limit)
        self.states = HiddenStates(model, self.store)
        self.number = 0

    def run(self, forward: Callable[[], Any]) -> None:
        """One more trial: ``forward`` gives the same bits with and without the store."""
        self.number += 1
        weights = {}
        for name, tower in self.states.towers.items():
            move(tower.blocks[-1])
            digests = [str(index).encode() for index in range(len(tower.blocks))]
            weights[name] = [*digests[:-1], f"trial {self.number}".encode()]
        with torch.inference_mode():
            expected = forward()
        with self.states.used(weights), torch.inference_mode():
            received = forward()
        assert_same(expected, received)


def move(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.01)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_passes_that_skip_blocks_have_the_bits_of_whole_ones(name: str) -> None:
    model = built(name)
    trials = Trials(model)
    for _ in range(4):
        for batch in batches(name):
            trials.run(lambda batch=batch: model(**batch))
    assert trials.store.found == 2 * 3 - 1  # the first trial of all has none before it


class Block(nn.Module):
    """A block that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 6)
        self.runs = 0
        self.draws = False

    def forward(self, hidden: torch.Tensor, extra: Any = None) -> torch.Tensor:
        self.runs += 1
        if self.draws:
            torch.rand(1)
        scale = extra if isinstance(extra, torch.Tensor) else 1.0
        return hidden + scale * torch.tanh(self.mlp(hidden))


class Network(nn.Module):
    """Blocks one after another, and uses of what is between them."""

    def __init__(self, use: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.use = use
        self.extra: Any = None
        for seed, block in enumerate(self.layers):
            with torch.no_grad():
                block.mlp.weight.copy_(torch.eye(6).roll(seed))

    def forward(self, given: torch.Tensor, **_: Any) -> Any:
        hidden = 2 * given
        kept = []
        for block in self.layers:
            if self.use == "added in place":
                hidden += 1
            if self.use == "pooled":
                kept.append(hidden.mean())
            if self.use == "all":
                kept.append(hidden)
            hidden = block(hidden, extra=self.extra)
        return hidden, kept

    @property
    def runs(self) -> list[int]:
        return [block.runs for block in self.layers]


GIVEN = torch.arange(12.0).reshape(2, 6) / 12


def test_blocks_that_are_known_do_not_run() -> None:
    model = Network().eval()
    trials = Trials(model)
    for _ in range(4):
        trials.run(lambda: model(GIVEN))
    # Each trial runs once without memory. With it, two record, the others skip all but one.
    assert model.runs == [6, 6, 6, 8]


@pytest.mark.parametrize("use", ["added in place", "pooled", "all"])
def test_a_model_that_uses_what_is_between_its_blocks_runs_whole(use: str) -> None:
    model = Network(use).eval()
    trials = Trials(model)
    for _ in range(4):
        trials.run(lambda: model(GIVEN))
    assert model.runs == [8] * BLOCKS
    assert trials.store.size == 0


def hooked(model: Network) -> None:
    model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model: Network) -> None:
    model.layers[1].mlp.forward = model.layers[1].mlp.forward


def training(model: Network) -> None:
    model.layers[1].train()


def random(model: Network) -> None:
    model.layers[1].draws = True


def cached(model: Network) -> None:
    model.extra = object()


@pytest.mark.parametrize("change", [hooked, replaced, training, random, cached])
def test_what_is_not_plain_runs_whole(change: Callable[[Network], None]) -> None:
    model = Network().eval()
    change(model)
    trials = Trials(model)
    for _ in range(3):
        trials.run(lambda: model(GIVEN))
    assert model.runs == [6] * BLOCKS


def test_a_state_is_not_used_where_it_would_not_be_recorded() -> None:
    model = Network().eval()
    trials = Trials(model)
    for _ in range(3):
        trials.run(lambda: model(GIVEN))
    assert model.runs[0] == 5
    for forward in (
        lambda: model(GIVEN + 1),  # another input
        lambda: model(GIVEN, output_hidden_states=True),
        lambda: model(GIVEN, manner="another"),
        torch.enable_grad()(torch.inference_mode(mode=False)(lambda: model(GIVEN)[0].detach())),
    ):
        before = model.runs[0]
        trials.run(forward)
        assert model.runs[0] == before + 2
    hooked(model)
    before = model.runs[0]
    trials.run(lambda: model(GIVEN))
    assert model.runs[0] == before + 2


def test_blocks_that_are_called_in_another_way_run_after_all() -> None:
    """What only later blocks are given differs: the pass begins again, whole."""
    model = Network().eval()
    trials = Trials(model)
    for _ in range(3):
        trials.run(lambda: model(GIVEN))
    assert trials.store.found == 1
    original = model.layers[1].forward
    scale = torch.tensor(0.5)
    model.layers[0].register_forward_hook(lambda *_: None).remove()

    def forward() -> Any:
        model.extra = None
        hidden = 2 * GIVEN
        return model(GIVEN), hidden

    trials.run(forward)
    assert trials.store.found == 2

    class Other(Network):
        def forward(self, given: torch.Tensor, **_: Any) -> Any:
            hidden = 2 * given
            for index, block in enumerate(self.layers):
                hidden = block(hidden, extra=scale if index == 1 else None)
            return hidden, []

    model.__class__ = Other
    trials.run(lambda: model(GIVEN))
    assert trials.store.found == 3  # and dropped
    trials.run(lambda: model(GIVEN))
    assert model.layers[1].forward == original


def test_weights_that_are_no_longer_those_of_the_merge_are_not_used() -> None:
    model = Network().eval()
    store = HiddenStore(10**9)
    states = HiddenStates(model, store)
    weights = {"layers": [b"0", b"1", b"2", b"3"]}
    with torch.no_grad():
        for _ in range(3):
            with states.used(weights):
                model(GIVEN)
        assert store.found == 1
        with states.used(weights, lambda: False):
            move(model.layers[0])
            changed = model(GIVEN)[0]
        assert store.found == 1
        assert torch.equal(changed, model(GIVEN)[0])


def test_a_copy_of_the_model_runs_by_itself() -> None:
    model = Network().eval()
    states = HiddenStates(model, HiddenStore(10**9))
    with torch.no_grad():
        for _ in range(2):
            with states.used({"layers": [b"0", b"1", b"2", b"3"]}):
                twin = copy.deepcopy(model)
        move(twin.layers[0])
        assert twin.layers[0].forward.__self__ is twin.layers[0]
        assert not torch.equal(twin(GIVEN)[0], model(GIVEN)[0])
    assert "forward" not in model.layers[0].__dict__


def test_memory_stays_below_its_limit() -> None:
    """What belongs to the present weights stays; what belongs to others makes room."""
    model = Network().eval()
    size = GIVEN.nbytes
    trials = Trials(model, limit=2 * size)
    inputs = [GIVEN + n for n in range(3)]
    for _ in range(3):
        trials.run(lambda: [model(each)[0] for each in inputs])
    assert trials.store.size == 2 * size
    assert trials.store.found == 2
    move(model.layers[0])
    states = trials.states
    with torch.no_grad():
        for last in (b"1", b"2"):
            with states.used({"layers": [b"other", b"1", b"2", last]}):
                for each in inputs:
                    model(each)
    assert trials.store.size == 2 * size
    assert trials.store.found == 2
    trials.store.clear()
    assert trials.store.size == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_has_the_bits_of_whole_passes(name: str) -> None:
    architecture = ARCHITECTURES[name]
    inputs = inputs_of(architecture)
    if not inputs:
        pytest.skip("takes no plain arrays")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture.build().eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # as evaluators ask for
    given = {
        key: torch.tensor(value)
        for key, value in arrays(inputs, 2, np.random.default_rng(0)).items()
    }
    trials = Trials(model)
    for _ in range(3):
        with torch.random.fork_rng(devices=[]):
            trials.run(lambda: seeded(model, given))


def seeded(model: nn.Module, given: dict[str, torch.Tensor]) -> Any:
    torch.manual_seed(0)  # some hide parts of their inputs at random
    return dict(model(**given))
