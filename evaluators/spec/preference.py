"""The section of an evaluator whose judges are people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.data import DESCRIPTION, DataSpec, domain_column, item_files_of
from mergesearch.evaluators.spec.section import ModelSection
from mergesearch.merging.extensions.references import (
    find_function,
    is_reference,
    located,
    source_digest,
)

#: Keys that say how a language model writes, which a function does without.
WRITING = (
    *("max_new_tokens", "until", "chat_template"),
    *("system_prompt", "batch_size", "batch_tokens"),
)


class PreferenceSpec(ModelSection):
    """What people prefer, of pairs of texts or pictures that they are shown."""

    any_library: ClassVar[bool] = True
    kind: Literal["preference"]
    name: str = Key(default="preference", min_length=1, description="Name of the objective.")
    data: str | DataSpec = Key(description=DESCRIPTION)
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict,
        description="Names of the three splits in the folder, where they differ.",
    )
    prompt: str = Key(default="prompt", description="Column of the prompts.")
    domain: str | None = Key(
        default=None, description="Column that says which domain an item belongs to."
    )
    id: str | None = Key(
        default=None, description="Column of stable ids; by default a hash of the prompt."
    )
    choices: int = Key(
        default=8,
        ge=1,
        le=200,
        description="Pairs that a person judges for each model on each split, each on a prompt of "
        "its own: the first so many of a fixed order that is balanced over domains.",
    )
    question: str = Key(
        default="Which answer do you prefer?",
        min_length=1,
        max_length=300,
        description="What the page asks.",
    )
    tokenizer: str | None = Key(
        default=None, description="Folder of the tokenizer; by default the base's."
    )
    max_new_tokens: int = Key(default=64, ge=1, description="Tokens of an answer at most.")
    until: list[Annotated[str, Key(min_length=1)]] = Key(
        default_factory=list, description="Strings that end an answer."
    )
    chat_template: bool = Key(
        default=False, description="Say the prompt as a user's turn of a conversation."
    )
    system_prompt: str | None = Key(
        default=None, description="Said before it; needs chat_template."
    )
    batch_size: int = Key(default=32, ge=1, description="Prompts of a forward pass.")
    batch_tokens: int | None = Key(
        default=None,
        ge=1,
        description="Tokens of prompts and answers of a batch at most, with padding; by default "
        "32,768 on a GPU, and no limit on the CPU.",
    )
    function: str | None = Key(
        default=None,
        description="module:name or file.py:name, called with the model and a list of prompts, "
        "which returns a text or a picture (a Pillow image, a path, or bytes) for each; by "
        "default a causal language model writes.",
    )
    inputs: dict[str, Any] = Key(
        default_factory=dict, description="Further arguments of the function, by name."
    )
    seed: int = Key(
        default=0,
        ge=0,
        description="Given to a function that takes seed, so that all models draw the same noise.",
    )
    model_class: str = Key(
        default="AutoModelForCausalLM",
        description="transformers auto class of the model, or module:name of a function that "
        "builds any torch module; others than the default need function.",
    )
    source: dict[str, str] = Key(
        default_factory=dict,
        description="Hashes of the functions' code, which a resumed run must share; found when the "
        "study begins.",
    )

    @property
    def runs_code(self) -> bool:
        """Whether a function of the user's makes the outputs."""
        return self.function is not None

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the functions that the section needs."""
        named = (self.function, self.model_class)
        return tuple(name for name in named if name is not None and is_reference(name))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt: expected chat_template: true beside it, received false"
            )
        if self.function is None:
            return self._without_function()
        if not is_reference(self.function):
            raise ValueError(
                f"function: expected module:name or file.py:name, received {self.function!r}"
            )
        odd = self._changed(WRITING)
        if odd:
            raise ValueError(
                f"{odd[0]}: expected a causal language model that writes, received a function "
                "beside it; leave one out, or give it to the function as an input"
            )
        return self

    def _without_function(self) -> Self:
        odd = self._changed(("inputs", "seed", "model_class"))
        if odd:
            raise ValueError(f"{odd[0]}: expected a function beside it, received none")
        return self

    def _changed(self, keys: Sequence[str]) -> list[str]:
        """Those of some keys that do not have their defaults."""
        fields = type(self).model_fields
        return [
            key
            for key in keys
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]

    def loaded(self, folder: Path, where: str) -> Self:
        """The section with absolute files, once its functions have been imported.

        Raises:
            InputError: If one cannot be.
        """
        if self.function is None:
            return self
        update: dict[str, Any] = {"function": located(self.function, folder)}
        if is_reference(self.model_class):
            update["model_class"] = located(self.model_class, folder)
        changed = self.model_copy(update=update)
        source = {name: source_digest(find_function(name, where)) for name in changed.references}
        return changed.model_copy(update={"source": source})

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.preference.evaluator import Preference
        from mergesearch.evaluators.preference.makers import FunctionMaker, Maker, TextMaker

        common: dict[str, Any] = {
            "data": item_files_of(self.data, folder),
            "splits": self.splits,
            "columns": {
                "prompt": self.prompt,
                "label": None,
                "domain": domain_column(self.data, self.domain),
                "id": self.id,
            },
            "where": where,
        }
        if self.function is None:
            writing = self.model_dump(include={*WRITING})
            maker: Maker = TextMaker(self.tokenizer, **writing, **common)
        else:
            keys = {"inputs", "seed", "source", "model_class"}
            maker = FunctionMaker(self.function, **self.model_dump(include=keys), **common)
        return Preference(
            maker, name=self.name, question=self.question, choices=self.choices, where=where
        )
