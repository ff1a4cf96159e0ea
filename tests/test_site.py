"""The documentation site is built strictly from the pages in docs/, and asks no other server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser import CHROMIUM, browsing

ROOT = Path(__file__).parents[1]
#: Attributes by which a browser loads something while a page is read.
LOADING = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("video", "src")}


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """``make docs-site``, to another folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this tree."""
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Tags(HTMLParser):
    """What a page loads, and the text of its paragraphs and cells outside code."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.prose: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [given[key] or "" for kind, key in LOADING if kind == tag and key in given]
        if tag not in {"br", "hr", "img", "input", "link", "meta"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "article" in self._open and not {"code", "pre", "script"} & set(self._open):
            self.prose.append(data)


def pages(site: Path) -> Iterator[tuple[str, Tags]]:
    """Every page, parsed."""
    for path in sorted(site.rglob("*.html")):
        tags = Tags()
        tags.feed(path.read_text())
        yield str(path.relative_to(site)), tags


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    found = dict(pages(site))
    written = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    for page in written:
        name = "index.html" if page.name == "README.md" else page.with_suffix(".html").name
        assert str(page.parent / name) in found
    for name, tags in found.items():
        assert [link for link in tags.loads if urlsplit(link).netloc] == [], name


def test_no_markup_is_left_in_the_text(site: Path) -> None:
    """Lists, tables and links that the site's Markdown reads otherwise than a repository does."""
    for name, tags in pages(site):
        left = [text for text in tags.prose if re.search(r"\]\(|(?:\A|\n)(?:- |\|)", text)]
        assert left == [], name


def test_links_to_pages_outside_docs_lead_to_the_site(site: Path) -> None:
    evaluators = (site / "evaluators.html").read_text()
    assert 'href="repository/experiments/0008-racing/index.html"' in evaluators
    assert (site / "repository/experiments/0008-racing/index.html").is_file()
    experiment = (site / "repository/experiments/0011-operator-auto/index.html").read_text()
    assert "../../../" in experiment
    # A file that is no page is text.
    assert 'href="../tests/plugins' not in (site / "plugins.html").read_text()


def test_broken_links_are_refused(tmp_path: Path) -> None:
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav: [README.md, gpu.md]\n")
    shutil.copytree(ROOT / "docs" / "site", tmp_path / "docs" / "site")
    links = ("gone.md", "gpu.md#gone", "../experiments/gone/README.md", "gpu.md")
    text = "\n".join(f"[link]({link})" for link in links)
    (tmp_path / "docs" / "README.md").write_text(text)
    (tmp_path / "docs" / "gpu.md").write_text("# On a GPU\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    refused = re.findall(r"contains a link '([^']+)'", done.stderr)
    assert sorted(refused) == sorted(links[:3])


def test_messages_of_the_troubleshooting_page_are_printed_by_the_program() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(quoted) > 40
    sources = "".join(
        path.read_text()
        for room in ("merging", "spaces", "evaluators", "search")
        for path in sorted((ROOT / room).rglob("*.py"))
    )
    # One literal where several follow each other.
    printed = filled(re.sub(r'"\s+f?"', "", sources))
    assert [message for message in quoted if filled(message) not in printed] == []


def filled(text: str) -> str:
    """A text with ``…`` in the place of everything in braces."""
    return re.sub(r"\{[^{}]*\}", "…", text.replace("{{", "{").replace("}}", "}"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_search_works_without_a_server(site: Path, tmp_path: Path) -> None:
    field = "document.querySelector('[data-md-component=search-query]')"
    with browsing(tmp_path) as browser:
        browser.open((site / "journeys" / "classifiers.html").as_uri())
        browser.run(f"{field}.focus()")
        browser.run(f"{field}.value = 'troubleshooting'")
        browser.run(f"{field}.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}}))")
        browser.until("document.querySelectorAll('.md-search-result__item').length > 0")
        assert browser.complaints == []
        schemes = {urlsplit(request).scheme for request in browser.requests}
        assert schemes <= {"file", "data"}
        browser.open((site / "study-file.html").as_uri(), width=390)
        assert browser.run("document.documentElement.scrollWidth") <= 390
