"""A table as rows to print, in every format, and the notes below it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compare.rows import Run
from ..papers import Table
from ..record import CONVERGED_ENOUGH
from ..report import tables
from ..terminal import count, number
from . import cells, verdicts
from .columns import COLUMNS, exactly, measured, published, spelled

TIMED_BY = {"R": "cdeq_mnist", "H": "homo_ode"}  # the table whose bench is the cheapest for a paper's claims
SUFFIXES = {"text": "txt", "md": "md", "csv": "csv", "tex": "tex", "json": "json"}


@dataclass
class Grid:
    title: str
    columns: list[str]
    rows: list[list[str]]  # for a reader
    plain_columns: list[str]
    plain: list[list[Any]]  # for a program
    notes: list[str]
    used: dict[tuple[str, str], Run] = field(default_factory=dict)  # records, by their keys
    blocks: list[tuple[list[str], list[tuple[str, str]]]] = field(default_factory=list)  # instead of rows too long
    folds: list[list[str]] = field(default_factory=list)  # more of each row, for a page that unfolds
    name: str = ""
    spare: list[list[int]] = field(default_factory=list)  # columns that a narrow terminal can do without, in that order
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
            return tables.latex(self.name, self.title, self.columns, self.rows, self.notes)
        notes = "".join(f"        {note}\n" for note in self.notes)
        long = [[" ".join(head), *(f"        {p}{b}" for p, b in below)] for head, below in self.blocks]
        said = "\n".join(line for lines in long for line in lines) or tables.text(self.columns, self.rows)
        return f"{self.title}\n\n{said}\n\n{notes}"


def of_cells(table: Table, jobs: cells.Jobs, everything: Sequence[Run], protocol: str, columns: Sequence[str],
             fill: str) -> Grid:  # fmt: skip
    """Measured cells with the published beside them, a line a row and machine."""
    lines = cells.lines(table, jobs, everything, protocol)
    if not any(COLUMNS[c].timed for c in columns):
        lines = [line for line in lines if not line.elsewhere]
    machines = sorted({line.machine for line in lines if line.machine})
    letters = dict(zip(machines, "abcdefghijklmnopqrstuvwxyz")) if len(machines) > 1 else {}
    theirs = [c for c in columns if any(published(line, c) for line in lines)]
    shown = [c for c in columns if c != "test_acc5" or c in theirs]  # which nobody measures
    heads, plain_heads = ["model", "n", *["on"] * bool(letters)], ["model", "machine", "protocol", "n", "of"]
    groups: list[list[int]] = []  # a measured column and the paper's go together
    for c in shown:
        head, own = COLUMNS[c].head, [c, f"{c}_sd", f"{c}_n"]
        names, plain_names = [head, *["paper"] * (c in theirs)], [*own, *[f"{c}_paper"] * (c in theirs)]
        if c == "test_acc5":
            names, plain_names = [f"paper: {head}"], [f"{c}_paper"]
        groups.append([len(heads) + k for k in range(len(names))])
        heads += names
        plain_heads += plain_names
    plain_heads.append("timed_converged")
    rows: list[list[str]] = []
    plain: list[list[Any]] = []
    for line in lines:
        again = bool(rows) and line.label == rows[-1][0].removesuffix(" *")  # the paper's is said once
        star = " *" if _shy(line, columns) else ""
        row = [line.label + star, line.n, *([letters.get(line.machine, "")] if letters else [])]
        values: list[Any] = [line.label, line.machine, protocol, len(line.runs), len(line.wanted)]
        for c in shown:
            cell, paper = measured(line, c), published(line, c)
            row += [*([str(cell)] if c != "test_acc5" else []), *(["" if again else paper] if c in theirs else [])]
            values += [cell.mean, cell.sd, len(cell.values)] if c != "test_acc5" else []
            values += [paper] if c in theirs else []
        rows.append(row)
        plain.append([*values, line.timed.row["solve"].get("converged_fraction") if line.timed else None])
    used = {run.key: run for line in lines for run in (*line.runs.values(), *line.failed.values())}
    benches = {id for line in lines if (t := line.timed) for id in (t.rec["run_id"], t.memory_of and t.memory_of[0])}
    used |= {run.key: run for run in everything if run.record["run_id"] in benches}
    missing = {label: left for label, seeds in jobs.items() if (left := [
        s for s in seeds if not any(s in line.runs for line in lines if line.label == label)])}  # fmt: skip
    notes = _notes(table, lines, protocol, letters, columns)
    notes += [f"paper: {table.source}"] if theirs and table.source else []
    if missing:
        notes.append(f"not done: {count(sum(map(len, missing.values())), 'training')}; {fill} runs them")
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used, lines=lines,
                spare=[*groups[:1], *reversed(groups[2:])])  # fmt: skip


def _notes(table: Table, lines: Sequence[cells.Line], protocol: str, letters: Mapping[str, str],
           columns: Sequence[str]) -> list[str]:  # fmt: skip
    notes = [f"protocol {protocol}; mean ± sd over n seeds"]
    notes += [f"{k}: {name}" for name, k in letters.items()] or sorted({line.machine for line in lines} - {""})
    if "target_s" in columns and table.target:
        notes.append(f"s to target: training time to {table.target:.1%} validation accuracy, smoothed over 3 epochs")
    if any(measured(line, c).mark for line in lines for c in columns):
        notes.append("~: trainings were not alone on their machine; a step costs what the bench's does, forward and "
                     "backward by the evaluations of its epoch")  # fmt: skip
        columns = [*columns, "train_s"]
    if any(COLUMNS[c].timed for c in columns):
        benches: dict[tuple[str, str, int | None], list[cells.Line]] = {}
        for line in lines:
            if line.timed:
                key = line.machine, line.timed.rec["run_id"], line.timed.row.get("at")
                benches.setdefault(key, []).append(line)
        for (where, id, at), timed in benches.items():
            t = timed[0].timed
            assert t is not None
            on = letters[where] if letters else ""
            alike = [key for key in benches if key[0] == where] == [(where, id, at)]
            of = "" if alike else f" ({', '.join(line.label for line in timed)})"
            notes.append(", ".join(filter(None, [
                f"times of a step of {t.batch} images{'' if at is None else f' at step {at:,}'}{of}: {id}",
                count(t.row["timing"]["train_ms"]["n"], "round"), on and f"on {on}",
                "" if t.rec["environment"]["alone"] else "not alone on its machine"])))  # fmt: skip
        if "memory_mib" in columns:
            theirs = dict.fromkeys((line.timed.memory_of, line.machine) for line in lines
                                   if line.timed and line.timed.memory_of)  # fmt: skip
            notes += [f"MiB where that bench has none: {of[0]}{'' if of[1] is None else f' at step {of[1]:,}'}"
                      f"{f' on {letters[where]}' if letters else ''}" for of, where in theirs if of]  # fmt: skip
    stuck = [f"{line.label}{f' on {letters[line.machine]}' if letters else ''} {', '.join(shy)}"
             for line in lines if (shy := _shy(line, columns))]  # fmt: skip
    if stuck:
        notes.append(f"*: fewer than {CONVERGED_ENOUGH:.0%} of its solves converged: {'; '.join(stuck)}")
    failed = [f"{line.label} seed {seed}: {run.record['error']}" for line in lines for seed, run in line.failed.items()]
    return [*notes, *([f"failed: {'; '.join(failed)}"] if failed else [])]


def _shy(line: cells.Line, columns: Sequence[str]) -> list[str]:
    """What of a row did not converge."""
    found = [f"{where} with {len(shares)} of {count(len(line.runs), 'seed')} ({', '.join(map(_percent, shares))})"
             for where, shares in line.shy.items()]  # fmt: skip
    if line.timed and line.timed.shy and any(COLUMNS[c].timed for c in columns):
        found.append(f"when timed to a residual of {number(line.timed.row['solve']['residual'], 2)}")
    return found


def _percent(share: float) -> str:
    """To a tenth where it would be rounded up to what is enough."""
    return f"{share:.0%}" if round(share, 2) < CONVERGED_ENOUGH else f"{math.floor(share * 1e3) / 10:.1f}%"


def of_claims(table: Table, everything: Sequence[Run], fits: verdicts.Fits) -> Grid:
    """Each sentence of the papers' abstracts and headlines, what was measured under each protocol, and a word."""
    rows, plain, blocks, folds = [], [], [], []
    used: dict[tuple[str, str], Run] = {}
    for claim in table.lines:
        found = {p: verdicts.ratios(everything, claim.get("ratios", ()), p, claim.get("tables", ()), fits)
                 for p in ("sound", "faithful")}  # fmt: skip
        word, because = verdicts.verdict(claim, found["sound"])
        why = [claim["note"]] if "note" in claim else []
        why += [] if any(found.values()) else [claim.get("why") or _unmeasured(claim)]
        here, theirs = verdicts.brief(found["sound"]), verdicts.brief(found["faithful"], whole=False)
        verdict, published = f"{word} {because}".strip(), str(claim.get("paper", ""))
        rows.append([claim["id"], claim["says"], published, verdict, "<br>".join([*here, *why]), "<br>".join(theirs)])
        below = [("", because)] * bool(because)
        below += [(f"{p:9} ", line) for p, lines in (("sound", here), ("faithful", theirs)) for line in lines]
        below += [("", line) for line in why]
        blocks.append(([claim["id"], word, claim["says"] + f" (paper {published})" * bool(published)], below))
        folds.append([f"{p}: {line}" for p, each in found.items() for line in verdicts.told(each)])
        plain += [[claim["id"], claim["says"], claim.get("paper"), word, p, f.table, f.at, f.hardware,
                   f.ratio["numerator"], f.ratio["denominator"], f.ratio["measure"], f.ratio["value"], *f.ends,
                   f.ratio["n"], "; ".join(f.ratio["caveats"]), f.run.record["run_id"]]
                  for p, each in found.items() for f in each]  # fmt: skip
        plain += [] if any(found.values()) else [[claim["id"], claim["says"], claim.get("paper"), word, *[None] * 13]]
        used |= {f.run.key: f.run for each in found.values() for f in each}
    notes = [
        "a / b: times (H: errors, MiB, evaluations) of a over b's, at the last point of training measured",
        "holds: under protocol sound every ratio is above 1 with its 95 % interval (of memory: with all readings) and "
        "reaches the claim's lower end",
        "fails: none is above 1; partly: in between; ratios of solves that did not converge decide nothing",
        "a span is over tables and machines; format=csv has each ratio, with its interval and its record",
        "the paper's R1 to R4 are of CIFAR-10 and ImageNet: cdeq_mnist and mdeq_fashion are other networks and data",
        *_measured_on(used),
    ]  # fmt: skip
    heads = ["id", "claim", "paper", "verdict", "here", "protocol=faithful"]
    plain_heads = ["id", "claim", "paper", "verdict", "protocol", "table", "at", "hardware", "numerator", "denominator",
                   "measure", "value", "low", "high", "n", "caveats", "record"]  # fmt: skip
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used, blocks, folds)


def _unmeasured(claim: Mapping[str, Any]) -> str:
    """How to measure what there is no record of."""
    if not claim.get("ratios"):
        return "not run"
    name = (claim.get("tables") or [TIMED_BY[claim["ratios"][0][0]]])[0]  # an id of ours
    return f"not run; implicit-bench bench table={name} measures it"


def _measured_on(used: Mapping[tuple[str, str], Run]) -> list[str]:
    where: dict[str, list[str]] = {}
    for key, run in sorted(used.items()):
        where.setdefault(cells.machine(run.record), []).append(key[0])
    return [f"measured on {name}: {', '.join(ids)}" for name, ids in sorted(where.items())]


def of_bars(table: Table, everything: Sequence[Run], protocol: str, fits: verdicts.Fits) -> Grid:
    """Times over the vanilla row's: the paper's bar, the quotient of its table, and what was measured."""
    rows, plain = [], []
    used: dict[tuple[str, str], Run] = {}
    for line in table.lines:
        found = [f for f in verdicts.ratios(everything, [line["ratio"]], protocol, [line["of"]], fits)
                 if line["row"] in (f.ratio["numerator"], f.ratio["denominator"])]  # fmt: skip
        said, values = "not run", list[float | None]([None] * 3)
        if found:
            best = found[0]
            r, used[best.run.key] = best.ratio, best.run
            values = [r["value"], *best.ends]
            if r["numerator"] != line["row"]:
                values = [1 / v if v else None for v in (r["value"], *reversed(best.ends))]
            between = "" if values[1] is None else f" [{values[1]:.2f}, {values[2]:.2f}]"
            at = "" if best.at is None else f" at step {best.at:,}"
            said = f"{values[0]:.2f}{between}{at}{best.but}"
        quotient, bar = line["table"], line["bar"]
        slip = "lower by .200" if round(quotient - bar, 2) == 0.2 else ""
        rows.append([line["of"], line["row"], line["measure"], f"{bar:.3f}", f"{quotient:.3f}", slip, said])
        plain.append([line["of"], line["row"], line["measure"], bar, quotient, slip, *values])
    heads = ["table", "row", "time of", "bar", "its table", "the bar is", "here"]
    plain_heads = [*heads[:6], "value", "low", "high"]
    notes = [f"protocol {protocol}; time over the vanilla CDEQ's, below 1 where it is shorter",
             *_measured_on(used), f"paper: {table.source}"]  # fmt: skip
    return Grid(table.title, heads, rows, plain_heads, plain, notes, used, spare=[[5], [3], [4]])


def of_board(table: Table, measured: Mapping[str, tuple[float, float | None, int, Sequence[Run]]]) -> Grid:
    """Published accuracies in order, and ours among them: `measured` by the line's label."""
    rows, plain = [], []
    used: dict[tuple[str, str], Run] = {}
    for line in table.lines:
        acc, sd, n, own = line.get("acc"), line.get("sd"), line.get("n"), "table" in line
        if own and line["model"] in measured:
            acc, sd, n, runs = measured[line["model"]]
            used |= {run.key: run for run in runs}
        if acc is None:
            said = "not run" if own else ""
        else:
            said = spelled(acc, sd, 2) if own else exactly(acc, sd)
        source = "here" if own else line["source"]
        rows.append([line["model"], *(str(line.get(key, "")) for key in ("params", "augmented")), said, source,
                     line.get("note", "")])  # fmt: skip
        plain.append([line["model"], line.get("params"), line.get("augmented"), acc, sd, n, source, line.get("note")])
    order = sorted(range(len(rows)), key=lambda i: -(plain[i][3] or 0))
    heads = ["model", "params", "augmented", "test acc %", "source", ""]
    notes = ["published accuracies are as the source has them, those of arXiv 2201.12240 the best epoch's; ours is the "
             "last epoch's"]  # fmt: skip
    return Grid(table.title, heads, [rows[i] for i in order], [*heads[:3], "acc", "sd", "n", "source", "note"],
                [plain[i] for i in order], notes, used, spare=[[5], [2], [4], [1]])  # fmt: skip
