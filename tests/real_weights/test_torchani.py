"""Plain modules of physics: pairs that come from each other, members that do not, and a search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mergesearch import Study
from tests.real_weights.ani import MEMBERS, Molecules, Networks, permuted, read_networks, shaken
from tests.real_weights.conftest import Wheels
from tests.search.cli.test_cli import mergesearch, refused

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_weights")]

ENSEMBLES = ("1x", "1ccx")
#: Split -> molecules of each kind, and the seed of their shapes.
SPLITS = {"search": (10, 1), "validation": (10, 2), "test": (20, 3)}
SPREAD = 0.05

States = Mapping[tuple[str, int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def states(wheels: Wheels) -> States:
    """All networks of both ensembles."""
    archive = wheels("torchani==1.2")
    return {
        (ensemble, member): read_networks(archive, ensemble, member)
        for ensemble in ENSEMBLES
        for member in range(MEMBERS)
    }


@pytest.fixture(scope="module")
def files(states: States, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """They as files, ``1x-0.safetensors`` and so on."""
    folder = tmp_path_factory.mktemp("ani")
    for (ensemble, member), state in states.items():
        save_file(state, folder / f"{ensemble}-{member}.safetensors")
    return folder


def networks(state: Mapping[str, torch.Tensor]) -> Networks:
    model = Networks()
    model.load_state_dict(state)
    return model.eval()


def lineage(base: Path, expert: Path) -> tuple[str, dict[str, float]]:
    """Verdict, and the cosine of each role."""
    code, out, err = mergesearch("compare-weights", base, expert, "--json")
    assert code == 0, err
    found = json.loads(out)
    return found["kind"], {role: one["cosine"] for role, one in found["roles"].items()}


def test_members_agree_about_molecules(states: States) -> None:
    """Weights and environments are read as they were meant: else energies would be anything."""
    molecules = shaken(2, seed=0, spread=SPREAD)
    for ensemble in ENSEMBLES:
        with torch.inference_mode():
            energies = torch.stack([networks(states[ensemble, i])(molecules) for i in range(8)])
        assert energies.std(0).mean() < 2.5  # kilocalories per mole
        assert energies.mean(0).std() > 5


@pytest.mark.parametrize("member", range(MEMBERS))
def test_pairs_come_from_each_other(files: Path, member: int) -> None:
    kind, cosines = lineage(
        files / f"1x-{member}.safetensors", files / f"1ccx-{member}.safetensors"
    )
    assert kind == "fine-tuned"
    assert min(cosines.values()) > 0.99


@pytest.mark.parametrize("member", range(1, MEMBERS))
def test_members_of_an_ensemble_do_not(files: Path, member: int) -> None:
    kind, cosines = lineage(files / "1x-0.safetensors", files / f"1x-{member}.safetensors")
    assert kind == "unrelated"
    assert all(abs(cosine) < 0.1 for role, cosine in cosines.items() if role != "vectors")


def test_a_merge_of_members_is_refused(files: Path, tmp_path: Path) -> None:
    recipe = {
        "operator": "task_arithmetic",
        "base": str(files / "1x-0.safetensors"),
        "experts": {
            "coupled": str(files / "1ccx-0.safetensors"),
            "other": str(files / "1x-1.safetensors"),
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    message = refused("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert message.startswith("expert 'other'")
    assert "weights of another origin" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_permuted_twin_is_recognised(
    states: States, files: Path, tmp_path: Path, ensemble: str
) -> None:
    """Also where it was trained on after its units were moved."""
    twin = permuted(states[ensemble, 0])
    molecules = shaken(1, seed=0)
    with torch.inference_mode():
        same = networks(twin)(molecules), networks(states[ensemble, 0])(molecules)
    assert torch.allclose(*same, atol=1e-3)
    save_file(twin, tmp_path / "twin.safetensors")
    kind, _ = lineage(files / "1x-0.safetensors", tmp_path / "twin.safetensors")
    assert kind == "permuted"


def relative(model: torch.nn.Module, molecules: Molecules, still: Molecules) -> torch.Tensor:
    """Energies relative to the molecules at rest, which do not depend on those of free atoms."""
    energies: torch.Tensor = model(molecules)
    return energies - model(still).repeat(molecules.count // still.count)


def test_a_search_between_a_pair_of_networks(states: States, tmp_path: Path) -> None:
    """How near to the mean of the other seven networks is a merge of one and its successor?

    Halfway between them energies are worse than at either end, although their cosine is 0.998.
    """
    member = 6
    still = shaken(1, seed=0, spread=0)
    molecules = {split: shaken(*numbers, SPREAD) for split, numbers in SPLITS.items()}
    others = [networks(states["1ccx", i]) for i in range(MEMBERS) if i != member]
    with torch.inference_mode():
        targets = {
            split: torch.stack([relative(other, each, still) for other in others]).mean(0)
            for split, each in molecules.items()
        }

    def evaluate(model: torch.nn.Module, split: str) -> torch.Tensor:
        return (relative(model, molecules[split], still) - targets[split]).abs()

    study = Study(
        name="ani",
        run=tmp_path / "run",
        base=networks(states["1x", member]),
        experts={"coupled": networks(states["1ccx", member])},
        evaluate=evaluate,
        model_class=Networks,
        objectives={"error": "minimize"},
        space={
            "granularity": "task",
            "groups": {f"layer{layer}": rf".*\.{layer}\..*" for layer in (0, 2, 4, 6)},
        },
        budget={"trials": 80},
    )
    study.run(progress="quiet")
    print(study.summary())
    shown = json.loads(mergesearch("show", tmp_path / "run", "--json")[1])
    scores = {row["name"]: row["scores"]["test"] for row in shown["result"]}
    error = {name: score["values"]["error"] for name, score in scores.items()}
    (winner,) = (row["name"] for row in shown["result"] if row["winner"])
    assert error["expert coupled"] < 0.7 * error["base"]
    assert error["task_arithmetic 0.3"] > 1.2 * error["base"]
    assert error[winner] < error["expert coupled"] + 2 * scores[winner]["errors"]["error"]
    with torch.inference_mode():
        again = evaluate(study.best_model(), "test").mean()
    assert again.item() == pytest.approx(error[winner], rel=1e-5)
