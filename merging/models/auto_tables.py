"""Which auto class loads which type of model, read from the text of transformers' own tables.

Importing these tables brings torch, which takes seconds. They are literals, so their text says the
same. Where it says nothing, or where a later version has them in another form, the tables must be
imported.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Where the tables stand in the package.
FOLDER = "models/auto"


def surely_loads(model_class: str, model_type: str) -> bool:
    """Whether the tables say that an auto class has a model for a type of configuration.

    Args:
        model_class: Name of an auto class of ``transformers``.
        model_type: As ``config.json`` has it.

    Returns:
        False where the tables must be imported to decide.
    """
    models = _model_tables().get(model_class, frozenset())
    own = _configurations().get(model_type)
    # transformers goes from the class of the configuration back to one of the types that share it.
    return own is not None and _types_of(own) <= models


@cache
def _types_of(configuration: str) -> frozenset[str]:
    """Types of models that share a class of configurations."""
    return frozenset(kind for kind, name in _configurations().items() if name == configuration)


@cache
def _model_tables() -> Mapping[str, frozenset[str]]:
    """Name of an auto class -> the types of models that it has; without those of other forms."""
    types: dict[str, frozenset[str]] = {}
    tables: dict[str, str] = {}
    classes: dict[str, str] = {}
    for node in _statements("modeling_auto.py"):
        match node:
            case ast.Assign(
                targets=[ast.Name(name)],
                value=ast.Call(ast.Name("OrderedDict"), [ast.List() as pairs]),
            ):
                types[name] = frozenset(_pairs(pairs))
            case ast.Assign(
                targets=[ast.Name(name)],
                value=ast.Call(ast.Name("_LazyAutoMapping"), [_, ast.Name(table)]),
            ):
                tables[name] = table
            case ast.ClassDef(name=name, body=body):
                classes[name] = _table_of(body)
    known = {name: types.get(tables.get(table, "")) for name, table in classes.items()}
    return {name: found for name, found in known.items() if found}


def _table_of(body: list[ast.stmt]) -> str:
    """Name of the table of an auto class; "" if it has none."""
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name("_model_mapping")], value=ast.Name(table)):
                return table
    return ""


@cache
def _configurations() -> Mapping[str, str]:
    """Type of a model -> name of its configuration's class."""
    found: dict[str, str] = {}
    for file in ("auto_mappings.py", "configuration_auto.py"):
        for statement in _statements(file):
            for node in ast.walk(statement):
                if isinstance(node, ast.List | ast.Dict):
                    found |= {kind: name for kind, name in _pairs(node).items() if "Config" in name}
    return found


def _pairs(node: ast.List | ast.Dict) -> dict[str, str]:
    """What a literal maps to what; empty if it is none of texts."""
    try:
        pairs = dict(ast.literal_eval(node))
    except (ValueError, TypeError):
        return {}
    return {str(kind): str(name) for kind, name in pairs.items()}


def _statements(file: str) -> list[ast.stmt]:
    """The statements of one file of tables; none if there is no such file to read."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return []
    path = Path(found.submodule_search_locations[0]) / FOLDER / file
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return []
