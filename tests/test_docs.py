"""The pages: every link leads somewhere, and the site builds without a warning and needs no network."""

import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md")),
         ROOT / "implicit_bench/data/README.md"]  # fmt: skip


def prose(page):
    """Its text without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))


def links(page):
    return re.findall(r"\[[^\[\]]*\]\(([^()\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for title in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M):
        text = unicodedata.normalize("NFC", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title))
        found.append(re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            parts = urlsplit(link)
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), link
            continue
        name, _, anchor = link.partition("#")
        to = Path(os.path.normpath(page.parent / name)) if name else page
        assert to.exists(), link
        assert to.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(to), link


def test_no_heading_of_a_page_comes_twice():
    for page in PAGES:
        found = anchors(page)
        assert len(found) == len(set(found)), page


def test_links_are_whole():
    """No bracket that was meant as a link and is none."""
    for page in PAGES:
        assert not re.findall(r"\]\([^()\n]*(?:\n|$)|\[[^\]]*\] \(", prose(page)), page


def test_the_glossary_is_in_order_and_used():
    entries = re.findall(r"^## (.*)$", (ROOT / "docs/glossary.md").read_text(), re.M)
    assert entries == sorted(entries, key=str.lower)
    used = {link.partition("#")[2] for page in PAGES for link in links(page) if "glossary.md#" in link}
    assert len(used) >= 10


class Page(HTMLParser):
    """What a built page loads, where it leads, and how many cells each row of its tables has."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.hrefs, self.tables = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link":
            self.loads.append(given["href"])
        if tag == "a" and "href" in given:
            self.hrefs.append(given["href"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'implicit-bench[docs]'")
    out = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=out, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_has_every_page_and_needs_no_network(site):
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        at = name[5:] if name.startswith("docs/") else name if name == "README.md" else f"repo/{name}"
        assert (site / at.replace("README.md", "index.md")).with_suffix(".html").is_file(), name
    for path in site.rglob("*.html"):
        for load in Page(path).loads:
            assert not urlsplit(load).netloc, (path, load)
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\W?https?:|@import", path.read_text()), path


def test_the_site_has_no_broken_link_or_table(site):
    for path in site.rglob("*.html"):
        if path.name == "404.html":
            continue
        page = Page(path)
        for link in page.hrefs:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = Path(os.path.normpath(path.parent / parts.path)) if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            assert to.is_file(), (path, link)
            if parts.fragment and to.suffix == ".html":
                assert f'id="{parts.fragment}"' in to.read_text(), (path, link)
        for rows in page.tables:
            assert len(set(rows)) == 1, path


def test_what_is_a_table_or_a_block_in_the_pages_is_one_in_the_site(site):
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        at = name[5:] if name.startswith("docs/") else name if name == "README.md" else f"repo/{name}"
        html = (site / at.replace("README.md", "index.md")).with_suffix(".html").read_text()
        text = page.read_text()
        assert html.count("<table") == len(re.findall(r"^\|( ?-+ ?\|)+$", text, re.M)), page
        assert html.count('<div class="highlight">') + html.count('<div class="language') >= text.count("\n```") // 2
        body = re.sub(r"<pre.*?</pre>", "", re.search(r"<article.*</article>", html, re.S)[0], flags=re.S)
        assert "```" not in body
        assert "](" not in re.sub(r"<code>.*?</code>", "", body)
