"""Damaged `--set` options, read beside real studies."""

from __future__ import annotations

from pathlib import Path
from random import Random

import yaml

from mergesearch.search.plan.loading import load_study
from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.mutations import ANY, TEXT, mutated
from tests.fuzz.nasty import NASTY_TOKENS
from tests.fuzz.studies import full_study
from tests.fuzz.values import nasty, places
from tests.fuzz.yaml_mutations import YAML
from tests.search.studies import analytic

KIND = "overrides"


def prepare(folder: Path) -> None:
    """Make studies."""
    for name, data in {"analytic": analytic(), "full": full_study()}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def _override(study: Path, draw: Random) -> str:
    """An override of a key of a study, or of none, with a value that readers do not expect."""
    found = places(yaml.safe_load(study.read_text()))
    key = ".".join(map(str, draw.choice(found))) or "name"
    kind = draw.randrange(4)
    if kind == 0:
        value = draw.choice(NASTY_TOKENS)
    elif kind == 1:
        value = yaml.safe_dump(nasty(draw), default_flow_style=True).encode("utf-8", "replace")
    else:
        value = mutated(draw.choice((b"0.5", b"{name: cma_es}", b"[1, 2]", b"x")), draw, YAML, TEXT)
    text = key.encode() + b"=" + value
    if draw.random() < 0.3:
        text = mutated(text, draw, TEXT, ANY)
    # A command line holds no NUL, and what is no UTF-8 arrives as lone surrogates.
    return text.replace(b"\x00", b"").decode("utf-8", "surrogateescape")


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Load or check a study with one to three overrides.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    study = draw.choice(sorted(prepared.glob("*.yaml")))
    overrides = [_override(study, draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
    before = sorted(prepared.iterdir())
    if draw.randrange(4):
        read_or_refuse(lambda: load_study(study, overrides))
    else:
        run_verb(["check", str(study), *(f"--set={each}" for each in overrides)])
    demand(sorted(prepared.iterdir()) == before, "expected nothing to be written")
