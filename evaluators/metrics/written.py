"""Scores of written texts against references: chrF by sacrebleu, ROUGE-L, and error rates.

Edits are counted by rapidfuzz, with which jiwer counts them, where the extra ``speech`` brings it,
and else by nltk, which counts the same and takes far longer.

All of them are scores of single items, whose means are what is reported; sacrebleu's own scores of
a whole corpus weigh long texts more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mergesearch.evaluators.metrics.libraries import is_installed, library


def exact_match(written: str, wanted: str) -> float:
    """Return 1 if both are the same but for space around them."""
    return float(written.strip() == wanted.strip())


def chrf(written: str, wanted: str) -> float:
    """Character n-gram F score of sentences, 0 to 1 (Popović 2015)."""
    return float(library("sacrebleu").sentence_chrf(written, [wanted]).score) / 100


def rouge_l(written: str, wanted: str) -> float:
    """F score of the longest common subsequence of words, 0 to 1 (Lin 2004)."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return float(scorer.score(wanted, written)["rougeL"].fmeasure)


def word_error_rate(written: str, wanted: str) -> float:
    """Edits of words that make one text the other, for each word that is wanted."""
    return _edits(written.split(), wanted.split())


def character_error_rate(written: str, wanted: str) -> float:
    """Edits of characters that make one text the other, for each character that is wanted."""
    return _edits(list(written.strip()), list(wanted.strip()))


def _edits(written: list[str], wanted: list[str]) -> float:
    if is_installed("rapidfuzz"):
        distance = library("rapidfuzz.distance.Levenshtein").distance(written, wanted)
    else:
        distance = library("nltk.metrics.distance").edit_distance(written, wanted)
    return float(distance) / max(len(wanted), 1)


#: Metric -> what scores a text, and the library that it needs.
WRITTEN: Mapping[str, tuple[Callable[[str, str], float], str | None]] = {
    "exact_match": (exact_match, None),
    "chrf": (chrf, "sacrebleu"),
    "rouge_l": (rouge_l, "rouge_score"),
    "wer": (word_error_rate, "nltk"),
    "cer": (character_error_rate, "nltk"),
}
