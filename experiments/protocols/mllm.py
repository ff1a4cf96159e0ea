"""The suite of multimodal language models of OptMerge."""

from __future__ import annotations

from experiments.protocols.protocol import Method, Protocol

_TASKS = {
    "OCR": "TextVQA, OCRVQA, OCRBench and the like",
    "VQA": "VQA v2, GQA, VizWiz and the like",
    "Geometry": "MathVista, MathVision and the like",
    "Chart": "ChartQA and the like",
    "Grounding": "RefCOCO, RefCOCO+, RefCOCOg",
}
#: The scripts drop a fifth of the elements, and keep a fifth in TIES.
_DROP = 0.2
_DENSITY = 0.2
_COEFFICIENT = 0.3
_BY_TENSOR = {"density": _DENSITY, "scope": "tensor"}

MLLM = Protocol(
    name="mllm",
    title="Multimodal language models (OptMerge)",
    paper="Wei 2025, Unifying multimodal large language model capabilities and modalities via "
    "model merging (2505.19892)",
    settings="scripts of WalkerWorldPeace/MLLMerging",
    tasks=_TASKS,
    base="Qwen/Qwen2-VL-7B",
    experts={task: f"yongxianwei/Qwen2-VL-7B-{task}" for task in _TASKS},
    methods=(
        Method("Weight average", "average"),
        Method("Task arithmetic", "task_arithmetic", coefficient=_COEFFICIENT),
        Method("TIES", "ties", _BY_TENSOR, _COEFFICIENT),
        Method("TA with DARE", "dare", {"drop": _DROP}, _COEFFICIENT),
        Method(
            "TIES with DARE",
            "dare_ties",
            {"drop": _DROP, "density": _DENSITY},
            _COEFFICIENT,
            differs="trims over the whole model, the scripts within tensors",
        ),
        Method("TSV", "tsv", coefficient=_COEFFICIENT),
        Method("Iso-C", "iso_c", {"flatten": "all", "others": "sum"}, _COEFFICIENT),
        Method(
            "WUDI",
            "wudi",
            coefficient=_COEFFICIENT,
            differs="the authors' closed form instead of Adam's iterates",
        ),
        Method("OptMerge, full", "optmerge", {"form": "full"}, 1.0),
        Method("OptMerge, low rank", "optmerge", {"form": "lora"}, 1.0),
    ),
    reports=("tasks", "cost"),
    exclude=r"visual\.|vision_tower\.|vision_model\.|projector|embed_tokens|lm_head|norm|bias",
    differs=("Merging encoders of other modalities into one model is not part of this table.",),
)
