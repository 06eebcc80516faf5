"""Ratios of times as lines, for a reader: what `bench` and `compare` print of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import record, terminal
from . import plots, tables

LONG = ["at", "row", "over", "measure", "value", "low", "high", "n", "verdict", "paper", "caveats"]
COLUMNS = ["id", "pair", "measure", "ratio", "95 %", "verdict", "paper", "caveat"]
VERBS = {"train": "trains", "backward": "runs its backward", "predict": "predicts", "step": "takes a training step",
         "epochs": "trains as many epochs", "accuracy": "reaches the same accuracy", "nfe": "needs", "memory": "takes",
         "errors": "makes", "spread": "shows"}  # fmt: skip
WORDS = {"nfe": {"faster": "fewer evaluations", "slower": "more evaluations"},  # where it is no time
         "memory": {"faster": "less memory", "slower": "more memory"},
         "errors": {"faster": "fewer errors", "slower": "more errors"},
         "spread": {"faster": "less spread over seeds", "slower": "more spread over seeds"}}  # fmt: skip


NOT_CONVERGED, WIDE = "not converged", "interval too wide to tell"  # caveats


def stuck(caveats: Sequence[str]) -> list[str]:
    """Those of solves that did not converge."""
    return [caveat for caveat in caveats if NOT_CONVERGED in caveat]


class Line(NamedTuple):
    """slower's time over faster's, above 1 where `faster` is; None for what there is not."""

    id: str
    slower: str
    faster: str
    measure: str
    value: float | None
    low: float | None  # None: too few to tell, so no interval
    high: float | None
    verdict: str
    paper: str = ""
    caveats: Sequence[str] = ()

    @property
    def order(self) -> tuple[str, str]:
        """The rows as its sentence names them."""
        told = self.faster, self.slower
        return told if self.verdict in ("faster", "slower") else told[::-1]

    @property
    def title(self) -> str:
        return f"{self.id} {self.slower} / {self.faster}, {self.measure}".removeprefix("– ")

    def bars(self, where: str = "") -> list[plots.Bar]:
        """One, or none without a value; `where` tells it from others of its title."""
        if not self.value:
            return []
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return [plots.Bar(f"{self.title}{where}", self.value, low, high, self.paper, bool(stuck(self.caveats)))]

    @property
    def said(self) -> str:
        """The value for a reader: a ratio, but for logits, of which it is a difference."""
        if self.value is None:
            return "–"
        return f"{self.value:.2f}×" if self.measure != "logits" else f"{self.value:.0e}" if self.value else "0"


def scalars(lines: Sequence[Line]) -> dict[str, float]:
    """What W&B is told: speedup.R1.train, or speedup.R4.train.skip_cdeq where several rows have one; a pair that no
    claim is about by its rows."""
    found: dict[str, float] = {}
    many = Counter((each.id, each.measure) for each in lines)
    for each in lines:
        if each.value is None:
            continue
        name = each.id if each.id != "–" else f"{each.slower}_over_{each.faster}"
        more = f".{each.faster}" if each.id != "–" and many[each.id, each.measure] > 1 else ""
        kind = "difference" if each.measure == "logits" else "speedup"
        found[f"{kind}.{name}.{each.measure}{more}".replace(" ", "_")] = each.value
    return found


def verdict(low: float, high: float) -> str:
    """What an interval of a ratio says of the row in the denominator."""
    return "faster" if low > 1 else "slower" if high < 1 else "no difference"


def too_wide(verdict: str, low: float, high: float) -> list[str]:
    """The caveat of an interval in which a difference worth having may hide."""
    return [WIDE] if verdict == "no difference" and high > 1.2 * low else []


def cells(line: Line) -> list[str]:
    """id, pair, measure, ratio, interval, verdict, what the paper has and what speaks against comparing."""
    verdict = WORDS.get(line.measure, {}).get(line.verdict, line.verdict)
    verdict = f"{line.faster} {verdict}" if line.verdict in ("faster", "slower") else verdict
    return [line.id, f"{line.slower} / {line.faster}", line.measure,
            line.said,
            "–" if line.low is None else f"[{line.low:.2f}, {line.high:.2f}]", verdict,
            f"paper {line.paper}" if line.paper else "",
            f"({'; '.join(line.caveats)})" if line.caveats else ""]  # fmt: skip


def sentence(line: Line) -> str:
    """One plain sentence that a user could put in a paper, with what speaks against it."""
    pair = f"{line.slower} / {line.faster}"
    paper = line.paper and f"paper {f'{pair} ' * (line.verdict == 'slower')}{line.paper}"  # which is never turned round
    beside = "; ".join(filter(None, [paper, *line.caveats]))
    beside = beside and f" ({beside})"
    if line.value is None:
        return f"{pair}: no ratio in {line.measure}, {line.verdict}"
    value, low, high = line.value, line.low, line.high
    if low is None or high is None or line.verdict not in ("faster", "slower"):
        interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
        return f"{pair}: {line.verdict} in {line.measure} here, {line.said}{interval}{beside}"
    if line.verdict == "slower":
        value, low, high = 1 / value, 1 / high, 1 / low
    verdict = WORDS.get(line.measure, {}).get(line.verdict, line.verdict)
    return (f"{line.faster} {VERBS[line.measure]} {value:.2f}× [{low:.2f}, {high:.2f}] {verdict} than "
            f"{line.slower} here{beside}")  # fmt: skip


def for_program(rec: Mapping[str, Any]) -> bool:
    """Where json or csv was asked for, print the record's rows and ratios as values, and say so.

    csv is one table, a line a figure: of a row alone under the record's name of it (timing.train_ms: median, p10, p90
    as value, low, high), or of `row` `over` another with its 95 % interval; `at`: the step of training.
    """
    found = record.plain({"rows": rec["rows"], "ratios": rec["ratios"]})
    if terminal.format == "json":
        print(json.dumps(found, indent=1))
    if terminal.format == "csv":
        tables.show(LONG, [*(line for row in found["rows"] for line in _figures(row)), *map(_ratio, found["ratios"])])
    return terminal.format in ("json", "csv")


def _figures(row: Mapping[str, Any]) -> Iterator[list[Any]]:
    found = record.flat(row)
    for name, value in found.items():
        stem, _, last = name.rpartition(".")
        if last == "median":
            name, spread = stem, [found[f"{stem}.{k}"] for k in ("median", "p10", "p90", "n")]
        elif last in ("p10", "p90", "n") or name == "at" or not isinstance(value, (int, float)):
            continue
        else:
            spread = [value, None, None, None]
        yield [row.get("at"), row["label"], None, name, *spread, None, None, None]


def _ratio(found: Mapping[str, Any]) -> list[Any]:
    told = (found.get(key) for key in ("value", "low", "high", "n", "verdict", "paper"))
    return [found.get("at"), *(found[key] for key in ("numerator", "denominator", "measure")), *told,
            "; ".join(found["caveats"])]  # fmt: skip


def show(rows: Sequence[Sequence[str]], how: str) -> None:
    """Print `cells` of ratios; `how` heads their pairs. On a terminal too narrow for whole lines the paper's figure and
    the caveat stand below the rest."""
    if terminal.format == "md":
        print()
        tables.show(COLUMNS, rows)
        return
    heads = ["", how, "", "here", "", "", "", ""]
    lines = tables.text(heads, rows).splitlines()
    if not sys.stdout.isatty() or max(map(len, lines)) <= shutil.get_terminal_size().columns:
        print(*lines, sep="\n")
        return
    head, *short = tables.text(heads[:6], [row[:6] for row in rows]).splitlines()
    print(head)
    for line, row in zip(short, rows):
        print(line)
        if beside := "  ".join(filter(None, row[6:])):
            print(f"{'':8}{beside}")
