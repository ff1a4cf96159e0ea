"""The reference of the study file says what the models accept, and every topic can be found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from mergesearch.evaluators.spec.evaluators import SECTIONS
from mergesearch.merging import InputError
from mergesearch.merging.operators import OPERATORS
from mergesearch.search.cli.main import app
from mergesearch.search.plan.study_reference import every_topic, find_topic, page
from mergesearch.search.spec.sections import StudySpec, study_schema
from mergesearch.search.strategies.table import STRATEGIES
from tests.search.studies import analytic

ROOT = Path(__file__).parents[3]


def test_every_key_of_every_section_has_a_meaning() -> None:
    topics = {topic.name: topic for topic in every_topic()}
    mute = [
        f"{topic.name}.{row.key}"
        for topic in topics.values()
        for row in topic.rows
        if not row.meaning
    ]
    assert mute == []
    assert {row.key for row in topics["study"].rows} == set(StudySpec.model_fields)
    for kind, table in (
        ("evaluators", SECTIONS),
        ("operator", OPERATORS),
        ("strategy", STRATEGIES),
    ):
        assert {f"{kind}.{name}" for name in table} <= set(topics)


@pytest.mark.parametrize(
    ("topic", "key", "type_", "default"),
    [
        ("study", "budget", "section", "required"),
        ("study.budget", "trials", "whole number or none (≥ 1)", "none"),
        ("fidelity", "confidence", "number (> 0)", "1"),
        ("fidelity.confidence", "confidence", "number (> 0)", "1"),
        ("evaluators.command", "timeout", "number (> 0)", "600"),
        ("evaluators.classification.data", "seed", "whole number (≥ 0)", "0"),
        ("strategy.cma_es", "population", "whole number (≥ 4) or none", "none"),
        ("operator.ties", "density", "number (> 0, ≤ 1)", "0.2"),
    ],
)
def test_limits_and_defaults_are_those_of_the_declaration(
    topic: str, key: str, type_: str, default: str
) -> None:
    row = next(row for row in find_topic(topic).rows if row.key == key)
    assert (row.type, row.default) == (type_, default)


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("evaluators.comand", "expected a key of evaluators, received 'comand'; did you mean 'com"),
        ("budget.trails", "expected a key of budget, received 'trails'; did you mean 'trials'?"),
        ("operator.tise", "did you mean 'ties'?"),
        ("strategy.cma", "did you mean 'cma_es'?"),
        ("studies", "expected a key of study"),
    ],
)
def test_a_topic_that_is_not_there_is_refused_with_the_closest(topic: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        find_topic(topic)


def test_the_page_is_the_one_in_the_docs() -> None:
    assert (ROOT / "docs" / "study-reference.md").read_text(encoding="utf-8") == page()


def test_every_link_of_the_page_leads_to_a_heading() -> None:
    text = page()
    anchors = {
        re.sub(r"[^\w-]", "", heading.lower()) for heading in re.findall(r"^## (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


@pytest.mark.parametrize(
    "path", ["experiments/0001-digits/study.yaml", "experiments/0006-skills/study.yaml"]
)
def test_the_schema_accepts_what_the_product_accepts(path: str) -> None:
    jsonschema.validate(yaml.safe_load((ROOT / path).read_text()), study_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"budgt": 3},
        {"strategy": 3},
        {"budget": {"trials": 0}},
        {"evaluators": [{"kind": "synthetic", "problem": "spher"}]},
        {"experts": 3},
    ],
)
def test_the_schema_refuses_what_the_product_refuses(change: dict[str, Any]) -> None:
    short = analytic() | {"strategy": "cma_es", "operator": "ties", "fidelity": "race"}
    jsonschema.validate(short, study_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(short | change, study_schema())


def test_the_commands_print_them() -> None:
    told = CliRunner().invoke(app, ["help", "evaluators.command", "--json"])
    assert json.loads(told.output) == json.loads(
        json.dumps(find_topic("evaluators.command").to_dict())
    )
    text = CliRunner().invoke(app, ["help", "evaluators.command"]).output
    assert "timeout: number (> 0); default 600" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    schema = CliRunner().invoke(app, ["schema"])
    assert json.loads(schema.output) == json.loads(json.dumps(study_schema()))
