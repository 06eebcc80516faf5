"""What records say of the papers' claims: the ratios of benches and comparisons, and a word for each sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from .. import config, papers, record
from ..bench.claims import OF_TESTS
from ..compare.figures import CUT
from ..compare.rows import Run
from ..report.ratios import NOT_CONVERGED, WIDE, stuck
from ..schema import files
from . import cells

WORDS = ("holds", "partly", "fails", "not testable here")
Fits = Callable[[Run], bool]


def hasty(ratio: Mapping[str, Any]) -> bool:
    """Of too few rounds for an interval."""
    return "few rounds" in ratio["verdict"]


def ends(ratio: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Of its interval; `bench` shows none of too few rounds either."""
    return (None, None) if hasty(ratio) else (ratio["low"], ratio["high"])


class Found(NamedTuple):
    """One ratio of one record, at the last point of training that it was measured at."""

    table: str
    protocol: str
    hardware: str
    at: int | None
    ratio: dict[str, Any]
    run: Run

    @property
    def settled(self) -> bool:
        """Of solves that converged, with an interval unless it is of a kind that has none, and of errors those after a
        whole training."""
        begun = self.ratio["measure"] == "errors" and self.run.record["command"] == "bench"
        return self.ends[0] is not None and not (self.shy or self.once or begun or self.cut)

    @property
    def rank(self) -> tuple[bool, int]:
        """The higher, the rather it is shown."""
        return not (self.hasty or self.once), self.at or 0

    @property
    def pair(self) -> str:
        return f"{self.ratio['numerator']} / {self.ratio['denominator']}"

    @property
    def hasty(self) -> bool:
        return hasty(self.ratio)

    @property
    def shy(self) -> bool:
        return bool(stuck(self.ratio["caveats"]))

    @property
    def once(self) -> bool:
        """One reading of memory, as in records of before it was read several times."""
        return self.ratio["measure"] == "memory" and self.ratio["n"] == 1

    @property
    def cut(self) -> bool:
        return CUT in self.ratio["caveats"]

    @property
    def ends(self) -> tuple[float | None, float | None]:
        return ends(self.ratio)

    @property
    def interval(self) -> str:
        r = self.ratio
        if r["measure"] == "logits":
            return f"{r['verdict']} (largest difference {r['value']:.0e})" if r["value"] else r["verdict"]
        if self.ends[0] in (None, r["high"]):
            return f"{r['value']:.2f}×"
        if r["measure"] == "memory":
            return f"{r['value']:.2f}× (readings {r['low']:.2f} to {r['high']:.2f})"
        return f"{r['value']:.2f}× [{r['low']:.2f}, {r['high']:.2f}]"

    @property
    def but(self) -> str:
        said = [self.shy and NOT_CONVERGED, self.hasty and f"{self.ratio['n']} rounds only",
                self.once and "one reading", self.cut and CUT]  # fmt: skip
        return "".join(f", {word}" for word in said if word)

    @property
    def where(self) -> str:
        return self.table + (f" at step {self.at:,}" if self.at is not None else "") + self.but


def fitting(search: Sequence[str]) -> Fits:
    """Tells whether a bench ran with what its table says now, by the first of its rows that the table has."""
    known = files("table", tuple(search))

    @cache
    def wanted(name: str, protocol: str, label: str) -> dict[str, Any]:
        words = papers.table(name, tuple(search)).jobs([label], [f"protocol={protocol}"], cpu=False)
        return cells.wanted(config.compose_all("train", [*words.values()], search)[0])

    def fits(run: Run) -> bool:
        rec, name = run.record, run.record["config"].get("table")
        if rec["command"] != "bench" or name not in known:
            return True
        rows = papers.table(name, tuple(search)).rows
        labels = [label for row in rec["rows"] if (label := row["label"].partition(" ×")[0]) in rows]
        return not labels or cells.as_wanted(rec, wanted(name, rec["protocol"], labels[0]))

    return fits


def told(found: Sequence[Found]) -> list[str]:
    """A line for each record and point of training: where it was measured, then its ratios, each pair named once."""
    lines: dict[tuple[str, str], dict[str, list[str]]] = {}
    for each in found:
        line = lines.setdefault((each.where, each.run.record["run_id"]), {})
        line.setdefault(each.pair, []).append(f"{each.ratio['measure']} {each.interval}")
    return [f"{where} ({id}): {'; '.join(pair + ' ' + ', '.join(said) for pair, said in line.items())}"
            for (where, id), line in lines.items()]  # fmt: skip


def brief(found: Sequence[Found], whole: bool = True) -> list[str]:
    """A line for each pair and measure: those that a verdict rests on (`whole`: with interval, table and record), and
    the span of those that decide nothing."""
    lines: dict[tuple[str, str], tuple[list[Found], list[Found]]] = {}
    for f in found:
        lines.setdefault((f.pair, f.ratio["measure"]), ([], []))[not f.settled].append(f)
    said = []
    for (pair, measure), (settled, others) in lines.items():
        if whole or measure == "logits":  # which are no multiples
            places = dict.fromkeys(f.where for f in settled)
            parts = [", ".join(f"{f.interval} by {f.run.record['run_id']}" for f in settled if f.where == where)
                     + f" on {where}" for where in places]  # fmt: skip
        else:
            parts = [_span(settled)] if settled else []
        if others:
            parts.append(f"{NOT_CONVERGED if all(f.shy for f in others) else 'undecided'} {_span(others)}")
        said.append(f"{pair} {measure} {'; '.join(parts)}")
    return said


def _span(found: Sequence[Found]) -> str:
    values = [f.ratio["value"] for f in found]
    return "–".join(dict.fromkeys(f"{end:.2f}" for end in (min(values), max(values)))) + "×"


def ratios(everything: Sequence[Run], ids: Sequence[str], protocol: str, tables: Sequence[str],
           fits: Fits) -> list[Found]:  # fmt: skip
    """Of each table and pair of rows the one furthest along training, on each machine that got there the latest; one
    of too few rounds, or one reading, only where there are no more of that pair. Those that a verdict rests on first.

    Times are of benches, what test errors tell of `compare`."""
    found: dict[tuple[Any, ...], Found] = {}
    runs = [run for run in everything if run.record["command"] in ("bench", "compare") and run.record.get("ratios")]
    for run in sorted(runs, key=lambda run: record.started(run.record, run.folder)):
        rec, where = run.record, cells.machine(run.record)
        name = rec["config"].get("table") if rec["command"] == "bench" else rec["experiment"]
        if rec["protocol"] != protocol or name in (None, "none") or (tables and name not in tables):
            continue
        asked = [r for r in rec["ratios"] if r["id"] in ids and r["value"] is not None
                 and (rec["command"] == "bench" or r["measure"] in OF_TESTS)]  # fmt: skip
        last = max((r["at"] for r in asked if r.get("at") is not None), default=None)
        for r in asked if asked and fits(run) else []:
            if r.get("at") == last:
                key = name, where, rec["command"], r["numerator"], r["denominator"], r["measure"]
                each = Found(name, protocol, where, last, r, run)
                if key not in found or each.rank >= found[key].rank:
                    found[key] = each
    shown: dict[tuple[Any, ...], list[Found]] = {}
    for (name, _, *pair), each in sorted(found.items(), key=str):
        shown.setdefault((name, *pair), []).append(each)
    kept = [[f for f in each if f.rank[0]] or each for each in shown.values()]
    furthest = [f for each in kept for f in each if (f.at or 0) == max(g.at or 0 for g in each)]
    return sorted(furthest, key=lambda f: not f.settled)


def verdict(claim: Mapping[str, Any], found: Sequence[Found]) -> tuple[str, str]:
    """Holds where every settled ratio is above 1 and reaches the claim's lower end with its interval, fails where none
    is above 1, partly in between; a claim of likeness wants none below 1 instead. An interval in which 1 and the
    claim's lower end lie far apart decides nothing. Of a difference of logits, as the record says. Nothing settled: not
    testable here. And what makes it so: how many do, in which tables."""
    alike, least = claim.get("equal", False), claim.get("least", 1.0)
    settled = [each for each in found if each.settled
               and not (WIDE in each.ratio["caveats"] and (alike or each.ratio["high"] >= least))]  # fmt: skip
    if not settled:
        return WORDS[3], ""
    if settled[0].ratio["measure"] == "logits":
        above = reach = [each.ratio["verdict"] == "equal" for each in settled]
    else:
        above = [each.ratio["high"] >= 1 if alike else each.ratio["low"] > 1 for each in settled]
        reach = [up and each.ratio["high"] >= least for up, each in zip(above, settled)]
    word = WORDS[0] if all(reach) else WORDS[1] if any(above) else WORDS[2]
    short = f"above 1, {'none reaches' if not any(reach) else f'{sum(reach)} of {len(reach)} reach'} {least:g}×"
    why = short if all(above) else f"{sum(above)} of {len(above)} {'not below' if alike else 'above'} 1"
    on = sorted({each.table for each in settled})
    alone = " alone" if len(on) == 1 < len({each.table for each in found}) else ""
    return word, f"on {', '.join(on)}{alone}" + (f": {why}" if word == WORDS[1] else "")
