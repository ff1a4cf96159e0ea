"""Command line of the protocols: describe one, check it, run it, write its table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.protocols.cells import keep
from experiments.protocols.models_file import Models, read_models
from experiments.protocols.protocol import Protocol
from experiments.protocols.running import Results, check, run
from experiments.protocols.table import PROTOCOLS
from experiments.protocols.tables import as_json, description, results_table
from experiments.running import ROOT, write_between
from mergesearch.merging import InputError, StudyFailedError
from mergesearch.merging.checkpoints.atomic import write_atomically
from mergesearch.merging.errors import did_you_mean

README = Path(__file__).parent / "README.md"

EXAMPLES = """\
examples:
  python -m experiments.protocols mergebench
      tasks, methods and settings, and what of the published protocol is not there
  python -m experiments.protocols mergebench --zoo --write
      run it on the small models of this repository, and write its table into the README
  python -m experiments.protocols fusionbench --models experiments/protocols/models/fusionbench.yaml
      run it on the checkpoints that a file names; the same command goes on after an interruption
  python -m experiments.protocols fusionbench --models mine.yaml --check
      check file, checkpoints (headers), items and methods, and run nothing
  python -m experiments.protocols mllm --models mine.yaml --methods TIES TSV --json > results.json
      two of its methods, results as JSON on standard output

Exit codes: 1 where a merge failed, 2 for wrong input, 130 after an interruption.
"""


def parser() -> argparse.ArgumentParser:
    """The parser."""
    made = argparse.ArgumentParser(
        prog="python -m experiments.protocols",
        description="Run a published protocol of model merging: which methods, with which "
        "settings, on which tasks, and what is reported.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("name", metavar="NAME", help=f"one of {', '.join(PROTOCOLS)}")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--models", type=Path, metavar="FILE", help="run on what this file names")
    where.add_argument("--zoo", action="store_true", help="run on zoos of this repository")
    made.add_argument(
        "--out", type=Path, help="folder of results (default: runs/protocols/NAME)", metavar="DIR"
    )
    made.add_argument(
        "--methods", nargs="+", default=[], metavar="LABEL", help="these methods alone"
    )
    made.add_argument("--check", action="store_true", help="check everything, and run nothing")
    made.add_argument("--json", action="store_true", help="print results as JSON")
    made.add_argument(
        "--write", action="store_true", help="with --zoo: write the tables into the README"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return _main(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StudyFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace) -> int:
    if options.name not in PROTOCOLS:
        raise InputError(
            f"NAME: expected a protocol, received {options.name!r}; "
            f"{did_you_mean(options.name, PROTOCOLS)}"
        )
    protocol = PROTOCOLS[options.name]
    _check_options(options, protocol)
    if options.models is None and not options.zoo:
        print(description(protocol))
        return 0
    out = options.out or ROOT / "runs" / "protocols" / protocol.name
    parts = [_one(options, protocol, models, out) for models in _models(options, protocol, out)]
    if options.check:
        return 0
    found = [part for part in parts if part is not None]
    if options.json:
        print(json.dumps([content for _, content, _ in found], indent=1))
    else:
        print("\n\n".join(text for text, _, _ in found))
    if options.write:
        write_tables(protocol, [text for text, _, _ in found])
    return 1 if any(results.failed for _, _, results in found) else 0


def _check_options(options: argparse.Namespace, protocol: Protocol) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: In one line.
    """
    labels = [method.label for method in protocol.methods]
    for label in options.methods:
        if label not in labels:
            raise InputError(
                f"--methods: expected methods of {protocol.name}, received {label!r}; "
                f"{did_you_mean(label, labels)}"
            )
    if options.write and (not options.zoo or options.methods):
        raise InputError("--write: expected --zoo and all methods; leave --write or --methods out")


def _models(options: argparse.Namespace, protocol: Protocol, out: Path) -> list[Models]:
    if options.models is not None:
        return [read_models(options.models)]
    from experiments.protocols.zoos import ON_ZOOS
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    return [make(out) for make in ON_ZOOS[protocol.name]]


def _one(
    options: argparse.Namespace, protocol: Protocol, models: Models, out: Path
) -> tuple[str, dict[str, Any], Results] | None:
    """Check a protocol on some models and run it; its table and its JSON, kept in its folder."""
    checked = check(protocol, models, options.methods)
    for label, reason in checked.left_out.items():
        _say(f"{models.file.name}: {label} is left out: {reason}")
    if options.check:
        _say(f"{models.file.name}: {len(checked.methods)} methods can run")
        return None
    folder = out / models.file.name
    results = run(
        protocol, models, folder, checked, say=lambda text: _say(f"{models.file.name}: {text}")
    )
    for name, reason in results.failed.items():
        _say(f"{models.file.name}: {name} failed: {reason}")
    text = f"**{models.file.name}**\n\n{results_table(protocol, results)}"
    content = as_json(protocol, models, results)
    keep(folder / "results.json", content)
    write_atomically(folder / "results.md", text + "\n")
    return text, content, results


def write_tables(protocol: Protocol, parts: Sequence[str], readme: Path = README) -> None:
    """Put the tables of a protocol between its marks of the README."""
    start = f"<!-- {protocol.name}: written by the command above -->"
    write_between(readme, start, f"<!-- end of {protocol.name} -->", "\n\n".join(parts))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
