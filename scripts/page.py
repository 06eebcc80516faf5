"""What scripts that measure a page share: its tables between marks, and their command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from implicit_bench import machine

ROOT = Path(__file__).parent.parent


def kept(results: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The file of this machine's figures, and what they say of the machine."""
    facts = machine.fingerprint()
    hardware = f"{facts['cores']}-core {facts['cpu']}"
    return results / machine.folder_name(hardware) / name, {"hardware": hardware, "torch": facts["torch"]}


def put(page: str, parts: Mapping[str, str]) -> str:
    """The page with each text between its marks."""
    for name, text in parts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        assert end, f"the page has no marks for {name}"
        page = f"{before}{mark}\n{text}\n{end}{tail}"
    return page


def parser(doc: str | None, name: str, numbers: Mapping[str, int]) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("words", nargs="*", help="sections, and overrides for every run")
    for key, default in numbers.items():
        found.add_argument(f"--{key.replace('_', '-')}", type=int, default=default)
    found.add_argument("--page", type=Path, default=ROOT / f"docs/{name}.md")
    found.add_argument("--results", type=Path, default=ROOT / "results")
    found.add_argument("--runs", type=Path, default=Path(f"runs/{name}"))
    found.add_argument("--render", type=Path, metavar="FILE")
    return found


def asked(found: argparse.ArgumentParser, sections: Sequence[str],
          render: Callable[[str, dict[str, Any]], str]) -> argparse.Namespace | None:  # fmt: skip
    """The arguments, with the sections that are named, or all, and the overrides; None when --render has been done."""
    args = found.parse_intermixed_args()
    if args.render:
        args.page.write_text(render(args.page.read_text(), json.loads(args.render.read_text())))
        return None
    args.names = [word for word in args.words if "=" not in word] or [*sections]
    args.common = [word for word in args.words if "=" in word]
    if wrong := [name for name in args.names if name not in sections]:
        found.error(f"no section {wrong[0]!r}; there are: {', '.join(sections)}")
    return args
