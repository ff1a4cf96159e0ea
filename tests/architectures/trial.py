"""What works on an architecture: checked, merged, loaded again and searched, as a user would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.pipelines import STEMS
from mergesearch.search.cli.main import app
from tests.architectures.catalogue import ARCHITECTURES, Architecture
from tests.architectures.names_of import LAYOUTS, layout_shapes

OPERATORS = ("task_arithmetic", "ties", "tsv", "dare_ties", "regmean")
#: Columns of the table that a trial fills.
STEPS = ("check", *OPERATORS, "study")
WORKS = "yes"
#: Where an operator does not apply.
NOT_APPLICABLE = "–"
TRIALS = 10
ITEMS = 6


def try_out(name: str, folder: Path) -> dict[str, str]:
    """Step -> :data:`WORKS`, :data:`NOT_APPLICABLE`, or what went wrong in one line."""
    if name in LAYOUTS:
        return try_layout(name, folder)
    architecture = ARCHITECTURES[name]
    make_family(architecture, folder)
    steps: dict[str, Callable[[], None]] = {"check": partial(_study, folder, architecture, "check")}
    for operator in OPERATORS:
        steps[operator] = partial(_merge, folder, architecture, operator)
    steps["study"] = partial(_study, folder, architecture, "run")
    return {step: _outcome(act) for step, act in steps.items()}


def try_layout(name: str, folder: Path) -> dict[str, str]:
    """The same of a model that transformers does not build: it is merged from its tensors alone."""
    for seed, member in enumerate(("base", "left", "right")):
        generator = torch.Generator().manual_seed(seed)
        (folder / member).mkdir()
        tensors = {
            tensor: torch.ones(shape) + 0.02 * torch.randn(shape, generator=generator)
            for tensor, shape in layout_shapes(name).items()
        }
        save_file(tensors, folder / member / f"{STEMS[name.startswith('diffusers')]}.safetensors")
    outcomes = dict.fromkeys(STEPS, NOT_APPLICABLE)
    for operator in OPERATORS:
        if operator != "regmean":  # needs a model to run
            outcomes[operator] = _outcome(partial(_merge, folder, None, operator))
    return outcomes


def make_family(architecture: Architecture, folder: Path) -> None:
    """A base, two experts near it, and items where the model takes plain ones."""
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(0)
        model = architecture.build()
    model.save_pretrained(folder / "base")
    base = [parameter.detach().clone() for parameter in model.parameters()]
    for seed, expert in enumerate(("left", "right"), start=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, origin in zip(model.parameters(), base, strict=True):
                noise = torch.randn(origin.shape, generator=generator)
                parameter.copy_(origin + 0.02 * noise * _spread(origin))
        model.save_pretrained(folder / expert)
    inputs = inputs_of(architecture)
    if inputs:
        _save_items(folder / "items", inputs)


def _spread(tensor: torch.Tensor) -> float:
    """Mean size of the elements of a tensor, 1 for one of zeros."""
    return float(tensor.abs().mean()) or 1.0


def inputs_of(architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Argument of the model -> kind and shape of one item; empty without plain arrays."""
    tokens = ("tokens", (8,))
    side = architecture.options.get("image_size", 32)
    kinds: Mapping[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "AutoModelForCausalLM": {"input_ids": tokens},
        "AutoModelForMaskedLM": {"input_ids": tokens},
        "AutoModelForSequenceClassification": {"input_ids": tokens},
        "AutoModelForSeq2SeqLM": {"input_ids": tokens, "decoder_input_ids": tokens},
        "AutoModelForSpeechSeq2Seq": {
            "input_features": ("numbers", (8, 20)),
            "decoder_input_ids": tokens,
        },
        "AutoModelForCTC": {"input_values": ("numbers", (64,))},
        "AutoModelForImageClassification": {"pixel_values": ("numbers", (3, side, side))},
        "AutoModelForSemanticSegmentation": {"pixel_values": ("numbers", (3, 32, 32))},
        "AutoModelForObjectDetection": {"pixel_values": ("numbers", (3, 32, 32))},
        "AutoModelForZeroShotImageClassification": {
            "input_ids": tokens,
            "pixel_values": ("numbers", (3, 8, 8)),
        },
    }
    return kinds.get(architecture.auto, {})


def _save_items(folder: Path, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    from tests.merging.operators.calibrated import save_items

    generator = torch.Generator().manual_seed(3)
    columns = {
        name: torch.randint(3, 40, (ITEMS, *shape), generator=generator).tolist()
        if kind == "tokens"
        else torch.randn((ITEMS, *shape), generator=generator).tolist()
        for name, (kind, shape) in inputs.items()
    }
    save_items(folder, columns)


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
        "experts": {name: str(folder / name) for name in ("left", "right")},
        "operator": operator,
        "special": _special(folder),
    }
    if operator == "regmean" and architecture is not None:
        inputs = inputs_of(architecture)
        if not inputs:
            raise NotImplementedError
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
    import transformers

    loader = getattr(transformers, architecture.model)
    _, report = loader.from_pretrained(out, output_loading_info=True)
    odd = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(odd.values()):
        raise AssertionError(f"expected every key, received {odd}")


def _special(folder: Path) -> dict[str, str]:
    """Policies that a user has to choose for the model."""
    names = open_checkpoint(str(folder / "base")).names
    return {"batch_norm": "base"} if any("running_mean" in name for name in names) else {}


def _study(folder: Path, architecture: Architecture, verb: str) -> None:
    study = {
        "name": "trial",
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in ("left", "right")},
        "operator": "task_arithmetic",
        "special": _special(folder),
        "space": {"granularity": "block_module"},
        "strategy": "sobol",
        "evaluators": [{"kind": "distance", "model_class": architecture.auto}],
        "budget": {"trials": TRIALS},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    more = ["--run", str(folder / "run"), "--progress", "quiet"] if verb == "run" else []
    _command(verb, str(file), *more)


def _command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise RuntimeError(result.output.strip().splitlines()[-1])
    return result.output
