"""What works on an architecture: checked, merged, loaded again and searched, as a user would."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.pipelines import STEMS
from mergesearch.search.cli.main import app
from tests.architectures.arrays import arrays, inputs_of
from tests.architectures.catalogue import ARCHITECTURES, Architecture
from tests.architectures.denoisers import DENOISERS, INSTALLED
from tests.architectures.evaluations import EXPERTS, sections_of
from tests.architectures.names_of import LAYOUTS, layout_shapes
from tests.merging.operators.calibrated import save_items

OPERATORS = ("task_arithmetic", "ties", "tsv", "dare_ties", "regmean")
#: Columns of the table that a trial fills.
STEPS = ("check", *OPERATORS, "study")
WORKS = "yes"
#: Where an operator does not apply.
NOT_APPLICABLE = "–"
TRIALS = 10
ITEMS = 6


def try_out(name: str, folder: Path, steps: Sequence[str] = STEPS) -> dict[str, str]:
    """Step -> :data:`WORKS`, :data:`NOT_APPLICABLE`, or what went wrong in one line."""
    architecture = ARCHITECTURES.get(name) or (DENOISERS.get(name) if INSTALLED else None)
    if architecture is None:
        _write_layout(name, folder)
    else:
        make_family(architecture, folder)
    study = write_study_of(name, folder)
    acts: dict[str, Callable[[], None]] = {
        "check": partial(_command, "check", str(study)),
        "study": partial(_run, study),
    }
    acts |= {operator: partial(_merge, folder, architecture, operator) for operator in OPERATORS}
    return {step: _outcome(acts[step]) for step in steps}


def _write_layout(name: str, folder: Path) -> None:
    """A family of a model that transformers does not build, from its names alone."""
    for seed, member in enumerate(("base", *EXPERTS)):
        generator = torch.Generator().manual_seed(seed)
        (folder / member).mkdir()
        tensors = {
            tensor: torch.ones(shape) + 0.02 * torch.randn(shape, generator=generator)
            for tensor, shape in layout_shapes(name).items()
        }
        save_file(tensors, folder / member / f"{STEMS[name.startswith('diffusers')]}.safetensors")


def make_family(architecture: Architecture, folder: Path) -> None:
    """A base, two experts near it, and items where the model takes plain ones."""
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(0)
        model = architecture.build()
    model.save_pretrained(folder / "base")
    base = [parameter.detach().clone() for parameter in model.parameters()]
    for seed, expert in enumerate(EXPERTS, start=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, origin in zip(model.parameters(), base, strict=True):
                noise = torch.randn(origin.shape, generator=generator)
                parameter.copy_(origin + 0.02 * noise * _spread(origin))
        model.save_pretrained(folder / expert)
    inputs = inputs_of(architecture)
    if inputs:
        save_items(folder / "items", arrays(inputs, ITEMS, np.random.default_rng(3)))


def _spread(tensor: torch.Tensor) -> float:
    """Mean size of the elements of a tensor, 1 for one of zeros."""
    return float(tensor.abs().mean()) or 1.0


def _outcome(act: Callable[[], None]) -> str:
    try:
        act()
    except NotImplementedError:
        return NOT_APPLICABLE
    except Exception as error:  # the table says what went wrong
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return WORKS


def _merge(folder: Path, architecture: Architecture | None, operator: str) -> None:
    """Merge by a recipe file, and load the result as a user would."""
    out = folder / f"merged-{operator}"
    recipe: dict[str, Any] = {
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in EXPERTS},
        "operator": operator,
        "special": _special(folder),
    }
    if operator == "regmean":
        inputs = {} if architecture is None else inputs_of(architecture)
        if architecture is None or not inputs:
            raise NotImplementedError  # it runs the model
        recipe["hyperparameters"] = {
            "calibration": {
                "data": str(folder / "items"),
                "model_class": architecture.auto,
                "inputs": {name: name for name in inputs},
            }
        }
    file = folder / f"{operator}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    _command("merge", str(file), "--out", str(out), "--threads", "1")
    if architecture is None:
        assert open_checkpoint(str(out)).names == open_checkpoint(str(folder / "base")).names
    else:
        _reload(out, architecture)


def _reload(out: Path, architecture: Architecture) -> None:
    _, report = architecture.loader.from_pretrained(out, output_loading_info=True)
    odd = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(odd.values()):
        raise AssertionError(f"expected every key, received {odd}")


def _special(folder: Path) -> dict[str, str]:
    """Policies that a user has to choose for the model."""
    names = open_checkpoint(str(folder / "base")).names
    return {"batch_norm": "base"} if any("running_mean" in name for name in names) else {}


def write_study_of(name: str, folder: Path) -> Path:
    """The study file of a family, with the evaluators of its kind."""
    evaluators = sections_of(name, folder)
    study = {
        "name": "trial",
        "base": str(folder / "base"),
        "experts": {expert: str(folder / expert) for expert in EXPERTS},
        "operator": "task_arithmetic",
        "special": _special(folder),
        "space": {"granularity": "block_module"},
        "strategy": "sobol",
        "evaluators": evaluators,
        "budget": {"trials": TRIALS},
        "allow_code": name in LAYOUTS,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def _run(study: Path) -> None:
    """Run the study, all of whose trials must have a value for every objective."""
    run = study.parent / "run"
    _command("run", str(study), "--run", str(run), "--progress", "quiet")
    report = json.loads((run / "report.json").read_text())
    trials = report["trials"]
    odd = [trial["number"] for trial in trials if trial["state"] != "complete"]
    if len(trials) != TRIALS or odd:
        raise AssertionError(f"expected {TRIALS} complete trials, received {len(trials)}, {odd}")
    found = [trial["values"] for trial in trials]
    # Models that have learnt nothing are never right.
    alike = all(values == found[0] for values in found) and {*found[0]} != {"accuracy"}
    if alike or not np.isfinite([[*values.values()] for values in found]).all():
        raise AssertionError(f"expected finite values that differ, received {found}")


def _command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise RuntimeError(result.output.strip().splitlines()[-1])
    return result.output
