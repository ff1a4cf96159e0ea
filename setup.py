"""The description of the package: README.md, with links that work outside the repository.

Links of the README are relative to the repository, and break on the page of a package index. Here
they become absolute where ``pyproject.toml`` has an address (``[project.urls]``, ``Repository``);
without one their text stays. Everything else about the package stands in ``pyproject.toml``.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
#: A picture on a line of its own, or a link: text, and a target that is neither absolute nor here.
PICTURE = re.compile(r"^!\[([^\]]*)\]\((?![a-z]+:)([^)\s]+)\)\n\n?", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\[\]`])*)\]\((?![a-z]+:|#)([^)\s]+)\)")
#: A link that stands in brackets of its own, ``([docs](PAGE))``.
ASIDE = re.compile(rf"\s+\({LINK.pattern}\)")


def described(text: str, address: str | None) -> str:
    """The README for a reader without the repository.

    Args:
        text: Content of README.md.
        address: The repository's page, under which ``blob/HEAD/FILE`` shows a file.
    """
    if address is None:
        return LINK.sub(r"\1", ASIDE.sub("", PICTURE.sub("", text)))
    base = address.rstrip("/")
    pictures = PICTURE.sub(rf"![\1]({base}/raw/HEAD/\2)\n\n", text)
    return LINK.sub(rf"[\1]({base}/blob/HEAD/\2)", pictures)


def main() -> None:
    """Build, as the build backend asks."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    text = (HERE / "README.md").read_text()
    setup(
        long_description=described(text, project.get("urls", {}).get("Repository")),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
