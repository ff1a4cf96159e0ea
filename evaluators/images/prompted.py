"""Classifiers made of class prompts: features of their texts, which are kept where they can be.

Radford 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
2103.00020), section 3.1.4: the head of a task is the text features of its classes, each the mean
over prompts of normalised features, normalised again. Where base and experts have one text tower,
every merge has it too, and the features are computed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.evaluators.by_item import wide
from mergesearch.merging import InputError, Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch

#: Modules of a dual encoder that read images; all others read texts, or compare the two.
IMAGE_MODULES = ("vision_model", "visual_projection", "vision_embed", "image")
#: Parameters that compare the two.
SCALES = ("logit_scale", "logit_bias")
#: Texts of a forward pass.
AT_ONCE = 256
#: Text towers whose features are kept.
KEPT = 4


class PromptHeads:
    """The heads of tasks.

    Args:
        prompts: Domain -> prompts with ``{}`` for the name of a class.
        classes: Domain -> names of its classes in the order of their numbers.
        tokenizer: Of ``transformers``.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[str]],
        classes: Mapping[str, Sequence[str]],
        tokenizer: Any,
    ) -> None:
        self._prompts = prompts
        self._classes = classes
        self._tokenizer = tokenizer
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def kept(self, model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
        """Domain -> text features ``(classes, width)`` without a graph.

        They are computed if no such text tower was seen of late.
        """
        import torch

        device = next(model.parameters()).device
        key = f"{device} {'' if shares_text_tower(recipe) else tower_digest(model)}"
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = {name: self.features(model, name) for name in self._classes}
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def features(self, model: Any, domain: str) -> torch.Tensor:
        """Normalised features of the classes of a domain ``(classes, width)``."""
        import torch

        prompts = self._prompts.get(domain, self._prompts.get("", ()))
        texts = [prompt.format(name) for name in self._classes[domain] for prompt in prompts]
        parts = [
            _pooled(model.get_text_features(**self._encoded(model, texts[start : start + AT_ONCE])))
            for start in range(0, len(texts), AT_ONCE)
        ]
        features = normalised(wide(torch.cat(parts)))
        by_class = features.reshape(-1, len(prompts), features.shape[1])
        return normalised(by_class.mean(dim=1))

    def _encoded(self, model: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        # SigLIP learnt from texts that are all filled up.
        full = "siglip" in str(getattr(model.config, "model_type", ""))
        encoded = self._tokenizer(
            list(texts),
            padding="max_length" if full else True,
            truncation=True,
            max_length=_text_length(model),
            return_tensors="pt",
        )
        device = next(model.parameters()).device
        wanted = ("input_ids",) if full else ("input_ids", "attention_mask")
        return {name: encoded[name].to(device) for name in wanted}


def scaled(model: Any, features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits ``(items, classes)`` of images, from their features and those of the classes.

    The scale is the model's own, and its bias, which SigLIP has, is the same for all classes.

    Args:
        model: A dual encoder of ``transformers``.
        features: Normalised features of images ``(items, width)``.
        head: Normalised features of the classes ``(classes, width)``.
    """
    logits: torch.Tensor = wide(model.logit_scale).exp() * features @ head.to(features).T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + wide(bias)


def image_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised features of images ``(items, width)``."""
    return normalised(wide(_pooled(model.get_image_features(pixel_values=pixels))))


def normalised(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1, in the last axis."""
    unit: torch.Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def shares_text_tower(recipe: Recipe) -> bool:
    """Whether all that does not read images is the same in base and experts.

    The logit scale may differ: it is no part of the text features.
    """
    if not recipe.base.path or not recipe.experts:
        return False
    return _same_towers(recipe.base.path, *(expert.path for expert in recipe.experts))


@cache
def _same_towers(base: str, *experts: str) -> bool:
    own = open_checkpoint(base)
    names = sorted(name for name in own.tensors if reads_text(name))
    for path in experts:
        other = open_checkpoint(path)
        for name in names:
            if name not in other.tensors:
                return False
            one, two = own.read(name), other.read(name)
            if one.dtype != two.dtype or not bool((one == two).all()):
                return False
    return True


def tower_digest(model: Any) -> str:
    """SHA-256 over everything that does not read images."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if reads_text(name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(np.from_dlpack(flat).data)
    return digest.hexdigest()


def reads_text(name: str) -> bool:
    """Whether a tensor has a part in the features of texts, by its name."""
    return not any(part in name for part in (*IMAGE_MODULES, *SCALES))


def check_prompts(prompts: Mapping[str, Sequence[str]], domains: Sequence[str], where: str) -> None:
    """Refuse prompts without a place for the class, and domains without prompts.

    Raises:
        InputError: In one line.
    """
    odd = next((one for part in prompts.values() for one in part if one.count("{}") != 1), None)
    if odd is not None:
        raise InputError(
            f"{where}.prompts: expected {{}} once, where the name of the class goes, received "
            f"{odd!r}"
        )
    lacking = sorted(set(domains) - set(prompts)) if "" not in prompts else []
    if lacking:
        raise InputError(
            f"{where}.prompts: expected prompts for every domain, received none for "
            f"{lacking[0]!r}; write one list for all, or one for each of {sorted(domains)}"
        )


def _pooled(output: Any) -> torch.Tensor:
    """Features ``(items, width)``; versions of ``transformers`` differ in what stands around."""
    found: torch.Tensor = getattr(output, "pooler_output", output)
    return found


def _text_length(model: Any) -> int | None:
    """Positions of the text tower."""
    config = getattr(model.config, "text_config", model.config)
    length = getattr(config, "max_position_embeddings", None)
    return None if length is None else int(length)
