"""Heads made of class prompts, for models that compare images and texts such as CLIP and SigLIP.

Radford 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
2103.00020), section 3.1.4: the head of a task is the text features of its classes, each the mean
over prompts of normalised features, normalised again; logits are scaled cosines. Where base and
experts have one text tower, every merge has it too, and the features are computed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mergesearch.merging.errors import InputError
from mergesearch.merging.models.task_heads import Logits, Tasks, wide

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

#: Something for each task; "" stands for all.
ByTask = Mapping[str, Sequence[str]]


class PromptHeads:
    """The heads of tasks.

    Args:
        prompts: Task -> prompts with ``{}`` for the name of a class.
        classes: Task -> names of its classes in the order of their numbers.
        tokenizer: Of ``transformers``.
        fixed: Task -> text features ``(classes, width)``, where all models have the same.
        by_length: Run texts of one length together, without padding: for statistics of all tokens.
    """

    def __init__(
        self,
        prompts: ByTask,
        classes: ByTask,
        tokenizer: Any,
        *,
        fixed: Mapping[str, torch.Tensor] | None = None,
        by_length: bool = False,
    ) -> None:
        self.prompts = prompts
        self.classes = classes
        self.tokenizer = tokenizer
        self.fixed = fixed
        self._by_length = by_length
        self._kept: dict[str, PromptHeads] = {}

    def fixed_by(self, model: Any) -> PromptHeads:
        """The same heads with the text features of a model, without a graph, for all models."""
        import torch

        with torch.inference_mode(mode=False), torch.no_grad():
            fixed = {task: self.text_features(model, task) for task in self._tasks()}
        return PromptHeads(self.prompts, self.classes, self.tokenizer, fixed=fixed)

    def kept(self, model: Any, *, shared: bool) -> PromptHeads:
        """The same as :meth:`fixed_by`, computed if no such text tower was seen of late.

        Args:
            model: Its text tower counts.
            shared: Whether all models have the same text tower.
        """
        device = next(model.parameters()).device
        key = f"{device} {'' if shared else tower_digest(model)}"
        if key not in self._kept:
            self._kept[key] = self.fixed_by(model)
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def answer(self, model: Any, inputs: Mapping[str, torch.Tensor], tasks: Tasks) -> Logits:
        """Logits of images, each among the classes of its task."""
        import torch

        images = image_features(model, inputs)
        names, owner = np.unique(self._named(tasks, len(images)), return_inverse=True)
        if len(names) == 1:
            return Logits(scaled(model, images, self._head(model, str(names[0]))))
        most = max(self.count(str(name)) for name in names)
        logits = wide(images).new_full((len(images), most), float("-inf"))
        for index, name in enumerate(names):
            rows = torch.from_numpy(np.flatnonzero(owner == index)).to(images.device)
            part = scaled(model, images[rows], self._head(model, str(name)))
            logits[rows, : part.shape[1]] = part
        return Logits(logits)

    def features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalised features of the images."""
        return image_features(model, inputs)

    def count(self, task: str) -> int:
        """Number of the classes of a task.

        Raises:
            InputError: If there is no such task.
        """
        return len(self._of(self.classes, task, "classes"))

    def text_features(self, model: Any, task: str) -> torch.Tensor:
        """Normalised features of the classes of a task ``(classes, width)``."""
        import torch

        prompts = self._of(self.prompts, task, "prompts")
        classes = self._of(self.classes, task, "classes")
        texts = [prompt.format(name) for name in classes for prompt in prompts]
        order: list[int] = []
        parts = []
        for rows, encoded in self._encoded(model, texts):
            order += rows
            parts.append(_pooled(model.get_text_features(**encoded)))
        features = normalised(wide(torch.cat(parts)))
        if order != sorted(order):
            features = features[torch.from_numpy(np.argsort(order)).to(features.device)]
        by_class = features.reshape(-1, len(prompts), features.shape[1])
        return normalised(by_class.mean(dim=1))

    def _tasks(self) -> list[str]:
        """Tasks that have both prompts and classes."""
        named = {*self.prompts, *self.classes}
        both = (self.prompts, self.classes)
        return sorted(task for task in named if all(task in one or "" in one for one in both))

    def _named(self, tasks: Tasks, count: int) -> list[str]:
        """The task of each item.

        Raises:
            InputError: If it is not known.
        """
        if tasks is None:
            known = self._tasks()
            if len(known) != 1:
                raise InputError(
                    f"tasks: expected one of {', '.join(known)} for the images, or one for each, "
                    "received none"
                )
            tasks = known[0]
        return [tasks] * count if isinstance(tasks, str) else [str(task) for task in tasks]

    def _of(self, by_task: ByTask, task: str, key: str) -> Sequence[str]:
        found = by_task.get(task, by_task.get(""))
        if found is None:
            raise InputError(
                f"{key}: expected one of the tasks {', '.join(sorted(by_task))}, received {task!r}"
            )
        return found

    def _head(self, model: Any, task: str) -> torch.Tensor:
        """Text features of a task: those of all models, or of this one."""
        if self.fixed is None:
            return self.text_features(model, task)
        return self.fixed[task if task in self.fixed else ""]

    def _encoded(
        self, model: Any, texts: Sequence[str]
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Numbers of texts that run together, and arguments of the text tower."""
        # SigLIP learnt from texts that are all filled up.
        full = "siglip" in str(getattr(model.config, "model_type", ""))
        settings = {"truncation": True, "max_length": _text_length(model)}
        device = next(model.parameters()).device
        wanted = ("input_ids",) if full else ("input_ids", "attention_mask")
        groups: dict[int, list[int]] = {0: list(range(len(texts)))}
        if self._by_length and not full:
            groups = {}
            for row, ids in enumerate(self.tokenizer(list(texts), **settings)["input_ids"]):
                groups.setdefault(len(ids), []).append(row)
        for rows in groups.values():
            for start in range(0, len(rows), AT_ONCE):
                chosen = rows[start : start + AT_ONCE]
                encoded = self.tokenizer(
                    [texts[row] for row in chosen],
                    padding="max_length" if full else True,
                    return_tensors="pt",
                    **settings,
                )
                yield chosen, {name: encoded[name].to(device) for name in wanted}


class _Readable(Protocol):
    def read(self, name: str) -> torch.Tensor: ...


def same_tensors(one: _Readable, others: Sequence[_Readable], names: Sequence[str]) -> bool:
    """Whether these tensors, which all sources have, are equal bit for bit."""
    for name in names:
        own = one.read(name)
        for source in others:
            other = source.read(name)
            if own.dtype != other.dtype or not bool((own == other).all()):
                return False
    return True


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


def image_features(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Normalised features of images ``(items, width)``."""
    return normalised(wide(_pooled(model.get_image_features(**inputs))))


def normalised(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1, in the last axis."""
    unit: torch.Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def compares_texts(model: Any) -> bool:
    """Whether a model has features of images and of texts, and a scale to compare them by."""
    needed = ("get_image_features", "get_text_features", "logit_scale")
    return all(hasattr(model, name) for name in needed)


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


def check_prompts(prompts: ByTask, tasks: Sequence[str], where: str) -> None:
    """Refuse prompts without a place for the class, and tasks without prompts.

    Raises:
        InputError: In one line.
    """
    odd = next((one for part in prompts.values() for one in part if one.count("{}") != 1), None)
    if odd is not None:
        raise InputError(
            f"{where}.prompts: expected {{}} once, where the name of the class goes, received "
            f"{odd!r}"
        )
    lacking = sorted(set(tasks) - set(prompts)) if "" not in prompts else []
    if lacking:
        raise InputError(
            f"{where}.prompts: expected prompts for every domain, received none for "
            f"{lacking[0]!r}; write one list for all, or one for each of {sorted(tasks)}"
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
