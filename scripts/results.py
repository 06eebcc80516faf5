"""Every committed table and figure, and README's claims, anew from the records in results/; and the ratios of benches
anew from their rounds, where those are there.

usage: python scripts/results.py            says what differs from what is committed, and then ends with 1
       python scripts/results.py --write    writes it
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import page

from implicit_bench import clock
from implicit_bench.compare.rows import Run
from implicit_bench.jsonl import read_jsonl
from implicit_bench.table import cells
from implicit_bench.table.out import write
from implicit_bench.table.report import measured, sections
from implicit_bench.terminal import manners

RESULTS, README = page.ROOT / "results", page.ROOT / "README.md"
NAME, NUMBER = re.compile(rb"(?<=[#\"])[a-z][0-9a-f]{10}\b"), re.compile(rb"-?\d+(?:\.\d+)?")
COMPARED = (".md", ".csv", ".tex", ".json", ".txt", ".bib", ".svg")


def build(folder: Path, everything: Sequence[Run]) -> str:
    """tables/ and figures/ below a folder; returns README as it is to be."""
    found = measured(everything)
    for table, protocol, grid, jobs in found:
        write(grid, table.name, folder / "tables" / protocol, jobs)
    sections(everything, found, folder / "figures")
    claims = next(grid for table, _, grid, _ in found if table.name == "claims")
    return page.put(README.read_text("utf-8"), {"claims": claims.said("md")})


def texts(folder: Path) -> dict[str, bytes]:
    """What is compared of a folder: PNG and PDF are not, they hang on the machine's libraries."""
    found = [path for part in ("tables", "figures") for path in sorted((folder / part).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.suffix in COMPARED}


def alike(a: bytes | None, b: bytes | None) -> bool:
    """Byte by byte; in an SVG a coordinate may be off by a thousandth of a point, since a logarithm's last bit hangs on
    the processor, and with it the names that matplotlib makes of coordinates."""
    if a is None or b is None or a == b:
        return a == b
    if not (a.startswith(b"<?xml") and b.startswith(b"<?xml")):
        return False
    named = [NAME.sub(b"name", svg) for svg in (a, b)]
    numbers = [[float(number) for number in NUMBER.findall(svg)] for svg in named]
    same = NUMBER.sub(b"0", named[0]) == NUMBER.sub(b"0", named[1])
    return same and all(math.isclose(x, y, rel_tol=0, abs_tol=1e-3) for x, y in zip(*numbers, strict=True))


def retold(run: Run) -> tuple[int, list[str]]:
    """How many ratios of a bench its rounds tell, and those of which they tell another."""
    rounds, wrong, n = list(read_jsonl(run.history)), [], 0
    for r in run.record["ratios"]:
        if r["measure"] in ("memory", "errors", "logits"):  # of no rounds
            continue
        at = [row for row in rounds if row.get("at") == r["at"] and {r["numerator"], r["denominator"]} <= row.keys()]
        n += 1
        times = [[row[r[side]][r["measure"]] for row in at] for side in ("numerator", "denominator")]
        again = clock.ratio(*times) if at else None
        if not again or (again.n, again.verdict) != (r["n"], r["verdict"]) or not all(
            math.isclose(getattr(again, key), r[key], rel_tol=1e-6) for key in ("value", "low", "high")
        ):
            wrong.append(f"{run.name}: {r['id']} {r['numerator']} / {r['denominator']}, {r['measure']}")
    return n, wrong


def rounds_of(everything: Sequence[Run]) -> tuple[int, list[str]]:
    benches = [run for run in everything if run.record["command"] == "bench" and run.history.exists()]
    found = [retold(run) for run in benches]
    return sum(n for n, _ in found), [line for _, lines in found for line in lines]


def main() -> int:
    everything = cells.read([RESULTS])
    with tempfile.TemporaryDirectory() as name, manners(True, "text"):
        readme = build(Path(name), everything)
        made, committed = texts(Path(name)), texts(RESULTS)
    if "--write" in sys.argv:
        for gone in committed.keys() - made.keys():
            (RESULTS / gone).unlink()
        changed = [path for path in made if not alike(made[path], committed.get(path))]
        for path in changed:
            (RESULTS / path).parent.mkdir(parents=True, exist_ok=True)
            (RESULTS / path).write_bytes(made[path])
        README.write_text(readme, encoding="utf-8")
        print(f"wrote   {len(changed)} of {len(made)} files below {RESULTS.name}/, and the claims in README.md")
        return 0
    wrong = sorted(path for path in made.keys() | committed.keys() if not alike(made.get(path), committed.get(path)))
    wrong = [f"{RESULTS.name}/{path}" for path in wrong]
    wrong += ["README.md"] if readme != README.read_text("utf-8") else []
    ratios, false = rounds_of(everything)
    for path in wrong + false:
        print(f"differs {path}", file=sys.stderr)
    print(f"{len(made) + 1 - len(wrong)} of {len(made) + 1} files are what the records say, {ratios - len(false)} of "
          f"{ratios} ratios what their rounds say")  # fmt: skip
    return int(bool(wrong + false))


if __name__ == "__main__":
    raise SystemExit(main())
