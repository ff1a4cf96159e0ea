"""FusionBench's eight image tasks of CLIP ViT-B/32."""

from __future__ import annotations

from experiments.protocols.protocol import Adaptation, Method, Protocol

_TASKS = (
    "sun397",
    "stanford-cars",
    "resisc45",
    "eurosat",
    "svhn",
    "gtsrb",
    "mnist",
    "dtd",
)
#: AdaMerging as published: Adam on the entropy of test items, 16 of every task for each step.
_ADAM = {"learning_rate": 1e-3}
_STEPS = 1000

FUSIONBENCH = Protocol(
    name="fusionbench",
    title="FusionBench, eight tasks of CLIP ViT-B/32",
    paper="Tang 2024, FusionBench: a comprehensive benchmark of deep model fusion (2406.03280)",
    settings="configurations and table of tanganke/fusion_bench; Iso-C and Iso-CTS with the "
    "coefficient of its newer table",
    tasks=dict.fromkeys(_TASKS, "accuracy by class prompts"),
    base="openai/clip-vit-base-patch32",
    experts={task: f"tanganke/clip-vit-base-patch32_{task}" for task in _TASKS},
    methods=(
        Method("Simple averaging", "average"),
        Method("Fisher merging", "fisher", {"normalise": True, "floor": 1e-6}),
        Method("RegMean", "regmean", {"reduce": 0.6}),
        Method("RegMean++", "regmean_pp", {"reduce": 0.95}),
        Method("Task arithmetic", "task_arithmetic", coefficient=0.3),
        Method("TIES", "ties", {"density": 0.2, "merge": "sum"}, 0.3),
        Method(
            "AdaMerging, task-wise",
            "task_arithmetic",
            adaptation=Adaptation("adamerging", "task", _ADAM, _STEPS),
        ),
        Method(
            "AdaMerging, layer-wise",
            "task_arithmetic",
            adaptation=Adaptation("adamerging", "tensor", _ADAM, _STEPS),
        ),
        Method(
            "WUDI",
            "wudi",
            coefficient=1.0,
            differs="the authors' closed form instead of Adam's iterates",
        ),
        Method("Iso-C", "iso_c", coefficient=1.5),
        Method("Iso-CTS", "iso_cts", coefficient=1.5),
    ),
    reports=("tasks", "cost"),
    differs=(
        "Weight-ensembling mixtures keep all experts and merge no weights into one model.",
        "Corrupted test sets and tasks without an expert are not part of this table.",
    ),
)
