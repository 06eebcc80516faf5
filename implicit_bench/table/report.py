"""`implicit-bench report`: one HTML page of claims, tables and figures from records. Runs no model."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import config, log, machine, papers, record, terminal
from ..compare.figures import Trained, Unknown
from ..compare.figures import line as of_ratio
from ..compare.rows import Run
from ..report import plots
from ..schema import UsageError, files, nearest
from ..terminal import Bar, say
from ..words import split
from . import cells, columns, verdicts
from .command import filling, grid_of, jobs_of, keyed, listed, touched
from .grid import Grid
from .out import send

KEYS = {"records": "runs,results", "out": "report", "logger": "none"}
SPEEDS = ("train", "backward", "predict")


class Measured(NamedTuple):
    """A table as the records have it."""

    table: papers.Table
    protocol: str  # "" of a table that is made of others
    grid: Grid
    jobs: Mapping[str, Mapping[int, config.Composed]]  # its trainings, by row and seed


class Figure(NamedTuple):
    name: str
    caption: str
    data: str  # the SVG, base64


class Section(NamedTuple):
    id: str
    title: str
    about: str
    figures: list[Figure]


def command(args: Sequence[str]) -> int:
    """`report [records=DIR,...] [out=DIR] [logger=wandb]`. Raises UsageError and RecordError."""
    given, words = keyed(args, KEYS)
    if words.overrides or words.flags or words.multirun or words.plan:
        wrong = (words.overrides or words.flags or ["-m"])[0]
        raise UsageError(f"report takes no {wrong!r}; it has {', '.join(f'{key}=' for key in KEYS)} and --config-dir")
    if terminal.format != "text":
        raise UsageError(f"report is one page of HTML; for format={terminal.format} say implicit-bench table")
    if not given["out"]:
        raise UsageError("out= names no folder; leave it out for out=report")
    if given["logger"] not in ("wandb", "none"):
        raise UsageError(f"logger={given['logger']!r} is not possible{nearest(given['logger'], ('wandb', 'none'))}")
    dirs = [Path(folder) for folder in listed(given["records"])]
    everything = cells.read(dirs)
    if not any(run.record["status"] == "done" for run in everything):
        where = " and ".join(map(str, dirs))
        raise UsageError(f"there is nothing finished to report on in {where}; implicit-bench train or bench makes some")
    out = Path(given["out"])
    record.writable("out", out / "figures")
    page = _page(everything, dirs, tuple(words.search), out / "figures")
    (out / "report.html").write_text(page, encoding="utf-8")
    count = page.count("data:image/svg")
    say("wrote", f"{out}/   report.html · figures/ ({count}, each as svg, png, pdf of two widths)")
    if given["logger"] == "wandb":
        used = sorted({id for id, _ in (run.key for run in everything)})
        send(record.new_record("report", {"records": used}, status="done"), "all", page)
    return 0


def _page(everything: Sequence[Run], dirs: Sequence[Path], search: tuple[str, ...], figures: Path) -> str:
    import jinja2

    from .. import __version__

    source = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    terminal.progress("report", f"the tables and claims of {len(everything):,} records")
    found = measured(everything, search)
    terminal.progress("report", "the figures, the longest part")
    drawn = [s for s in sections(everything, found, figures) if s.figures]
    claims = next(m.grid for m in found if m.table.name == "claims")
    shown = [m for m in found if m.table.kind != "claims" and (m.grid.used or m.table.kind != "cells")]
    hardware = sorted({run.record["environment"]["hardware"] or "" for run in everything} - {""})
    return template.render(claims=claims, tables=shown, sections=drawn, count=len(everything), version=__version__,
                           dirs=" and ".join(map(str, dirs)), machines=" and ".join(hardware))  # fmt: skip


def measured(everything: Sequence[Run], search: tuple[str, ...] = ()) -> list[Measured]:
    """Every table of which anything could be measured, under each protocol."""
    found = []
    for table in (papers.table(name, search) for name in files("table", search)):
        for protocol in table.seeds if table.kind == "cells" else ("",):
            if protocol and not touched(table, everything, protocol):
                continue
            said = [f"protocol={protocol}"] if protocol else []
            words = split([*said, *(f"--config-dir={folder}" for folder in search)])
            jobs = jobs_of(table, [], words) if protocol else {}
            grid = grid_of(table, jobs, everything, table.columns, words, filling([f"table={table.name}"], words))
            found.append(Measured(table, protocol, grid, jobs))
    return found


def sections(everything: Sequence[Run], tables: Sequence[Measured], folder: Path) -> list[Section]:
    """Every figure, drawn into the folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def drawn(name: str, caption: str, plot: Callable[[Sequence[Path], float], None]) -> Figure:
        name = re.sub(r"[^\w.-]+", "_", name).strip("_")
        bar.at(len([*folder.glob("*.svg")]), lambda: name)
        svg = plots.at_widths(plot, folder / name)
        return Figure(name, caption, base64.b64encode(svg.read_bytes()).decode())

    benches, trained, bar = _benches(everything), _trainings(everything, tables), Bar(0, "figures")
    speeds, memory = [], []
    for key, runs in benches.items():
        at = max((row.get("at") or 0 for run in runs for row in run.record["rows"]), default=0)
        name, title = "-".join([*key[:2], machine.folder_name(key[2].replace(",", ""))]), _title(runs[-1], at)
        bars = [*{bar.label: bar for run in runs for bar in _bars(run, at)}.values()]  # the latest of each pair
        if bars:
            speeds.append(drawn(f"speedup-{name}", title, partial(plots.ratio_bars, bars=bars, title=title)))
        amounts = {r["label"]: r["memory"]["train_mib"] for run in runs for r in run.record["rows"]
                   if (r.get("at") or 0) == at and (r.get("memory") or {}).get("train_mib")}  # fmt: skip
        if amounts:
            memory.append(drawn(f"memory-{name}", title, partial(
                plots.amounts, bars=amounts, of="MiB that a training step adds", title=title)))  # fmt: skip
    curves: dict[str, list[Figure]] = {"accuracy": [], "nfe": [], "residual": []}
    for name, lines in trained.items():
        for kind, x, y, log_y in (
            ("accuracy", "training time, s", "validation accuracy", False),
            ("nfe", "epoch", "evaluations of f, forward", False), ("residual", "epoch", "residual at exit", True),
        ):  # fmt: skip
            series = {line.label: _curves(line, kind) for line in lines}
            if any(series.values()):
                short = machine.folder_name(name.replace(",", ""))
                plot = partial(plots.lines, series=series, x=x, y=y, title=name, log=log_y)
                curves[kind].append(drawn(f"{kind}-{short}", name, plot))
    steps = _by_step(everything, drawn)
    bar.close()
    return [
        Section("speed", "Speed-ups", "Median of the quotients of paired rounds with its 95 % interval; a / b above 1: "
                "b is faster. * solves of one of them did not converge. ◇ what the paper has.", speeds),
        Section("accuracy", "Accuracy against time", "A line a seed. Time is training time alone: as it was, of runs "
                "that had the machine to themselves, else evaluations at the prices of a bench.", curves["accuracy"]),
        Section("nfe", "Evaluations over training", "Calls of f in a training step's forward.", curves["nfe"]),
        Section("residual", "Residual over training", "|f(z) - z| / |f(z)| where the solves ended.",
                curves["residual"]),
        Section("steps", "Residual by solver step", "Median over images of a trained model's solves, by eval.", steps),
        Section("memory", "Memory", "What a training step adds, measured in a process of its own.", memory),
    ]  # fmt: skip


def _benches(everything: Sequence[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """By table (or data set), protocol and machine, the latest last; those of another batch than the latest's, or of
    other rows of a free list, left out."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in sorted(everything, key=lambda run: record.started(run.record, run.folder)):
        rec = run.record
        if rec["command"] == "bench" and rec["status"] in ("done", "interrupted") and rec.get("ratios"):
            what = _table(run) or run.name.split("-")[1]
            found.setdefault((what, str(rec["protocol"]), cells.machine(rec)), []).append(run)
    return {key: [run for run in runs if run is runs[-1] or (_batch(run) == _batch(runs[-1]) and _table(runs[-1]))]
            for key, runs in sorted(found.items())}  # fmt: skip


def _batch(run: Run) -> int:
    return run.record["config"]["rows"][0]["recipe"]["batch"]


def _table(run: Run) -> str | None:
    return run.record["config"].get("table")


def _title(run: Run, at: int) -> str:
    rec = run.record
    what = _table(run) or run.name.split("-")[1]
    step = f", step {at:,}" if at else ""
    return f"{what}, {rec['protocol']}, batch {_batch(run)}{step}, {cells.machine(rec)}"


def _bars(run: Run, at: int) -> list[plots.Bar]:
    found = []
    for r in run.record["ratios"]:
        if (r.get("at") or 0) == at and r["measure"] in SPEEDS and r["id"] != "peer":
            low, high = verdicts.ends(r)
            found += of_ratio(r)._replace(low=low, high=high, paper=r["paper"] or "").bars()
    return found


def _trainings(everything: Sequence[Run], tables: Sequence[Measured]) -> dict[str, list[cells.Line]]:
    """Finished trainings that have their history, by what a figure is of: the rows of each table on each machine; of
    those in no table their models, by experiment (or data set), protocol, length and machine; one model's of other
    settings by their ids."""
    found: dict[str, list[cells.Line]] = {}
    for name, protocol, line in ((m.table.name, m.protocol, line) for m in tables for line in m.grid.lines):
        if runs := {seed: run for seed, run in line.runs.items() if run.history.exists()}:
            found.setdefault(f"{name} {protocol}, {line.machine}", []).append(replace(line, runs=runs))
    known = {key for m in tables for key in m.grid.used}
    others: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in everything:
        rec = run.record
        if (rec["command"], rec["status"]) == ("train", "done") and run.key not in known and run.history.exists():
            named = rec["experiment"] not in (None, "none")
            what = rec["experiment"] if named else log.choices(rec["config"]).get("dataset", "data")
            length = "" if rec["length"] in (None, "full") else f" {rec['length']}"
            name = f"{what} {rec['protocol']}{length}, {rec['environment']['hardware']}"
            cell = run.model, record.run_id({**rec["config"], "seed": None})
            others.setdefault(name, {}).setdefault(cell, []).append(run)
    for name, trained in others.items():
        count = Counter(model for model, _ in trained)
        labels = {cell: cell[0] + f" {runs[0].key[0]}" * (count[cell[0]] > 1) for cell, runs in trained.items()}
        found[name] = [cells.Line(labels[cell], papers.Row(), runs=dict(enumerate(trained[cell])))
                       for cell in sorted(trained)]  # fmt: skip
    return dict(sorted(found.items()))


def _curves(line: cells.Line, kind: str) -> list[tuple[list[float], list[float]]]:
    key = {"accuracy": "metrics.val_acc", "nfe": "solve.nfe_forward", "residual": "solve.residual"}[kind]
    found = []
    try:
        spent = columns.seconds(line)[0] if kind == "accuracy" else [None] * len(line.runs)
    except Unknown:
        return []
    for run, seconds in zip(line.runs.values(), spent):
        rows = [(k, row) for k, row in enumerate(Trained(run).epochs) if row.get(key) is not None]
        if rows and (kind != "residual" or run.record["solve"]["converged_fraction"] is not None):
            found.append(([seconds[k] if seconds else row["epoch"] for k, row in rows], [row[key] for _, row in rows]))
    return found


def _by_step(everything: Sequence[Run], drawn: Callable[..., Figure]) -> list[Figure]:
    figures = []
    for run in everything:
        beside = run.folder / f"{run.name}.eval.json"
        path = beside if beside.exists() else run.folder / "eval/test.json"
        seen = run.record["command"] == "train" and path.exists()
        traces = json.loads(path.read_text(encoding="utf-8")).get("residual_by_step") if seen else None
        if traces:
            series = {name: [(range(len(values)), values)] for name, values in traces.items()}
            tol = run.record["config"]["stop"].get("tol")
            figures.append(drawn(f"steps-{run.name}", run.name, partial(
                plots.lines, series=series, x="solver step", y="|f(z) - z| / |f(z)|", title=run.name, log=True,
                level=tol)))  # fmt: skip
    return figures


