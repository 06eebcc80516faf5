"""MkDocs hook: pages that live outside docs/, and links that leave it.

Pages are written for a reader of the repository; here their relative links are made to work in the site. README.md is
the home page. What else outside docs/ a page links to stands in the site under repo/, as it is in the repository; a
link to a folder becomes plain text.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def source(uri: str) -> str:
    """Path in the repository of a page of the site."""
    return "README.md" if uri == "index.md" else uri[5:] if uri.startswith("repo/") else f"docs/{uri}"


def place(path: str) -> str:
    """The other way round."""
    return "index.md" if path == "README.md" else path[5:] if path.startswith("docs/") else f"repo/{path}"


def links(path: str) -> list[tuple[str, str]]:
    """(path in the repository, anchor) of every relative link of a page, code left out."""
    text = FENCE.sub("", (ROOT / path).read_text("utf-8"))
    return [target(path, link) for _, _, link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def target(path: str, link: str) -> tuple[str, str]:
    to, _, anchor = link.partition("#")
    return os.path.normpath(PurePosixPath(path).parent / to) if to else path, anchor


def on_files(files: Any, config: Any) -> Any:
    wanted = ["README.md", *(source(file.src_uri) for file in files.documentation_pages())]
    for path in wanted:  # grows by what the pages outside docs/ link to
        wanted += [to for to, _ in links(path) if to not in wanted and to.endswith(".md") and (ROOT / to).is_file()]
    plain = {to for path in wanted for to, _ in links(path) if (ROOT / to).is_file() and not to.endswith(".md")}
    for path in [*wanted, *sorted(plain)]:
        if not path.startswith("docs/"):
            files.append(File.generated(config, place(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = source(page.file.src_uri)
    here = PurePosixPath(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        to, anchor = target(path, link)
        if not (ROOT / to).exists():
            raise PluginError(f"{path}: there is no {to}")
        if (ROOT / to).is_dir():
            return f"`{text}`"
        there = os.path.relpath(place(to), here)
        return f"{mark}[{text}]({there}{f'#{anchor}' if anchor else ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)
