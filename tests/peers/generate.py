"""``make peers``: record what other packages make of the generated weights, as golden files.

Runs with the peers' Python (``.venv-peers``); the tests read the files and never import a peer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file

from tests.peers.case import Case
from tests.peers.inputs import digest

FOLDER = Path(__file__).parents[1] / "golden" / "peers"
LARGEST = 600_000  # bytes of the whole folder: they are in the repository


def all_cases() -> Iterator[Case]:
    """Every merge that is recorded."""
    from tests.peers import with_mergekit

    yield from with_mergekit.CASES
    _restore_names()
    from tests.peers import with_fusion_bench

    yield from with_fusion_bench.CASES


def _restore_names() -> None:
    # fusion-bench 0.2.33 imports a class that transformers 5 merged into another, in modules that
    # merge nothing here.
    from transformers.models.clip import modeling_clip

    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = modeling_clip.CLIPVisionModel


def about(case: Case) -> Mapping[str, object]:
    """What a golden file says about itself."""
    return {
        "peer": case.peer,
        "version": version(case.peer),
        "function": case.function,
        "settings": case.settings,
        "experts": case.experts,
        "kind": case.kind,
        "inputs": digest(),
    }


def main(arguments: Sequence[str]) -> None:
    """Write all files, or those whose name contains one of the arguments."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases = [
        case
        for case in all_cases()
        if not arguments or any(part in case.name for part in arguments)
    ]
    for case in cases:
        # One key: safetensors writes several in an order of its own, and the files would differ
        # without cause.
        metadata = {"case": json.dumps(about(case))}
        save_file({"merged": case.merged()}, FOLDER / f"{case.name}.safetensors", metadata=metadata)
        print(f"wrote {case.name}", file=sys.stderr)
    if not arguments:
        for file in set(FOLDER.glob("*.safetensors")) - {
            FOLDER / f"{case.name}.safetensors" for case in cases
        }:
            file.unlink()
    total = sum(file.stat().st_size for file in FOLDER.glob("*.safetensors"))
    if total > LARGEST:
        raise SystemExit(
            f"{FOLDER}: expected at most {LARGEST} bytes, received {total}; record less"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
