"""How prompts of tasks are made, and the arguments by which the harness makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergesearch.evaluators.harness.harness_model import HarnessModel


@dataclass(frozen=True)
class Prompt:
    """How prompts are made: the same for base, experts and merges.

    Attributes:
        apply_chat_template: Whether to apply the tokenizer's chat template, or the name of one.
        system_prompt: Text before every conversation.
        fewshot_as_multiturn: Whether examples are turns of the conversation.
    """

    apply_chat_template: bool | str = False
    system_prompt: str | None = None
    fewshot_as_multiturn: bool = False


def evaluation_arguments(prompt: Prompt) -> dict[str, Any]:
    """Arguments of the harness's evaluation that make these prompts."""
    return {
        "system_instruction": prompt.system_prompt,
        "apply_chat_template": bool(prompt.apply_chat_template),
        "fewshot_as_multiturn": prompt.fewshot_as_multiturn,
    }


def request_arguments(prompt: Prompt, harness: HarnessModel) -> dict[str, Any]:
    """Arguments of a task's ``build_all_requests`` that make these prompts."""
    templated = prompt.apply_chat_template
    if templated:
        harness.choose_template(templated)
    return evaluation_arguments(prompt) | {
        "chat_template": harness.apply_chat_template if templated else None,
        "tokenizer_name": harness.tokenizer_name if templated else "",
    }
