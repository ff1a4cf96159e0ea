"""Hooks of MkDocs: pages of the repository outside ``docs/``, and the links between them.

The pages in ``docs/`` link to each other and to files elsewhere in the repository. On the site,
``README.md`` of the project, the experiments and a few more are pages too, below ``repository/``.
A link to any other file of the repository becomes plain text; one to a file that does not exist
stays as it is, so that ``mkdocs build --strict`` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

#: Where pages from outside `docs/` lie on the site.
MOUNT = "repository"
#: Patterns of those pages, from the root of the repository.
OUTSIDE = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md"),
    "tests/README.md",
    *("experiments/*.md", "experiments/*/*.md"),
)
#: A block of code, a link (mark of a picture, text, target, heading) or code in a line.
PARTS = re.compile(
    r"^ *```.*?^ *```|(!?)\[((?:`[^`\n]*`|[^\[\]`])*)\]\(([^()\s#]+)(#[^()\s]*)?\)|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write pages in the place of the patterns in ``nav``, in the order of their names."""
    config.nav = _listed(config.nav, Path(config.docs_dir), _named(config.nav))
    # The plug-in `offline` names a script on another server; ours is in `docs/assets`.
    config.extra["polyfills"] = ["assets/iframe-worker.js"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside ``docs/``."""
    root = _root(config)
    for pattern in OUTSIDE:
        for path in sorted(root.glob(pattern)):
            name = f"{MOUNT}/{path.relative_to(root).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to pages of the site."""
    here = page.file.src_uri
    mounted = here.startswith(f"{MOUNT}/")
    folder = posixpath.dirname(here.removeprefix(f"{MOUNT}/") if mounted else f"docs/{here}")

    def led(match: re.Match[str]) -> str:
        mark, text, target, heading = match.groups()
        if target is None or "://" in target:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(folder, target))
        found = _on_site(wanted, files)
        if found is not None:
            start = posixpath.dirname(here) or "."
            return f"{mark}[{text}]({posixpath.relpath(found, start)}{heading or ''})"
        return text if (_root(config) / wanted).exists() else match[0]

    return PARTS.sub(led, markdown)


def _on_site(path: str, files: Files) -> str | None:
    """The page or picture of the site that is a file or folder of the repository, or None."""
    inside = path.removeprefix("docs/") if path.startswith("docs/") else f"{MOUNT}/{path}"
    names = (inside, f"{inside}/README.md")
    return next((name for name in names if files.get_file_from_path(name) is not None), None)


def _listed(nav: Any, docs: Path, named: set[str]) -> Any:
    """``nav`` with each pattern replaced by the pages that it matches and nothing has named.

    Args:
        nav: The navigation, or a part of it.
        docs: The folder of the pages.
        named: Pages that are named in any part; those that a pattern finds are added.
    """
    if isinstance(nav, dict):
        return {title: _listed(entry, docs, named) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            found = {path.relative_to(docs).as_posix() for path in docs.glob(entry)} - named
            named |= found
            entries += sorted(found)
        else:
            entries.append(_listed(entry, docs, named))
    return entries


def _named(nav: Any) -> set[str]:
    """Every page that is named in ``nav`` by itself."""
    if isinstance(nav, str):
        return {nav}
    entries = nav.values() if isinstance(nav, dict) else nav
    return {page for entry in entries for page in _named(entry)}


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
