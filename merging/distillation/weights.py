"""Weights of models for each text, from how well they predict it.

``mince`` takes the best model of each text (FuseLLM, FuseChat), ``average`` weighs all by
exp(−cross-entropy) (FuseLLM's AvgCE), and ``selection`` learns a softmax of the cross-entropies
with a penalty on weights that serve few models, after the selection network of "Enabling flexible
multi-LLM integration" (Kong 2025, arXiv 2505.23844). There the network is trained along with the
target; here before it, on how well the mixture predicts the texts, so that targets are fixed and a
training can go on after a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

#: Steps and rate of Adam for the selection network, and weight of its load balance.
STEPS = 200
RATE = 0.05
BALANCE = 0.1

Array = npt.NDArray[np.float64]


def cross_entropies(shares: Sequence[Sequence[Array]]) -> Array:
    """Mean of −log of the right token's probability ``(texts, models)``.

    Args:
        shares: Of every text, of every model, the probability of the tokens that stand there, at
            places that all models know ``(places,)``; a text without such places gives 0 for all.
    """
    return np.array(
        [[float(-np.log(one).mean()) if len(one) else 0.0 for one in text] for text in shares]
    )


def mince_weights(shares: Sequence[Sequence[Array]]) -> Array:
    """1 for the model with the least cross-entropy on each text, else 0; the first among equals."""
    losses = cross_entropies(shares)
    weights = np.zeros_like(losses)
    weights[np.arange(len(losses)), losses.argmin(axis=1)] = 1.0
    return weights


def average_weights(shares: Sequence[Sequence[Array]]) -> Array:
    """Weights in proportion to exp(−cross-entropy)."""
    return softmax(-cross_entropies(shares))


def selection_weights(shares: Sequence[Sequence[Array]]) -> Array:
    """Softmax of scaled and shifted cross-entropies, learnt with a load balance.

    With ``w = softmax(b_k − a_k · CE_k)`` the sum ``−mean log Σ_k w_k p_k + BALANCE · CV²`` is
    minimised, where CV is the coefficient of variation of the models' mean weights (the load
    balance of Shazeer 2017, equation 7).
    """
    import torch

    losses = torch.from_numpy(cross_entropies(shares))
    models = losses.shape[1]
    right = [torch.from_numpy(np.stack(list(text))) for text in shares]  # (models, places) each
    owners = torch.cat([torch.full((one.shape[1],), n) for n, one in enumerate(right)])
    places = torch.cat(right, dim=1)
    if not len(owners):
        return np.full(losses.shape, 1 / models)
    scale = torch.ones(models, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(models, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=RATE)

    def weights() -> torch.Tensor:
        return torch.softmax(shift - scale * losses, dim=1)

    for _ in range(STEPS):
        chosen = weights()
        load = chosen.mean(dim=0)
        uneven = load.var(correction=0) / load.mean() ** 2
        loss = -(chosen[owners].T * places).sum(dim=0).log().mean() + BALANCE * uneven
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result: Array = weights().detach().numpy()
    return result


def softmax(values: Array) -> Array:
    """Softmax of each row ``(rows, models)``."""
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    result: Array = raised / raised.sum(axis=1, keepdims=True)
    return result


#: Name -> weights ``(texts, models)`` from probabilities of the tokens that stand there.
FUSIONS: Mapping[str, Callable[[Sequence[Sequence[Array]]], Array]] = {
    "mince": mince_weights,
    "average": average_weights,
    "selection": selection_weights,
}
