"""What loading a model imports, and what it leaves until it is used."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from mergesearch.merging.extensions import heavy_imports
from mergesearch.merging.extensions.heavy_imports import Deferred, fast_imports

# `find_spec`, by which transformers asks whether a package is there, imports parents alone.
LOADED = """
import sys
import weakref
from mergesearch.merging.models.loading import load_model
load_model(sys.argv[1], "AutoModelForImageClassification")
unwanted = {"hqq.core.quantize", "scipy.optimize", "sklearn", "datasets", "pandas", "optuna"}
assert not unwanted & {*sys.modules}, unwanted & {*sys.modules}
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert linear_sum_assignment([[3, 1], [1, 3]])[1].tolist() == [1, 0]
assert "scipy.optimize" in sys.modules
"""


def test_a_model_is_loaded_without_what_few_models_need(pico: Any) -> None:
    subprocess.run([sys.executable, "-c", LOADED, str(pico("vit").base)], check=True)


def imported_by(module: str, statement: str, *, inside: bool = True) -> dict[str, Any]:
    """What a statement of a module of this name brings."""
    names: dict[str, Any] = {"__name__": module}
    if not inside:
        exec(statement, names)
        return names
    with fast_imports():
        exec(statement, names)
    return names


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``colorsys`` takes the place of what transformers may do without, and is not imported."""
    monkeypatch.setattr(heavy_imports, "DEFERRED", {"colorsys": frozenset({"rgb_to_hsv"})})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)


@pytest.mark.usefixtures("stood_in")
def test_what_is_left_out_is_imported_when_it_is_used() -> None:
    names = imported_by("transformers.losses", "from colorsys import rgb_to_hsv as convert")
    assert "colorsys" not in sys.modules
    assert isinstance(names["convert"], Deferred)
    assert names["convert"](1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)
    assert names["convert"].__name__ == "rgb_to_hsv"


@pytest.mark.usefixtures("stood_in")
@pytest.mark.parametrize(
    ("module", "statement", "inside"),
    [
        ("scipy.losses", "from colorsys import rgb_to_hsv", True),
        ("transformers.losses", "from colorsys import rgb_to_hsv, hsv_to_rgb", True),
        ("transformers.losses", "import colorsys", True),
        ("transformers.losses", "from colorsys import rgb_to_hsv", False),
    ],
)
def test_nobody_else_meets_a_stand_in(module: str, statement: str, inside: bool) -> None:
    names = imported_by(module, statement, inside=inside)
    assert "colorsys" in sys.modules
    assert not any(isinstance(value, Deferred) for value in names.values())


def test_collection_goes_on_after_the_outermost_of_several_contexts() -> None:
    seen = SimpleNamespace(inner=None, between=None)
    with fast_imports():
        with fast_imports():
            seen.inner = gc.isenabled()
        seen.between = gc.isenabled()
    assert (seen.inner, seen.between, gc.isenabled()) == (False, False, True)
    gc.disable()
    try:
        with fast_imports():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_garbage_does_not_grow_old_where_little_is_imported() -> None:
    class Model:
        def __init__(self) -> None:
            self.itself = self

    gone = weakref.ref(Model())
    with fast_imports():
        pass
    gc.collect(0)  # the young alone
    assert gone() is None
