"""PNG files of reports, which tests draw only where they look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mergesearch.search.report import png_plots
from mergesearch.search.report.data import ReportData

_draw_all = png_plots.draw_all


@contextmanager
def drawing(pictures: bool) -> Iterator[None]:
    """Whether reports that this process writes have pictures.

    Drawing takes longer than a small study, and hundreds of tests run one.
    """

    def draw_none(data: ReportData) -> dict[str, bytes]:
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png_plots, "draw_all", _draw_all if pictures else draw_none)
        yield
