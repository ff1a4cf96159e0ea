"""What a shell may complete: folders of runs, keys of the study file, strategies and operators.

``mergesearch --install-completion`` sets it up. Each function gets what has been typed of a word,
and gives whole words. None of them fails, as a shell has no place for messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Where runs are, unless a folder is typed.
RUNS = "runs"

#: Sections of the study file that may be a name alone.
NAMED = ("strategy", "operator")

#: Bash splits words at ``=``, as in ``--set strategy=NAME``: they are put together for typer, and
#: what precedes the last ``=`` is left out of its answers. What is not whole gets no space.
BASH_SCRIPT = """
%(complete_func)s() {
    local IFS=$'\\n' words=() at typed before
    for ((at = 0; at <= COMP_CWORD; at++)); do
        if ((at > 1)) && [[ ${COMP_WORDS[at]} == = || \\
            ( ${COMP_WORDS[at-1]} == = && -n ${COMP_WORDS[at]} ) ]]; then
            words[-1]+=${COMP_WORDS[at]}
        else
            words+=("${COMP_WORDS[at]}")
        fi
    done
    typed=${words[-1]}
    before=${typed%%"${typed##*=}"}
    COMPREPLY=( $( env COMP_WORDS="${words[*]}" \\
                   COMP_CWORD=$(( ${#words[@]} - 1 )) \\
                   %(autocomplete_var)s=complete_bash $1 ) )
    COMPREPLY=( "${COMPREPLY[@]#"${before#--*=}"}" )
    if [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[=./] ]]; then
        compopt -o nospace
    fi
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def teach_bash() -> None:
    """Have ``--install-completion`` and ``--show-completion`` give our script for bash.

    A typer that keeps its scripts elsewhere gives its own, which completes all but names after
    ``=``.
    """
    with suppress(ImportError, AttributeError):
        from typer import _completion_shared

        _completion_shared._completion_scripts["bash"] = BASH_SCRIPT


def complete_run(incomplete: str) -> list[str]:
    """Folders of runs, and folders that hold some, which end in a slash."""
    return [word for word in _run_words(incomplete) if word.startswith(incomplete)]


def complete_source(incomplete: str) -> list[str]:
    """As :func:`complete_run`, and recipes and exported models."""
    found = {*complete_run(incomplete)}
    parent = _parent(incomplete)
    for pattern in ("*.json", "*.yaml", "*.yml"):
        found |= {str(path) for path in parent.glob(pattern)}
    found |= {str(path.parent) for path in parent.glob("*/recipe.json")}
    return sorted(word for word in found if word.startswith(incomplete))


def complete_setting(incomplete: str) -> list[str]:
    """``KEY=`` of the study file, and ``KEY=NAME`` of its strategy and operator."""
    from mergesearch.search.plan.study_reference import find_topic
    from mergesearch.search.strategies.table import AUTO

    key, given, _ = incomplete.partition("=")
    if given:
        section = key.removesuffix(".name")
        kinds = find_topic(section).kinds if section in NAMED else ()
        names = [topic.removeprefix(f"{section}.") for topic, _ in kinds]
        words = [f"{key}={name}" for name in ([AUTO, *names] if names else [])]
    else:
        words = [f"{name}=" if ends else f"{name}." for name, ends in _keys(incomplete)]
    return [word for word in words if word.startswith(incomplete)]


def complete_topic(incomplete: str) -> list[str]:
    """Topics of ``mergesearch help``: sections of the study file, and kinds of these."""
    from mergesearch.merging import InputError
    from mergesearch.search.plan.study_reference import ROOT, find_topic

    parent = incomplete.rpartition(".")[0]
    try:
        topic = find_topic(parent or ROOT)
    except InputError:
        return []
    prefix = f"{parent}." if parent else ""
    words = [f"{prefix}{row.key}" for row in topic.rows] + [name for name, _ in topic.kinds]
    words += [] if parent else [ROOT]
    return [word for word in words if word.startswith(incomplete)]


def _run_words(incomplete: str) -> Iterator[str]:
    places = [_parent(incomplete)]
    if "/" not in incomplete:
        places.append(Path(RUNS))
    for place in places:
        for path in sorted(place.glob("[!.]*/")):
            if (path / "study.yaml").is_file():
                yield str(path)
            elif next(path.glob("*/study.yaml"), None) is not None:
                yield f"{path}/"


def _parent(incomplete: str) -> Path:
    """The folder that a path is typed below; the current one before the first slash."""
    parent, slash, _ = incomplete.rpartition("/")
    return Path(parent + slash)


def _keys(incomplete: str) -> Iterator[tuple[str, bool]]:
    """Dotted keys beside what is typed, and whether a value may follow at once."""
    from mergesearch.merging import InputError
    from mergesearch.search.plan.study_reference import ROOT, find_topic

    parent = incomplete.rpartition(".")[0]
    try:
        rows = find_topic(parent or ROOT).rows
    except InputError:
        return
    for row in rows:
        name = f"{parent}.{row.key}" if parent else row.key
        yield name, not row.topic or bool(find_topic(row.topic).kinds)
