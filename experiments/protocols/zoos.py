"""The small models of this repository as models of the protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.protocols.models_file import Models, models_of
from experiments.running import ROOT
from experiments.zoo.calibration import clip_calibration, digits_calibration, skills_calibration
from experiments.zoo.clip import build_clip
from experiments.zoo.clip import section as clip_section
from experiments.zoo.clip_data import CLASSES
from experiments.zoo.digits import build_digits
from experiments.zoo.digits_data import DOMAINS
from experiments.zoo.questions import build_questions
from experiments.zoo.questions import section as questions_section
from experiments.zoo.questions_data import QUESTIONS
from experiments.zoo.skills import build_skills
from experiments.zoo.skills_data import SKILLS, SPLITS

ZOOS = ROOT / "zoo"
#: Gradient steps of AdaMerging on a tiny CLIP: enough for its entropy to settle.
STEPS = 300


def clip(out: Path) -> Models:
    """Four image tasks of a tiny CLIP."""
    zoo = build_clip(ZOOS / "clip")
    named = [{"name": task, "metric": "accuracy", "domains": [task]} for task in CLASSES]
    content = _content("clip", zoo, CLASSES, [clip_section(zoo) | {"objectives": named}])
    content["calibration"] = clip_calibration(zoo, out)
    unlabelled = clip_section(zoo, "entropy", transductive=True)
    content["adaptation"] = {"evaluators": [unlabelled], "steps": STEPS}
    return models_of(content, "clip zoo", ROOT)


def digits(out: Path) -> Models:
    """Four ways to see digits, by a small ViT."""
    zoo = build_digits(ZOOS / "digits")
    named = [{"name": task, "metric": "accuracy", "domains": [task]} for task in DOMAINS]
    section = {
        "kind": "classification",
        "data": str(zoo / "data"),
        "domain": "domain",
        "id": "id",
        "objectives": named,
    }
    content = _content("digits", zoo, DOMAINS, [section])
    content["calibration"] = digits_calibration(zoo, out / "digits-items")
    return models_of(content, "digits zoo", ROOT)


def skills(out: Path) -> Models:
    """Five skills of a small Llama, and texts as what the base can do beside them."""
    zoo = build_skills(ZOOS / "skills")
    splits = {split: split for split in SPLITS}
    section = {
        "kind": "lm_eval",
        "include_path": str(zoo / "tasks"),
        "tasks": [
            {"task": "skills", "splits": splits},
            {"task": "skills_text", "splits": splits, "metric": "bits_per_byte"},
        ],
        "objectives": [
            *({"name": skill, "domains": [f"skills_{skill}"]} for skill in SKILLS),
            {"name": "text", "domains": ["skills_text"]},
        ],
    }
    content = _content("skills", zoo, SKILLS, [section])
    content["general"] = ["text"]
    content["calibration"] = skills_calibration(zoo, out / "skills-items")
    return models_of(content, "skills zoo", ROOT)


def questions(_out: Path) -> Models:
    """Four questions about pictures, answered by a tiny LLaVA."""
    zoo = build_questions(ZOOS / "questions")
    content = _content("questions", zoo, QUESTIONS, [questions_section(zoo)])
    return models_of(content, "questions zoo", ROOT)


def _content(
    name: str, zoo: Path, tasks: Mapping[str, Any] | Any, evaluators: list[dict[str, Any]]
) -> dict[str, Any]:
    """What files of all zoos have: experts and objectives have the names of the tasks."""
    return {
        "name": name,
        "base": str(zoo / "base"),
        "experts": {task: str(zoo / task) for task in tasks},
        "tasks": {task: [task] for task in tasks},
        "evaluators": evaluators,
    }


#: Protocol -> the zoos that it runs on here.
ON_ZOOS: Mapping[str, tuple[Callable[[Path], Models], ...]] = {
    "mergebench": (skills,),
    "mllm": (questions,),
    "at-scale": (digits,),
    "fusionbench": (clip,),
}
