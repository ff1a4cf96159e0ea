"""The tokenizer and configuration files of a model whose vocabulary was aligned.

Every token must get the number of its row. The files are built and checked in memory, so that what
cannot be built is refused before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.family.tokens import load_tokenizer, read_tokens
from mergesearch.merging.family.vocabulary import Alignment
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown

#: Files that list a vocabulary of their own, and are out of date where it changed;
#: ``tokenizer.json`` has it all.
VOCABULARIES = (
    *(
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "bpe.codes",
        "dict.txt",
        "tekken.json",
    ),
    "*.tiktoken",
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
)

#: Keys of configurations that hold numbers of tokens.
_TOKEN_KEYS = re.compile(r".*_token_(id|ids|index|indices|id_list)|(begin_)?suppress_tokens")
_TOKEN_TABLES = (
    "forced_decoder_ids",
    "bad_words_ids",
    "force_words_ids",
    "sequence_bias",
    "no_timestamps_token",
)


def vocabulary_files(
    alignment: Alignment, base: Checkpoint, experts: Sequence[Checkpoint]
) -> dict[str, str]:
    """File name -> content of what replaces the base's files.

    Empty where the base's own files hold.

    Args:
        alignment: The merged vocabulary.
        base: The base as it is stored.
        experts: The experts as they are stored.

    Raises:
        CheckpointError: If no tokenizer can give every token the number of its row.
    """
    if alignment.policy == "base":
        return {}
    assert base.folder is not None
    text = (
        _with_new_tokens(alignment, base, experts)
        if alignment.policy == "union"
        else _reduced(alignment, base)
    )
    _check(text, alignment, base)
    files = {"tokenizer.json": text}
    for name, change in (
        ("tokenizer_config.json", _tokenizer_config),
        ("generation_config.json", _renumbered_file),
    ):
        if (base.folder / name).is_file():
            files[name] = _json(
                change(read_json(base.folder / name), alignment, text, f"{base.path}/{name}")
            )
    return files


def renumbered(config: Mapping[str, Any], numbers: Mapping[int, int], where: str) -> dict[str, Any]:
    """A configuration with the numbers of its tokens after ``numbers`` (old -> new).

    Raises:
        CheckpointError: If it speaks of a token that is gone, or in a way that is not known here.
    """
    if all(old == new for old, new in numbers.items()) and not _mentions_others(config, numbers):
        return dict(config)
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _TOKEN_TABLES and value:
            raise CheckpointError(
                f"{where}: expected no {name_shown(key)} where tokens are renumbered, "
                f"received {shown(value)}"
            )
        if isinstance(value, dict):
            changed[key] = renumbered(value, numbers, where)
        else:
            changed[key] = (
                _renumbered_value(value, numbers, f"{where}: {name_shown(key)}")
                if _TOKEN_KEYS.fullmatch(key)
                else value
            )
    return changed


def _mentions_others(config: Mapping[str, Any], numbers: Mapping[int, int]) -> bool:
    """Whether a token that is gone appears anywhere."""
    for key, value in config.items():
        if isinstance(value, dict) and _mentions_others(value, numbers):
            return True
        listed = value if isinstance(value, list) else [value]
        known = _TOKEN_KEYS.fullmatch(key) or key in _TOKEN_TABLES
        if known and any(
            v is not None and v not in numbers for v in listed if not isinstance(v, list | dict)
        ):
            return True
    return False


def _renumbered_value(value: Any, numbers: Mapping[int, int], where: str) -> Any:
    if isinstance(value, list):
        return [_renumbered_value(item, numbers, where) for item in value]
    if value is None or isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return value
    if value not in numbers:
        raise CheckpointError(
            f"{where}: expected a token that base and experts have, received {shown(value)}, "
            "which the common vocabulary lacks; choose special: {vocabulary: base}"
        )
    return numbers[value]


def _with_new_tokens(alignment: Alignment, base: Checkpoint, experts: Sequence[Checkpoint]) -> str:
    """The base's tokenizer with the new tokens added.

    Their flags are those of the first expert that has them.
    """
    from tokenizers import AddedToken

    assert base.folder is not None
    tokenizer = load_tokenizer(base.folder)
    flags: dict[str, Mapping[str, bool]] = {}
    for source in (base, *experts):
        assert source.folder is not None
        for token, values in read_tokens(source.folder).added.items():
            flags.setdefault(token, values)
    known = tokenizer.get_vocab(with_added_tokens=True)
    # In the order of their rows: the library numbers them one after the other.
    for token, _ in sorted(alignment.ids.items(), key=lambda pair: pair[1]):
        if token not in known:
            tokenizer.add_tokens([AddedToken(token, **flags.get(token, {"normalized": False}))])
    return str(tokenizer.to_str(pretty=True))


def _reduced(alignment: Alignment, base: Checkpoint) -> str:
    """The base's tokenizer without the tokens that are gone."""
    assert base.folder is not None
    data = json.loads(load_tokenizer(base.folder).to_str())
    ids = alignment.ids
    data["model"] = _reduced_model(data["model"], ids, base.path)
    kept = [
        entry | {"id": ids[entry["content"]]}
        for entry in data["added_tokens"]
        if entry["content"] in ids
    ]
    data["added_tokens"] = sorted(kept, key=lambda entry: entry["id"])
    data["post_processor"] = _reduced_processor(data["post_processor"], ids, base.path)
    if data.get("padding"):
        data["padding"]["pad_id"] = _kept(data["padding"]["pad_token"], ids, base.path)
    return json.dumps(data, ensure_ascii=False, indent=2)


def _reduced_model(model: dict[str, Any], ids: Mapping[str, int], where: str) -> dict[str, Any]:
    kind = model.get("type")
    if model.get("unk_token") is not None:
        _kept(model["unk_token"], ids, where)
    if kind == "Unigram":
        return _reduced_unigram(model, ids, where)
    if kind not in ("WordLevel", "WordPiece", "BPE"):
        raise CheckpointError(
            f"{where}: expected a WordLevel, WordPiece, Unigram or BPE tokenizer to shorten, "
            f"received {shown(kind)}"
        )
    kept = {token: ids[token] for token in model["vocab"] if token in ids}
    if kind == "BPE":
        _check_merges(model, kept, where)
    return model | {"vocab": dict(sorted(kept.items(), key=lambda pair: pair[1]))}


def _reduced_unigram(model: dict[str, Any], ids: Mapping[str, int], where: str) -> dict[str, Any]:
    pieces = sorted((ids[piece], [piece, score]) for piece, score in model["vocab"] if piece in ids)
    if [row for row, _ in pieces] != list(range(len(pieces))):
        raise CheckpointError(
            f"{where}: expected the pieces of the tokenizer's model in the first rows, found others"
        )
    unknown = model.get("unk_id")
    changed = model | {"vocab": [piece for _, piece in pieces]}
    return (
        changed
        if unknown is None
        else changed | {"unk_id": _kept(model["vocab"][unknown][0], ids, where)}
    )


def _check_merges(model: Mapping[str, Any], kept: Mapping[str, int], where: str) -> None:
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not {left, right, left + right} <= set(kept):
            raise CheckpointError(
                f"{where}: expected merges of the BPE tokenizer among common tokens, received "
                f"{shown(left)} + {shown(right)}; choose special: "
                "{vocabulary: base | union}"
            )


def _reduced_processor(processor: Any, ids: Mapping[str, int], where: str) -> Any:
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return processor | {
            "processors": [_reduced_processor(p, ids, where) for p in processor["processors"]]
        }
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"]
        return processor | {
            "special_tokens": {
                key: _reduced_entry(entry, ids, where) for key, entry in tokens.items()
            }
        }
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        ends = {
            key: [processor[key][0], _kept(processor[key][0], ids, where)] for key in ("sep", "cls")
        }
        return processor | ends
    raise CheckpointError(
        f"{where}: expected a post-processor that can be renumbered, received {processor['type']}"
    )


def _reduced_entry(entry: dict[str, Any], ids: Mapping[str, int], where: str) -> dict[str, Any]:
    return entry | {"ids": [_kept(token, ids, where) for token in entry["tokens"]]}


def _kept(token: str, ids: Mapping[str, int], where: str) -> int:
    if token not in ids:
        raise CheckpointError(
            f"{where}: expected {shown(token)}, which the tokenizer needs, in the vocabulary of "
            "every expert; choose special: {vocabulary: base | union}"
        )
    return ids[token]


def _tokenizer_config(
    config: dict[str, Any], alignment: Alignment, text: str, _where: str
) -> dict[str, Any]:
    if "added_tokens_decoder" not in config:
        return config
    added = {
        str(e["id"]): {k: v for k, v in e.items() if k != "id"}
        for e in json.loads(text)["added_tokens"]
    }
    return config | {"added_tokens_decoder": added}


def _renumbered_file(
    config: dict[str, Any], alignment: Alignment, _text: str, where: str
) -> dict[str, Any]:
    return renumbered(config, alignment.renumbered, where)


def _check(text: str, alignment: Alignment, base: Checkpoint) -> None:
    """Refuse a tokenizer that numbers tokens otherwise than their rows."""
    from tokenizers import Tokenizer

    with library_errors(path_shown(base.path), "a tokenizer that can be changed", CheckpointError):
        numbers = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    odd = sorted(set(numbers.items()) ^ set(alignment.ids.items()))
    if odd:
        raise CheckpointError(
            f"{base.path}: expected a tokenizer that gives every token the number of its row, "
            f"found {len(odd)} that differ, for example {shown(odd[0][0])}; choose special: "
            f"{{vocabulary: base}}"
        )


def check_written(folder: Path, alignment: Alignment) -> None:
    """Read the tokenizer of an exported folder as any user would, and compare it with the rows.

    Raises:
        CheckpointError: If a token has another number than its row.
    """
    numbers = dict(read_tokens(folder).rows)
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        with library_errors(path_shown(folder), "a tokenizer that can be read", CheckpointError):
            read = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            numbers = read.get_vocab()
    odd = sorted(set(numbers.items()) ^ set(alignment.ids.items()))
    if odd:
        raise CheckpointError(
            f"{folder}: expected the tokenizer that was just written to give every token the "
            f"number of its row, found {len(odd)} that differ, for example {shown(odd[0][0])}"
        )


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"
