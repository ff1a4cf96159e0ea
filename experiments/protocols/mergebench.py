"""MergeBench: five domains of language models, forgetting, and what merging costs."""

from __future__ import annotations

from experiments.protocols.protocol import Method, Protocol

_DOMAINS = {
    "instruction": "ifeval",
    "math": "gsm8k_cot",
    "multilingual": "m_mmlu, m_arc and m_hellaswag in fr, es, de, ru",
    "coding": "HumanEval+ and MBPP+",
    "safety": "WildGuardTest, HarmBench, DoAnythingNow, XSTest (lower is better)",
}

MERGEBENCH = Protocol(
    name="mergebench",
    title="MergeBench",
    paper="He 2025, MergeBench: a benchmark for merging domain-specialized LLMs (2505.10833)",
    settings="scripts of uiuctml/MergeBench",
    tasks=_DOMAINS,
    base="meta-llama/Llama-3.2-3B",
    experts={domain: f"MergeBench/Llama-3.2-3B_{domain}" for domain in _DOMAINS},
    methods=(
        Method("Model Soup", "average"),
        Method("Task arithmetic", "task_arithmetic", coefficient=0.4),
        Method(
            "Fisher merging", "fisher", differs="F over the model's own answers, token by token"
        ),
        Method("RegMean", "regmean", {"reduce": 0.5}),
        Method("TIES", "ties", {"density": 0.3, "merge": "sum"}, 0.4),
        Method("DARE", "dare", {"drop": 0.9}, 0.4),
        Method("Consensus TA", "consensus", {"threshold": 0.2, "agreement": 2}, 0.4),
        Method(
            "Localize-and-Stitch",
            "localize_and_stitch",
            {"density": 0.1},
            differs="its variant without data; masks that are trained are not there",
        ),
    ),
    reports=("tasks", "general", "cost"),
    differs=(
        "Coefficients are those of the scripts; a search of them on other tasks is not repeated.",
    ),
)
