"""Damaged study files, read by `check`."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import yaml

from mergesearch.search.plan.loading import load_study
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, LINES, TEXT, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file
from tests.fuzz.yaml_mutations import YAML, mutate_yaml
from tests.search.conftest import make_pico_items, make_pico_models, model_study
from tests.search.studies import analytic

KIND = "studies"
#: One seed in so many plans the study too, which opens the headers of models and the data.
PLANNED = 4


def full_study() -> dict[str, Any]:
    """An analytic study that gives nearly every section."""
    return analytic(
        "full",
        trials=20,
        strategy={"name": "cma_es", "population": 8, "sigma": 0.2},
        fidelity={"rule": "race", "min_items": 10, "confidence": 1.5},
        selection={"leaders": 2, "confidence": 1.0, "repeats": 1, "weights": {"sphere": 1.0}},
        workers={"backend": "inline", "count": 1, "cpus": 1, "gpus": 0, "threads": 1},
        driver={"drain_seconds": 1, "patience_seconds": 5, "lease_seconds": 10},
        budget={"trials": 20, "evaluations": 10_000, "seconds": 60, "worker_hours": 1},
        reference_scores={"base": {"sphere": 0.5}},
        trackers=[{"name": "mlflow", "uri": "http://localhost:5000", "tags": {"a": "b"}}],
        storage="sqlite:///${HOME}/log.db",
        max_consecutive_failures=5,
    )


def prepare(folder: Path) -> None:
    """Make studies, and the models and data of one."""
    make_pico_models(folder / "models")
    make_pico_items(folder / "data")
    models = model_study(Path("models"), Path("data"), name="models", strategy="sobol")
    depth = model_study(
        Path("models"),
        Path("data"),
        space={"depth": {"basis": "dct", "size": 2}, "bounds": [0.0, 1.0], "exclude": ["head"]},
        operator={"name": "ties", "density": 0.5},
        special={"heads": "base"},
    )
    studies = {"analytic": analytic(), "full": full_study(), "models": models, "depth": depth}
    for name, data in studies.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    for name in studies:
        load_study(folder / f"{name}.yaml")  # they are right


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a study, and load or check it.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    source = draw.choice(sorted(prepared.glob("*.yaml")))
    tables = (YAML, YAML, LINES, TEXT, ANY)
    data = mutated(source.read_bytes(), draw, *tables)
    if draw.random() < 0.3:
        data = mutate_yaml(source.read_bytes(), draw)
    scratch.mkdir(parents=True, exist_ok=True)
    for name in ("models", "data"):  # paths in studies are relative to them
        link = scratch / name
        if not link.is_symlink():
            link.symlink_to(prepared / name)
    study = scratch / "study.yaml"
    clear(study)
    study.write_bytes(data)
    if not draw.randrange(ODD):
        put_odd_file(study, draw)
    before = sorted(scratch.iterdir())
    if draw.randrange(PLANNED):
        read_or_refuse(lambda: load_study(study))
    else:
        run_verb(["check", str(study)])
    demand(sorted(scratch.iterdir()) == before, "expected nothing to be written")
