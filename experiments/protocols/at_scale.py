"""What Matters for Model Merging at Scale: subsets of experts, tasks held in and held out."""

from __future__ import annotations

from experiments.protocols.protocol import Method, Protocol

_HELD_IN = (
    "multiple-choice QA",
    "extractive QA",
    "closed-book QA",
    "sentiment analysis",
    "topic classification",
    "structure to text",
    "summarization",
    "paraphrase identification",
)
_GRID = (0.3, 0.5, 0.7, 1.0)
_OURS = "the coefficient is chosen here; we know no published one"

AT_SCALE = Protocol(
    name="at-scale",
    title="What Matters for Model Merging at Scale",
    paper="Yadav 2024, What matters for model merging at scale? (2410.03617)",
    settings="the paper's text; it has no published code or checkpoints",
    tasks=dict.fromkeys(_HELD_IN, "two datasets of the T0 mixture"),
    base="PaLM-2 and PaLM-2-IT, 1B to 64B (not published)",
    experts={},
    methods=(
        Method("Averaging", "average"),
        Method("Task arithmetic", "task_arithmetic", grid=_GRID, differs=_OURS),
        Method("DARE-TIES", "dare_ties", {"drop": 0.9}, grid=_GRID, differs=_OURS),
        Method("TIES", "ties", {"density": 0.2}, grid=_GRID, differs=_OURS),
    ),
    reports=("subsets", "cost"),
    differs=(
        "Sizes and kinds of base are compared by one run for each.",
        "Held out there: sentence completion, inference, coreference, word senses.",
    ),
)
