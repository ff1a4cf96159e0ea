"""Generation by a vLLM engine that is started once and given the merged weights of every candidate.

The engine is started from the base's folder, in the evaluating process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so that a candidate's tensors reach its ``load_weights`` as
they are, under their stored names; it splits and fuses them itself. It caches no prefixes, because
those of earlier candidates belong to other weights.

vLLM needs a GPU, with room for a second copy of the model. Without one, tests stop at the names and
tensors that are handed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.text.text_items import TextItems
from mergesearch.evaluators.text.writer import Written, cut
from mergesearch.merging.models.parameter_views import parameter_views

if TYPE_CHECKING:
    import torch

#: Share of the GPU's memory that the engine takes beside the resident model.
MEMORY = 0.4


class VllmWriter:
    """Greedy generation by an engine of its own.

    Args:
        base: Folder of the base, with its tokenizer.
        model: The resident model, for its dtype.
        tokenizer: Tokenizer of the prompts.
        max_new_tokens: New tokens at most.
        until: Strings that end a text.
    """

    def __init__(
        self, base: str, model: Any, tokenizer: Any, max_new_tokens: int, until: Sequence[str]
    ) -> None:
        # Read when the engine starts; with a process of its own, tensors would have to be pickled.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams

        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self._engine = LLM(
            model=base,
            dtype=dtype,
            seed=0,
            gpu_memory_utilization=MEMORY,
            enable_prefix_caching=False,
        )
        self._until = tuple(until)
        self._end = tokenizer.eos_token_id
        self._settings = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop=list(until) or None
        )

    def write(self, model: Any, items: TextItems) -> list[Written]:
        """Continue the prompt of each item."""
        weights = list(stored_weights(model))
        # `apply_model` finds the served model, which every version of vLLM keeps elsewhere.
        # `load_weights` returns a set of names, of which only the number is sent back.
        self._engine.apply_model(lambda served: len(served.load_weights(iter(weights)) or ()))
        prompts = [{"prompt_token_ids": row.tolist()} for row in items.tokens]
        answers = [
            one.outputs[0] for one in self._engine.generate(prompts, self._settings, use_tqdm=False)
        ]
        return [Written(cut(one.text, self._until), self._length(one.token_ids)) for one in answers]

    def _length(self, tokens: Sequence[int]) -> int:
        """Number of tokens without the one that ends a sequence."""
        return len(tokens) - (len(tokens) > 0 and tokens[-1] == self._end)


def stored_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield stored name and tensor of a model's weights; tensors are views, not copies."""
    state = model.state_dict()
    for name, view in parameter_views(model).items():
        yield name, view.of(state[view.parameter])
