"""RegMean against least squares, and on real models against Gram matrices taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergesearch.merging import InputError, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.models.calibration_spec import Calibration
from mergesearch.merging.operators.parts import gram
from mergesearch.merging.operators.parts.gram import Grams, LinearWeight, regressed, squared
from mergesearch.merging.operators.regmean import prepare
from mergesearch.merging.tensors.memo import Memo
from tests.merging.operators.calibrated import images, save_items
from tests.merging.operators.pico_runs import deltas_of, loaded, rows_of

OUT = 3
IN = 4


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(experts: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    base = {"weight": random(OUT, IN, seed=0), "bias": random(OUT, seed=1)}
    return base, {
        f"expert {k}": {n: t + random(*t.shape, seed=10 * k + len(n)) for n, t in base.items()}
        for k in range(1, experts + 1)
    }


def calibrated(items: dict[str, torch.Tensor]) -> Calibration:
    return Calibration(
        nn.Linear(IN, OUT),
        {name: [{"input": part} for part in x.split(5)] for name, x in items.items()},
    )


def inputs(count: int = 20) -> dict[str, torch.Tensor]:
    return {
        "expert 1": random(count, IN, seed=2),
        "expert 2": random(count, IN, seed=3) @ random(IN, IN, seed=4),
    }


class TestOneLayer:
    def test_is_the_least_squares_fit_to_both_experts(self) -> None:
        base, experts = states()
        items = inputs()
        merged = merge(base, experts, operator="regmean", calibration=calibrated(items), reduce=1.0)
        x = torch.cat([items[name].double() for name in experts])
        y = torch.cat(
            [items[name].double() @ expert["weight"].double().T for name, expert in experts.items()]
        )
        assert torch.allclose(
            merged["weight"].double(), torch.linalg.lstsq(x, y).solution.T, atol=1e-4
        )
        assert torch.allclose(
            merged["bias"], sum(e["bias"] for e in experts.values()) / 2, atol=1e-6
        )

    def test_counts_every_expert_the_same_however_many_items_it_has(self) -> None:
        base, experts = states()
        items = inputs()
        few = merge(base, experts, operator="regmean", calibration=calibrated(items))
        many = {**items, "expert 1": items["expert 1"].repeat(3, 1)}
        more = merge(base, experts, operator="regmean", calibration=calibrated(many))
        assert torch.allclose(few["weight"], more["weight"], atol=1e-5)

    def test_equal_inputs_give_the_average(self) -> None:
        base, experts = states(3)
        items = dict.fromkeys(experts, inputs()["expert 2"])
        merged = merge(base, experts, operator="regmean", calibration=calibrated(items))
        assert torch.allclose(
            merged["weight"], sum(e["weight"] for e in experts.values()) / 3, atol=1e-6
        )

    def test_no_off_diagonals_weigh_column_by_column(self) -> None:
        base, experts = states()
        items = inputs()
        merged = merge(base, experts, operator="regmean", calibration=calibrated(items), reduce=0.0)
        weights = torch.stack([(items[name] ** 2).mean(dim=0) for name in experts])
        both = torch.stack([expert["weight"] for expert in experts.values()])
        expected = (weights[:, None] * both).sum(dim=0) / weights.sum(dim=0)
        assert torch.allclose(merged["weight"], expected, atol=1e-5)

    @pytest.mark.parametrize("reduce", [1.0, 0.95])
    def test_inputs_that_no_item_reaches_are_averaged(self, reduce: float) -> None:
        base, experts = states()
        items = inputs(2)  # fewer items than inputs
        for x in items.values():
            x[:, 0] = 0
        merged = merge(
            base, experts, operator="regmean", calibration=calibrated(items), reduce=reduce
        )["weight"]
        average = sum(expert["weight"] for expert in experts.values()) / 2
        assert torch.allclose(merged[:, 0], average[:, 0], atol=1e-5)
        assert not torch.allclose(merged[:, 1:], average[:, 1:], atol=1e-2)

    def test_a_layer_that_never_runs_is_averaged(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used = nn.Linear(IN, OUT)
                self.idle = nn.Linear(IN, OUT)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)

        base = {name: torch.zeros_like(tensor) for name, tensor in Two().state_dict().items()}
        experts = [{n: random(*t.shape, seed=k) for n, t in base.items()} for k in (1, 2)]
        own = Calibration(
            Two(), {"0": [{"x": random(9, IN, seed=3)}], "1": [{"x": random(9, IN, seed=4)}]}
        )
        merged = merge(base, experts, operator="regmean", calibration=own)
        for name, average in ((n, (experts[0][n] + experts[1][n]) / 2) for n in base):
            assert torch.allclose(merged[name], average, atol=1e-5) == (name != "used.weight")

    def test_inputs_that_are_not_finite_are_refused(self) -> None:
        base, experts = states()
        items = {name: x.fill_(torch.nan) for name, x in inputs().items()}
        with pytest.raises(
            InputError, match="expected finite inputs of layer '', received NaN or infinity"
        ):
            merge(base, experts, operator="regmean", calibration=calibrated(items))


def test_sums_that_rounding_made_indefinite_are_still_solved() -> None:
    gram = torch.tensor(
        [[1.0, 1.0], [1.0, 1.0 - 1e-5]]
    )  # eigenvalues 2 and -5e-6: below zero, beyond the ridge
    rows = regressed([torch.eye(2), torch.eye(2)], [{"gram_of_dim_1": gram}] * 2, 1.0)
    assert torch.allclose(rows[0], torch.eye(2) / 2, atol=1e-5)


def test_columns_of_conv1d_are_its_outputs() -> None:
    delta = random(IN, OUT, seed=0)
    gram = random(9, IN, seed=1).T @ random(9, IN, seed=1)
    other = random(IN, OUT, seed=2)
    rows = regressed(
        [delta, other], [{"gram_of_dim_0": gram}, {"gram_of_dim_0": torch.eye(IN)}], 1.0
    )
    total = gram.double() + torch.eye(IN)
    assert torch.allclose(
        rows[0].double(), torch.linalg.solve(total, gram.double() @ delta.double()), atol=1e-5
    )
    assert torch.allclose(rows[1].double(), torch.linalg.solve(total, other.double()), atol=1e-5)


def test_hooks_are_gone_afterwards() -> None:
    layer = nn.Linear(2, 2)
    grams = Grams()
    with grams.collecting({"layer": layer}, {}):
        layer(torch.ones(3, 2))
    layer(torch.ones(3, 2))
    assert grams.counts == {"layer": 3}
    assert torch.equal(grams.mean(LinearWeight("layer", 1))["gram_of_dim_1"], torch.ones(2, 2))


def vision(folder: Path, **data: Any) -> dict[str, Any]:
    data = {name: str(save_items(folder / name, columns)) for name, columns in data.items()}
    return {
        "data": data,
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }


def test_matches_hooks_on_a_vit(pico: Callable[[str], Any], tmp_path: Path) -> None:
    family = pico("vit")
    items = {expert.name: images(6, seed) for seed, expert in enumerate(family.experts)}
    own = vision(tmp_path / "items", **items) | {"batch_size": 4}
    rows = rows_of(
        family.base, family.experts, "regmean", tmp_path / "arenas", calibration=own, reduce=0.9
    )
    # Stored name -> name in memory.
    layers = {
        "vit.encoder.layer.1.attention.attention.query.weight": "vit.layers.1.attention.q_proj",
        "vit.encoder.layer.0.intermediate.dense.weight": "vit.layers.0.mlp.fc1",
        "classifier.weight": "classifier",
    }
    deltas = deltas_of(family.base, family.experts)
    for stored, name in layers.items():
        grams = []
        for expert in family.experts:
            model = loaded(expert, own["model_class"])
            seen = []
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(torch.tensor(items[expert.name]["pixels"]).double()[:, None])
            x = torch.cat(seen).flatten(0, -2)
            gram = x.T @ x / len(x)
            grams.append(0.9 * gram + 0.1 * gram.diagonal().diag())
        for k, gram in enumerate(grams):
            expected = deltas[stored][k].double() @ gram @ torch.linalg.inv(sum(grams))
            assert torch.allclose(rows[stored][k].double(), expected, atol=2e-4), stored
    assert torch.allclose(
        rows["vit.embeddings.cls_token"], deltas["vit.embeddings.cls_token"] / 2, atol=1e-7
    )


def tokens(folder: Path, seed: int, padding: int = 0) -> Path:
    drawn = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([drawn, torch.full((3, padding), 2)], dim=1)
    return save_items(folder, {"ids": ids.tolist(), "mask": (ids != 2).long().tolist()})


def language(data: dict[str, Path]) -> dict[str, Any]:
    inputs = {"input_ids": "ids", "attention_mask": "mask"}
    paths = {name: str(path) for name, path in data.items()}
    return {"data": paths, "model_class": "AutoModelForCausalLM", "inputs": inputs}


@pytest.mark.parametrize(
    ("family_name", "layer", "head"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"),
        ("llama_tied", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"),
    ],
)
def test_language_models(
    pico: Callable[[str], Any], tmp_path: Path, family_name: str, layer: str, head: str
) -> None:
    family = pico(family_name)
    names = [expert.name for expert in family.experts]
    rows_by_padding = {}
    for padding in (0, 2):
        data = {
            n: tokens(tmp_path / f"{n} {padding}", seed, padding) for seed, n in enumerate(names)
        }
        arenas = tmp_path / "arenas"
        rows_by_padding[padding] = rows_of(
            family.base, family.experts, "regmean", arenas, calibration=language(data)
        )
    deltas = deltas_of(family.base, family.experts)
    for name, rows in rows_by_padding[0].items():
        assert torch.allclose(rows, rows_by_padding[2][name], atol=1e-4), (
            name
        )  # padding does not count
    assert not torch.allclose(rows_by_padding[0][layer], deltas[layer] / 2, atol=1e-3)
    # A head that is tied to the embedding is both; it is averaged.
    assert torch.allclose(rows_by_padding[0][head], deltas[head] / 2, atol=1e-6)


def test_values_of_reduce_share_the_gram_matrices(
    pico: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergesearch.merging.operators.parts.gram import Grams
    from mergesearch.merging.operators.regmean import REGMEAN

    family = pico("vit")
    data = save_items(tmp_path / "items", images(4, 0))
    own = {
        "data": str(data),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
    }
    options = REGMEAN.complete({"calibration": own})
    memo = Memo(tmp_path / "memo")
    base, *experts = (
        open_checkpoint(str(path), path.name, memo) for path in (family.base, *family.experts)
    )
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    first = prepare(base, experts, **options).rows(name)
    monkeypatch.setattr(Grams, "collecting", None)  # no further pass
    again = prepare(base, experts, **options).rows(name)
    other = prepare(base, experts, **options | {"reduce": 0.1}).rows(name)
    assert torch.equal(first[0], again[0])
    assert not torch.allclose(first[0], other[0], atol=1e-4)


class TestProducts:
    @pytest.mark.parametrize("size", [40, 768, 800])
    @pytest.mark.parametrize("count", [1, 30])
    def test_halves_have_the_bits_of_the_whole(self, size: int, count: int) -> None:
        x = random(count, size, seed=size)
        assert torch.equal(squared(x), x.T @ x)

    def test_layers_with_one_input_share_its_gram_matrix(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []

        def counted(wide: torch.Tensor) -> torch.Tensor:
            made.append(len(wide))
            return squared(wide)

        monkeypatch.setattr(gram, "squared", counted)
        layers = {name: nn.Linear(IN, OUT) for name in ("query", "key", "value")}
        grams = Grams()
        x = random(6, IN, seed=1)
        y = random(5, IN, seed=2)
        with torch.no_grad(), grams.collecting(layers, {}):
            for name in ("query", "key", "value", "query"):
                layers[name](x)
            layers["key"](y)
            y += 1  # as a residual stream is written to in place
            layers["value"](y)
        assert made == [6, 5, 5]
        expected = {"query": 2 * x.T @ x, "key": x.T @ x + (y - 1).T @ (y - 1)}
        expected["value"] = x.T @ x + y.T @ y
        for name, products in expected.items():
            torch.testing.assert_close(grams.sums[name], products)
        assert grams.counts == {"query": 12, "key": 11, "value": 11}
