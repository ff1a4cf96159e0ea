"""Models and data of the journeys, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.init import journeys


@pytest.fixture(scope="session")
def reviewers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts that read one kind of reviews each."""
    return journeys.make_reviewers(tmp_path_factory.mktemp("reviewers"))


@pytest.fixture(scope="session")
def viewers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two classifiers of pictures with heads of their own."""
    return journeys.make_viewers(tmp_path_factory.mktemp("viewers"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures for each of the classifiers, under other names than theirs."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, classes in journeys.PICTURES.items():
        journeys.make_pictures(folder / f"{name}-seen", classes)
    return folder
