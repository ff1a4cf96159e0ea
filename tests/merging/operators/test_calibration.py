"""Calibration of data operators: its plain form, items, models in memory, remembered results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergesearch.merging import InputError, RecipeError, merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.models.calibration_items import Items
from mergesearch.merging.models.calibration_spec import Calibration, absolute, file_versions
from mergesearch.merging.models.expert_runner import ExpertRunner, unpadded
from mergesearch.merging.operators import OPERATORS, get_operator
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.per_tensor import memoised_per_tensor
from tests.merging.operators.calibrated import Model, batches, images, save_items

DATA = sorted(operator.name for operator in OPERATORS.values() if operator.needs)
#: Those that run on noise where no items are named.
WITHOUT_ITEMS = {"pleas"}
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_items(tmp_path_factory.mktemp("items") / "data", images(COUNT, 0))


def spec(data: Any, **changes: Any) -> dict[str, Any]:
    data = str(data) if isinstance(data, Path) else data
    return {
        "data": data,
        "model_class": "AutoModel",
        "inputs": {"pixel_values": "pixels"},
    } | changes


def complete(**options: Any) -> dict[str, Any]:
    return get_operator("regmean").complete({"calibration": spec(**options)})["calibration"]


def runner(base: dict[str, torch.Tensor] | None = None, **options: Any) -> ExpertRunner:
    tensors = base or {}
    return ExpertRunner(complete(**options), MappingSource("base", tensors, list(tensors)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kept:
    """A source whose results are kept."""

    name: str
    memo: Memo | None
    identity: str
    names: Sequence[str] = ("a", "b")

    def shape(self, _name: str) -> tuple[int, ...]:
        return ()

    def read(self, _name: str) -> torch.Tensor:
        return torch.zeros(())


class TestOption:
    @pytest.mark.parametrize("name", sorted({*DATA} - WITHOUT_ITEMS))
    def test_is_required(self, name: str) -> None:
        with pytest.raises(
            RecipeError,
            match=f"operator {name}: hyperparameter 'calibration' has no default, give it",
        ):
            get_operator(name).complete({})

    def test_fills_in_what_is_left_out(self) -> None:
        full = complete(data="items")
        assert full["samples"] == 256
        assert full["split"] == "train"
        assert get_operator("regmean").complete({"calibration": full})["calibration"] == full

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"sampels": 3}, r"'calibration\.sampels': Extra inputs are not permitted, received 3"),
            (
                {"samples": 0},
                r"'calibration\.samples': Input should be greater than or equal to 1, received 0",
            ),
            (
                {"samples": "8"},
                r"'calibration\.samples': Input should be a valid integer, received '8'",
            ),
            ({"inputs": {}}, r"'calibration\.inputs': Dictionary should have at least 1 item"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, changes: dict[str, Any], match: str) -> None:
        with pytest.raises(RecipeError, match=match):
            complete(data="items", **changes)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"data": "/nowhere"}, "expected a folder written by save_to_disk, found no /nowhere"),
            (
                {"split": "test"},
                r"expected a split 'test', received \['train'\]; set calibration.split",
            ),
            (
                {"inputs": {"pixel_values": "image"}},
                r"expected a column 'image', received only \['label', 'pixels'\]",
            ),
            ({"label": "class"}, "expected a column 'class'"),
        ],
    )
    @pytest.mark.parametrize("name", DATA)
    def test_refuses_folders_before_weights_are_read(
        self, folder: Path, name: str, changes: dict[str, Any], match: str
    ) -> None:
        base = {"layers.0.weight": torch.zeros(2)}
        with pytest.raises(RecipeError, match=f"operator {name}: calibration.data: .*{match}"):
            merge(base, [base], operator=name, calibration=spec(folder, label="label") | changes)

    def test_refuses_weights_in_memory(self, folder: Path) -> None:
        base = {"weight": torch.zeros(2, 2)}
        with pytest.raises(
            RecipeError,
            match="calibration: expected a Calibration with a model for weights in memory",
        ):
            merge(base, [base], operator="regmean", calibration=spec(folder))


class TestFolders:
    def test_start_at_the_folder_of_the_file_that_names_them(self, tmp_path: Path) -> None:
        assert absolute({"calibration": spec("items"), "reduce": 1.0}, tmp_path) == {
            "calibration": spec(str(tmp_path / "items")),
            "reduce": 1.0,
        }
        own = absolute({"calibration": spec({"one": "../a", "two": "/b"})}, tmp_path)[
            "calibration"
        ]["data"]
        assert own == {"one": str(tmp_path.parent / "a"), "two": "/b"}
        assert absolute({"density": 0.2}, tmp_path) == {"density": 0.2}

    def test_are_known_by_their_files(self, tmp_path: Path) -> None:
        data = save_items(tmp_path / "data", images(COUNT, 0))
        before = file_versions({"calibration": complete(data=data)})
        assert before == file_versions(
            {"calibration": complete(data={"one": str(data), "two": str(data)})}
        )
        shutil.rmtree(data)
        save_items(data, images(COUNT, 1))
        assert file_versions({"calibration": complete(data=data)}) != before
        assert file_versions({"density": 0.2}) == []


class TestItems:
    def test_are_the_first_of_a_seeded_order(self, folder: Path) -> None:
        every = torch.cat(
            [items.inputs["pixel_values"] for items in runner(data=folder).items("one")]
        )
        some = runner(data=folder, samples=5, batch_size=2).items("one")
        assert [len(items.inputs["pixel_values"]) for items in some] == [2, 2, 1]
        assert torch.equal(torch.cat([items.inputs["pixel_values"] for items in some]), every[:5])
        other = torch.cat(
            [items.inputs["pixel_values"] for items in runner(data=folder, seed=1).items("one")]
        )
        assert not torch.equal(other, every)
        assert torch.equal(other.sort(dim=0).values, every.sort(dim=0).values)

    def test_carry_their_labels(self, folder: Path) -> None:
        (items,) = runner(data=folder, label="label").items("one")
        columns = images(COUNT, 0)
        pixels = torch.tensor(columns["pixels"])
        assert items.inputs["pixel_values"].shape == (
            COUNT,
            1,
            8,
            8,
        )  # with the channel axis that is implied
        assert items.labels is not None
        for image, label in zip(items.inputs["pixel_values"], items.labels.tolist(), strict=True):
            index = int((pixels - image).abs().flatten(1).sum(dim=1).argmin())
            assert label == columns["label"][index]

    def test_go_by_expert(self, folder: Path, tmp_path: Path) -> None:
        other = save_items(tmp_path / "other", images(COUNT, 1))
        both = runner(data={"one": str(folder), "two": str(other)})
        assert both.key(["x"], ["one"]) != both.key(["x"], ["two"])
        assert both.key(["x"], ["one"]) == runner(data=folder).key(["x"], ["one"])
        with pytest.raises(
            RecipeError, match=r"expected an entry for expert 'three', received \['one', 'two'\]"
        ):
            both.items("three")

    def test_of_different_shapes_are_refused(self, tmp_path: Path) -> None:
        ragged = save_items(tmp_path / "ragged", {"pixels": [[1.0], [1.0, 2.0]]})
        with pytest.raises(
            InputError, match=r"calibration.inputs.pixel_values: .* arrays of numbers of one shape"
        ):
            runner(data=ragged).items("one")

    def test_in_memory_are_refused_without_the_label(self) -> None:
        calibration = Calibration(Model(), batches("one"), label="class")
        with pytest.raises(
            InputError, match="expected batches of keyword arguments of the model and 'class'"
        ):
            ExpertRunner(calibration, MappingSource("base", {}, [])).items("one")

    def test_leave_padding_out(self) -> None:
        tensor = torch.arange(12.0).reshape(2, 3, 2)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        assert unpadded(tensor, {"attention_mask": mask}).tolist() == [[0, 1], [2, 3], [6, 7]]
        assert unpadded(tensor, {}).shape == (6, 2)

    def test_one_by_one(self) -> None:
        items = Items({"x": torch.tensor([[1.0], [2.0]])}, torch.tensor([0, 1]))
        parts = [(float(item.inputs["x"]), item.labels) for item in items.one_by_one()]
        assert parts == [(1.0, torch.tensor([0])), (2.0, torch.tensor([1]))]


class TestModel:
    def test_in_memory_is_not_changed(self) -> None:
        model = Model().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        experts = [{name: tensor + index for name, tensor in before.items()} for index in (1, 2)]
        for name in DATA:
            few = {"steps": 1} if name == "concrete" else {}
            merge(
                before, experts, operator=name, calibration=Calibration(model, batches("x")), **few
            )
        assert model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("base", [{"other": torch.zeros(2, 2)}, {"weight": torch.zeros(3, 2)}])
    def test_of_other_tensors_is_refused(self, base: dict[str, torch.Tensor]) -> None:
        calibration = Calibration(nn.Linear(2, 2, bias=False), [{"input": torch.ones(1, 2)}])
        with pytest.raises(
            InputError,
            match=rf"tensor '{next(iter(base))}': expected a parameter of Linear of shape",
        ):
            merge(base, [base], operator="regmean", calibration=calibration)

    def test_on_a_device_that_is_not_there_is_refused(
        self, folder: Path, pico: Callable[[str], Any]
    ) -> None:
        options = spec(folder, model_class="AutoModelForImageClassification", device="abacus")
        recipe = get_operator("regmean").complete({"calibration": options})
        with pytest.raises(
            InputError,
            match=r"calibration\.device: expected a device of this host, received: .*abacus",
        ):
            _ = ExpertRunner(recipe["calibration"], open_checkpoint(str(pico("vit").base))).model

    def test_that_does_not_classify_is_refused(self) -> None:
        base = {"weight": torch.eye(2)}
        calibration = Calibration(nn.Linear(2, 2, bias=False), [{"input": torch.ones(2)}])
        with pytest.raises(
            InputError, match=r"expected logits \(items, classes\) or .*, received shape \[2\]"
        ):
            merge(base, [base], operator="concrete", steps=1, calibration=calibration)

    def test_experts_take_turns(self) -> None:
        layer = nn.Linear(2, 2, bias=False)
        sources = [
            MappingSource(name, {"weight": torch.full((2, 2), value)}, ["weight"])
            for name, value in VALUES
        ]
        turn = ExpertRunner(Calibration(layer, [{"input": torch.ones(1, 2)}]), sources[0])
        for source, (_, value) in zip(sources, VALUES, strict=True):
            turn.load_all(source)
            assert turn.run(turn.items("x")[0]).tolist() == [[2 * value, 2 * value]]


VALUES = (("base", 1.0), ("one", 2.0))


class TestPiecewise:
    def test_makes_one_pass_and_keeps_it(self, tmp_path: Path) -> None:
        calls: list[int] = []
        source = Kept("base", Memo(tmp_path), "weights")
        for _ in range(2):
            get = memoised_per_tensor([source], ["thing"], counting(calls))
            assert float(get("a")["value"]) == 1
            assert float(get("b")["value"]) == 2
            assert get("c") == {}
        assert len(calls) == 1
        memoised_per_tensor([source], ["other thing"], counting(calls))
        memoised_per_tensor(
            [Kept("base", Memo(tmp_path), "other weights")], ["thing"], counting(calls)
        )
        assert len(calls) == 3

    def test_makes_a_lost_piece_again(self, tmp_path: Path) -> None:
        calls: list[int] = []
        get = memoised_per_tensor(
            [Kept("base", Memo(tmp_path), "weights")], ["thing"], counting(calls)
        )
        shutil.rmtree(tmp_path)
        assert float(get("a")["value"]) == 1
        assert len(calls) == 2

    @pytest.mark.parametrize(("key", "identity"), [(None, "weights"), (["thing"], "")])
    def test_holds_what_has_no_name(
        self, tmp_path: Path, key: list[str] | None, identity: str
    ) -> None:
        calls: list[int] = []
        get = memoised_per_tensor([Kept("base", Memo(tmp_path), identity)], key, counting(calls))
        assert float(get("a")["value"]) == 1
        assert get("c") == {}
        assert len(calls) == 1
        assert list(tmp_path.iterdir()) == []


def counting(calls: list[int]) -> Callable[[], Any]:
    """A pass over the tensors a and b that counts itself."""

    def compute() -> Any:
        calls.append(1)
        yield "a", {"value": torch.tensor(1.0)}
        yield "b", {"value": torch.tensor(2.0)}

    return compute
