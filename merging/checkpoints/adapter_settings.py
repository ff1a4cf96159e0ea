"""``adapter_config.json`` as peft writes it: types checked, and what is not plain LoRA refused.

Everything that would change the weights in another way is refused by name, and so is every setting
that is not known here: ignoring one would give other weights than the author's without anybody
noticing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown

CONFIG = "adapter_config.json"
MERGE_FIRST = "merge it into its base first with peft (merge_and_unload) and save the result"

#: Settings that say how the adapter was trained or loaded, not what it does to weights.
_HARMLESS = frozenset(
    {
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "ensure_weight_tying",
            "inference_mode",
            "megatron_core",
        ),
        *("peft_type", "peft_version", "revision", "task_type", "runtime_config"),
        *(
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_ga_config",
            "lora_dropout",
            "qalora_group_size",
        ),
        *(
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
            "modules_to_save",
            "target_modules",
        ),
    }
)
#: Settings that are read.
_READ = frozenset(
    {
        *(
            "alpha_pattern",
            "bias",
            "fan_in_fan_out",
            "init_lora_weights",
            "lora_alpha",
            "r",
            "rank_pattern",
        ),
        "use_rslora",
    }
)
#: Initialisations that leave the base alone. The others (pissa, olora, corda, loftq) move a part of
#: it into the adapter, which then fits a base that is stored nowhere.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

#: The most patterns of a setting: each is compared with every module.
_MOST_PATTERNS = 4096
#: The longest pattern, and the longest name that one is compared with; real ones are far shorter.
_LONGEST = 256
#: The largest numerator of a scale that is taken for a trained one.
_LARGEST_ALPHA = 10**6
#: What repeats without bound; three of them in one pattern take cubic time.
_REPEATS = re.compile(r"[*+{]")
#: A repeated group takes exponential time where it repeats something itself.
_REPEATED_GROUP = re.compile(r"\)[*+{]")

#: Pattern of the names of modules, and the number of theirs.
Patterns = tuple[tuple[re.Pattern[str], Any], ...]


@dataclass(frozen=True, eq=False)
class AdapterSettings:
    """Checked settings of an adapter.

    Attributes:
        node: All of them.
        ranks: Modules with a rank of their own.
        alphas: Modules with an α of their own.
    """

    node: Node
    ranks: Patterns
    alphas: Patterns

    def text(self, key: str) -> str:
        """A setting that is a text; empty where there is none."""
        return self.node.get(key).text() if self.node.has(key) else ""

    def flag(self, key: str) -> bool:
        """A setting that is true or false; false where there is none."""
        return self.node.has(key) and self.node.get(key).boolean()

    @property
    def model_class(self) -> str:
        """Class of the adapted model; empty where none is named."""
        mapping = self.node.get("auto_mapping")
        named = self.node.has("auto_mapping") and mapping.has("base_model_class")
        return mapping.get("base_model_class").text() if named else ""

    def texts(self, key: str) -> tuple[str, ...]:
        """A setting that is a list of texts; empty where there is none."""
        held = self.node.get(key).elements() if self.node.has(key) else []
        return tuple(element.text() for element in held)

    def rank(self, module: str) -> float:
        """Rank of a module's change."""
        return self._number(self.ranks, module, "r")

    def alpha(self, module: str) -> float:
        """The numerator α of the scale of a module's change, of at most 10⁶ in magnitude.

        Trained ones are below 10³; far larger ones make weights that float32 does not hold.
        """
        alpha = self._number(self.alphas, module, "lora_alpha")
        if abs(alpha) > _LARGEST_ALPHA:
            raise self.node.error(
                f"{self.node.where}: lora_alpha: expected at most {_LARGEST_ALPHA:,}, received "
                f"{alpha:g}; set the one that the adapter was trained with"
            )
        return alpha

    def _number(self, patterns: Patterns, module: str, key: str) -> float:
        """A number of a module's adapter, 8 where the settings do not say it, as in peft.

        It is that of the first pattern that matches the end of a module's name. The end begins
        after a dot, or is the whole name.
        """
        if patterns and len(module) > _LONGEST:
            raise self.node.error(
                f"{self.node.where}: expected modules of at most {_LONGEST} characters where there "
                f"are patterns, received {shown(module)}"
            )
        stated = self.node.get(key, 8).value
        value = next((number for pattern, number in patterns if pattern.match(module)), stated)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.node.error(
                f"{self.node.where}: {key}: expected a number, received {shown(value)}; set the "
                "one that the adapter was trained with"
            )
        return Node(value, f"{self.node.where}: {key}", CheckpointError).number()


def read_settings(folder: Path) -> AdapterSettings:
    """Read the settings of an adapter folder.

    Raises:
        CheckpointError: If they cannot be read, or are not those of plain LoRA.
    """
    settings = read_json(folder / CONFIG)
    node = Node(settings, path_shown(folder / CONFIG), CheckpointError)
    _check_plain(folder, settings)
    for key, check in _TYPES.items():
        if node.has(key):
            check(node.get(key))
    return AdapterSettings(node, _patterns(node, "rank_pattern"), _patterns(node, "alpha_pattern"))


def _texts(node: Node) -> None:
    for element in node.elements():
        element.text()


def _auto_mapping(node: Node) -> None:
    if node.mapping() and node.has("base_model_class"):
        node.get("base_model_class").text()


#: Setting -> what checks its type; null stands for none.
_TYPES: Mapping[str, Callable[[Node], Any]] = {
    "auto_mapping": _auto_mapping,
    "base_model_name_or_path": Node.text,
    "fan_in_fan_out": Node.boolean,
    "modules_to_save": _texts,
    "task_type": Node.text,
    "use_rslora": Node.boolean,
}


def _patterns(node: Node, key: str) -> Patterns:
    if not node.has(key):
        return ()
    patterns = node.get(key)
    if len(patterns.mapping()) > _MOST_PATTERNS:
        raise patterns.wrong(f"at most {_MOST_PATTERNS} patterns")
    return tuple((_compiled(text, patterns), value) for text, value in patterns.mapping().items())


def _compiled(text: str, node: Node) -> re.Pattern[str]:
    # A pattern that repeats repetitions may take for ever to match.
    slow = len(_REPEATS.findall(text)) > 2 or _REPEATED_GROUP.search(text) is not None
    if slow or len(text) > _LONGEST:
        raise node.error(
            f"{node.where}: expected names of modules or short patterns with at most two "
            f"repetitions, received {shown(text)}"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise node.error(
            f"{node.where}: expected regular expressions, received {shown(text)} "
            f"({name_shown(str(error))})"
        ) from None


def _check_plain(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path_shown(folder)}: expected a PEFT adapter of type LORA, received {shown(kind)}; "
            f"{MERGE_FIRST}"
        )
    for name in sorted(settings):
        if name not in _HARMLESS | _READ and settings[name]:
            raise CheckpointError(
                f"{path_shown(folder)}: expected plain LoRA, received {name_shown(name, 40)}: "
                f"{shown(settings[name], 60)}; {MERGE_FIRST}"
            )
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, str | bool) or start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path_shown(folder)}: expected weights that fit the base, received "
            f"init_lora_weights: {shown(start, 40)}, which changes the base; save it with "
            f"path_initial_model_for_weight_conversion, or {MERGE_FIRST}"
        )
