"""A table as rows to print, in every format, and the notes below it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compare.rows import Run
from ..papers import Table
from ..report import tables
from ..terminal import count
from . import cells, verdicts

SUFFIXES = {"text": "txt", "md": "md", "csv": "csv", "tex": "tex", "json": "json"}


@dataclass
class Grid:
    title: str
    columns: list[str]
    rows: list[list[str]]  # for a reader
    plain_columns: list[str]
    plain: list[list[Any]]  # for a program
    notes: list[str]
    used: dict[str, Run] = field(default_factory=dict)  # records, by id
    blocks: list[tuple[list[str], list[str]]] = field(default_factory=list)  # for rows that would be too long
    lines: list[cells.Line] = field(default_factory=list)  # of a table of trainings

    def said(self, format: str) -> str:
        if format == "json":
            values = [dict(zip(self.plain_columns, row)) for row in self.plain]
            return json.dumps({"title": self.title, "rows": values, "notes": self.notes}, indent=1) + "\n"
        if format == "csv":
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows([self.plain_columns, *self.plain])
            return lines.getvalue()
        if format == "md":
            notes = "".join(f"- {note}\n" for note in self.notes)
            return f"**{self.title}**\n\n{tables.markdown(self.columns, self.rows)}\n{notes}"
        if format == "tex":
            return tables.latex(self.title, self.columns, self.rows, self.notes)
        notes = "".join(f"        {note}\n" for note in self.notes)
        long = [line for head, below in self.blocks for line in (" ".join(head), *(f"        {b}" for b in below))]
        said = "\n".join(long) or tables.text(self.columns, self.rows)
        return f"{self.title}\n\n{said}\n\n{notes}"


def of_cells(table: Table, wanted: Mapping[str, Mapping[int, str]], everything: Sequence[Run], protocol: str,
             columns: Sequence[str], fill: str) -> Grid:  # fmt: skip
    """Measured cells with the published beside them, a line a row and machine."""
    lines = cells.lines(table, wanted, everything, protocol)
    several = len({line.machine for line in lines if line.machine}) > 1
    theirs = [c for c in columns if any(cells.published(line, c) for line in lines)]
    heads, plain_heads = ["model", "n"], ["model", "machine", "protocol", "n", "of"]
    for c in columns:
        ours = [] if c == "test_acc5" else [cells.COLUMNS[c].head]
        heads += [*ours, *(["paper"] if c in theirs else [])]
        plain_heads += [*([c, f"{c}_sd", f"{c}_n"] if ours else []), *([f"{c}_paper"] if c in theirs else [])]
    heads += ["machine"] if several else []
    rows, plain = [], []
    for line in lines:
        row, values = [line.label, line.n], [line.label, line.machine, protocol, len(line.runs), len(line.wanted)]
        for c in columns:
            cell, paper = cells.cell(line, c), cells.published(line, c)
            row += [*([str(cell)] if c != "test_acc5" else []), *([paper] if c in theirs else [])]
            values += [cell.mean, cell.sd, len(cell.values)] if c != "test_acc5" else []
            values += [paper] if c in theirs else []
        rows.append([*row, *([line.machine] if several else [])])
        plain.append(values)
    used = {run.record["run_id"]: run for line in lines for run in (*line.runs.values(), *line.failed.values())}
    bench = {line.timed.rec["run_id"]: line.timed for line in lines if line.timed}
    used |= {run.record["run_id"]: run for run in everything if run.record["run_id"] in bench}
    missing = {label: left for label, seeds in wanted.items() if (left := [
        s for s in seeds if not any(s in line.runs for line in lines if line.label == label)])}  # fmt: skip
    notes = _notes(table, lines, bench.values(), protocol, several, theirs)
    if missing:
        notes.append(f"not done: {count(sum(map(len, missing.values())), 'training')}; {fill} runs them")
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used, lines=lines)


def _notes(table: Table, lines: Sequence[cells.Line], bench: Any, protocol: str, several: bool,
           theirs: Sequence[str]) -> list[str]:  # fmt: skip
    notes = [f"protocol {protocol}; mean ± sd over n seeds"]
    where = {line.machine for line in lines if line.machine}
    notes += [] if several else sorted(where)
    if table.target and lines:
        notes.append(f"s to target: training time to {table.target:.1%} validation accuracy, smoothed over 3 epochs")
    notes += [f"times of a step of {t.batch} images{_at(t)}: {t.rec['run_id']}, "
              f"{t.row['timing']['train_ms']['n']} rounds, {t.rec['environment']['hardware']}"
              for t in bench]  # fmt: skip
    failed = [f"{line.label} seed {seed}: {run.record['error']}" for line in lines for seed, run in line.failed.items()]
    notes += [f"failed: {'; '.join(failed)}"] if failed else []
    return [*notes, *([f"paper: {table.source}"] if theirs else [])]


def _at(timed: cells.Timed) -> str:
    at = timed.row.get("at")
    return "" if at is None else f" at step {at:,}"


def of_claims(table: Table, everything: Sequence[Run]) -> Grid:
    """Each sentence of the papers' abstracts, what was measured under each protocol, and a word."""
    rows, plain, blocks = [], [], []
    used: dict[str, Run] = {}
    for claim in table.lines:
        found = {p: verdicts.ratios(everything, claim.get("ratios", ()), p, claim.get("tables", ()))
                 for p in ("sound", "faithful")}  # fmt: skip
        word = verdicts.verdict(claim, found["sound"])
        here = {p: "<br>".join(map(str, each)) for p, each in found.items()}
        why = claim.get("why", "not run")
        said = here["sound"] or why
        rows.append([claim["id"], word, claim["says"], str(claim.get("paper", "")), said, here["faithful"]])
        paper = f" (paper {claim['paper']})" if "paper" in claim else ""
        below = [f"{p:9} {f}" for p, each in found.items() for f in each] or [why]
        blocks.append(([claim["id"], word, f"{claim['says']}{paper}"], below))
        plain += [[claim["id"], claim["says"], claim.get("paper"), word, p, f.table, f.at, f.hardware,
                   f.ratio["numerator"], f.ratio["denominator"], f.ratio["measure"], f.ratio["value"], f.ratio["low"],
                   f.ratio["high"], f.ratio["n"], "; ".join(f.ratio["caveats"]), f.run.record["run_id"]]
                  for p, each in found.items() for f in each]  # fmt: skip
        plain += [] if any(found.values()) else [[claim["id"], claim["says"], claim.get("paper"), word, *[None] * 13]]
        used |= {f.run.record["run_id"]: f.run for each in found.values() for f in each}
    where = sorted({run.record["environment"]["hardware"] for run in used.values()})
    notes = [
        "a / b: times (H: errors, MiB, evaluations) of a over b's, at the last point of training measured",
        "holds: under protocol sound every ratio is above 1 with its 95 % interval and reaches the claim's lower end",
        "fails: none is above 1; partly: in between; ratios of solves that did not converge decide nothing",
        "the paper's R1 to R4 are of CIFAR-10 and ImageNet: cdeq_mnist and mdeq_fashion are other networks and data",
        *[f"measured on {' and '.join(where)}: {', '.join(sorted(used))}"] * bool(used),
    ]  # fmt: skip
    heads = ["id", "verdict", "claim", "paper", "here", "protocol=faithful"]
    plain_heads = ["id", "claim", "paper", "verdict", "protocol", "table", "at", "hardware", "numerator", "denominator",
                   "measure", "value", "low", "high", "n", "caveats", "record"]  # fmt: skip
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used, blocks)


def of_bars(table: Table, everything: Sequence[Run], protocol: str) -> Grid:
    """Times over the vanilla row's: the paper's bar, the quotient of its table, and what was measured."""
    rows, plain = [], []
    used: dict[str, Run] = {}
    for line in table.lines:
        fits = [f for f in verdicts.ratios(everything, [line["ratio"]], protocol, [line["of"]])
                if line["row"] in (f.ratio["numerator"], f.ratio["denominator"])]  # fmt: skip
        said, values = "not run", [None, None, None]
        if fits:
            r, used[fits[-1].run.record["run_id"]] = fits[-1].ratio, fits[-1].run
            up = r["numerator"] == line["row"]
            values = [r["value"], r["low"], r["high"]] if up else [1 / r[k] for k in ("value", "high", "low")]
            between = "" if fits[-1].hasty else f" [{values[1]:.2f}, {values[2]:.2f}]"
            said = f"{values[0]:.2f}{between}{fits[-1].but}"
        quotient, bar = line["table"], line["bar"]
        slip = "lower by .200" if round(quotient - bar, 2) == 0.2 else ""
        rows.append([line["of"], line["row"], line["measure"], f"{bar:.3f}", f"{quotient:.3f}", slip, said])
        plain.append([line["of"], line["row"], line["measure"], bar, quotient, slip, *values])
    heads = ["table", "row", "time of", "bar", "its table", "the bar is", "here"]
    plain_heads = [*heads[:6], "value", "low", "high"]
    notes = [f"protocol {protocol}; time over the vanilla CDEQ's, below 1 where it is shorter",
             f"paper: {table.source}"]  # fmt: skip
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used)


def of_board(table: Table, measured: Mapping[str, tuple[float, float | None, int, Sequence[Run]]]) -> Grid:
    """Published accuracies in order, and ours among them: `measured` by the line's label."""
    rows, plain = [], []
    used: dict[str, Run] = {}
    for line in table.lines:
        acc, sd, n, own = line.get("acc"), line.get("sd"), line.get("n"), "table" in line
        if own and line["model"] in measured:
            acc, sd, n, runs = measured[line["model"]]
            used |= {run.record["run_id"]: run for run in runs}
        if acc is None:
            said = "not run" if own else ""
        else:
            said = cells.spelled(acc, sd, 2) if own else cells.exactly(acc, sd)
        source = "here" if own else line["source"]
        rows.append([line["model"], *(str(line.get(key, "")) for key in ("params", "augmented")), said, source,
                     line.get("note", "")])  # fmt: skip
        plain.append([line["model"], line.get("params"), line.get("augmented"), acc, sd, n, source])
    order = sorted(range(len(rows)), key=lambda i: -(plain[i][3] or 0))
    heads = ["model", "params", "augmented", "test acc %", "source", ""]
    notes = ["published accuracies are as their papers have them, mostly the best epoch's; ours is the last epoch's"]
    return Grid(table.title, heads, [rows[i] for i in order], [*heads[:3], "acc", "sd", "n", "source"],
                [plain[i] for i in order], notes, used)  # fmt: skip
