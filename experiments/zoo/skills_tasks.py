"""Task files for lm_eval on the questions of the skills zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.zoo.skills_data import SKILLS, SPLITS
from mergesearch.merging.checkpoints.atomic import write_atomically


def write_tasks(folder: Path, home: Path) -> None:
    """Write the task files of a zoo; they name data below ``home`` by absolute paths."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for name, task in task_files(home).items():
        path = folder / f"{name}.yaml"
        content = yaml.safe_dump(task, sort_keys=False)
        if not path.is_file() or path.read_text() != content:
            write_atomically(path, content)


def task_files(home: Path) -> dict[str, dict[str, Any]]:
    """Name -> content of every task file."""
    tasks: dict[str, dict[str, Any]] = {}
    for skill in SKILLS:
        tasks[f"skills_{skill}"] = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }
        tasks[f"skills_{skill}_generate"] = {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 14, "do_sample": False},
            "filter_list": [
                {
                    "name": "stripped",
                    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [_metric("exact_match")],
        }
    tasks["skills_addition_loglikelihood"] = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": " {{target}}",
        "metric_list": [_metric("perplexity", "perplexity", better=False), _metric("acc")],
    }
    tasks["skills_text"] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    }
    listed = {name: _source(name, home) | task for name, task in tasks.items()}
    group = {"group": "skills", "task": [f"skills_{skill}" for skill in SKILLS]}
    return {**{name: {"task": name} | task for name, task in listed.items()}, "skills": group}


def _metric(name: str, aggregation: str = "mean", *, better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


def _source(name: str, home: Path) -> dict[str, Any]:
    """Where a task's documents are."""
    data = home / "data" / name.split("_")[1]
    return {
        "dataset_path": "arrow",
        "dataset_kwargs": {
            "data_files": {
                split: str(data / split / "data-00000-of-00001.arrow") for split in SPLITS
            }
        },
        "validation_split": "validation",
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
