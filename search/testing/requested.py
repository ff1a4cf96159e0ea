"""Packages whose plug-ins pytest was asked to test, by ``--mergesearch-plugin``."""

from __future__ import annotations

#: Names of distribution packages.
PACKAGES: list[str] = []
