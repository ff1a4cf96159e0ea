"""Chemical reactions of six kinds, made of building blocks, with the classes of rxnfp."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

#: Aromatic and other residues, as SMILES that begin with the atom that is bound.
AROMATIC = (
    *("c1ccccc1", "c1ccc(F)cc1", "c1ccc(C)cc1", "c1ccc(OC)cc1"),
    *("c1ccc(Cl)cc1", "c1cccnc1", "c1ccc(C#N)cc1", "c1cccc(C)c1"),
)
OTHER = ("C", "CC", "CCC", "CC(C)C", "C1CCCC1", "C1CCOCC1", "CCOC", "CCc1ccccc1")

#: Kind -> class of the fine-tuned model, and reactants, reagents and product around two residues.
REACTIONS = {
    "amide": (20, "O=C(O){a}.N{b}.CCN=C=NCCCN(C)C.ClCCl>>O=C(N{b}){a}"),
    "sulfonamide": (22, "O=S(=O)(Cl){a}.N{b}.CCN(CC)CC.ClCCl>>O=S(=O)(N{b}){a}"),
    "boc_removal": (
        33,
        "CC(C)(C)OC(=O)N(C{b})C{a}.O=C(O)C(F)(F)F.ClCCl>>N(C{b})C{a}",
    ),
    "reductive_amination": (0, "O=C{a}.N{b}.[BH4-].[Na+].CO>>N({b})C{a}"),
    "hydrolysis": (36, "C{b}OC(=O){a}.[Li]O.C1CCOC1.O>>O=C(O){a}"),
    "ether": (12, "O{a}.BrC{b}.O=C([O-])[O-].[K+].[K+].CN(C)C=O>>O({a})C{b}"),
}

_TOKENS = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")


def reactions() -> list[tuple[str, int]]:
    """Reactions as tokens with spaces between them, and their classes, in a mixed order."""
    pairs = list(itertools.product(AROMATIC, OTHER))
    return [
        (" ".join(_TOKENS.findall(text.format(a=a, b=b))), number)
        for a, b in pairs
        for number, text in REACTIONS.values()
    ]


def tokenizer(vocabulary: Path) -> Any:
    """A tokenizer of transformers that splits at spaces, with the tokens of a ``vocab.txt``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(vocabulary.read_text().splitlines())}
    words = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    ends = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {name: f"[{name[:-6].upper()}]" for name in ("unk_token", "pad_token", "cls_token")}
    return PreTrainedTokenizerFast(tokenizer_object=words, sep_token="[SEP]", **names)
