"""A pico model and its items, made once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluators.items import pico_vit, save, three_splits


@pytest.fixture(scope="session")
def model() -> Any:
    return pico_vit()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("items") / "data", three_splits())
