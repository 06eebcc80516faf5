"""`implicit-bench table`: the papers' tables and the verdict on their claims, from records; runs what is missing."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import config, log, machine, papers, record, terminal
from ..bench.command import seconds
from ..compare.rows import Run
from ..lock import RunLocked
from ..papers import Table
from ..report import tables
from ..schema import UsageError, nearest
from ..sync import replay
from ..terminal import say
from ..words import Words, split
from . import cells
from .grid import SUFFIXES, Grid, of_bars, of_board, of_cells, of_claims

KEYS = {"table": "claims", "records": "runs,results", "columns": "", "rows": "", "seeds": "", "run_missing": "false",
        "time": "", "publish": "false", "out": "", "logger": "none"}  # fmt: skip


def command(args: Sequence[str]) -> int:
    """`table table=NAME [key=value ...]`. Raises UsageError and RecordError before anything is written."""
    own = {key: value for key, _, value in (a.partition("=") for a in args if not a.startswith("-")) if key in KEYS}
    words = split([a for a in args if a.partition("=")[0] not in KEYS])
    if words.flags or words.multirun or words.plan:
        raise UsageError("table takes no flag but --config-dir; run_missing=true runs what is missing")
    given = {**KEYS, **own}
    for key in ("run_missing", "publish"):
        if given[key] not in ("true", "false"):
            raise UsageError(f"{key}={given[key]!r} is not possible{nearest(given[key], ('true', 'false'))}")
    if given["logger"] not in ("wandb", "none"):
        raise UsageError(f"logger={given['logger']!r} is not possible{nearest(given['logger'], ('wandb', 'none'))}")
    budget = seconds(given["time"] or None)
    table = papers.table(given["table"], tuple(words.search))
    dirs = [Path(folder) for folder in listed(given["records"])]
    columns = listed(given["columns"]) or table.columns
    for name in columns:
        if name not in cells.COLUMNS:
            raise UsageError(f"no column {name!r}{nearest(name, [*cells.COLUMNS])}")
    if said := [word for word in words.overrides if word.startswith("seed=")]:
        raise UsageError(f"a table has its seeds; say seeds={said[0].partition('=')[2]} for others")
    if not all(seed.isdigit() for seed in listed(given["seeds"])):
        raise UsageError(f"seeds={given['seeds']} is not possible; write whole numbers, such as seeds=0,1")
    seeds = [*map(int, listed(given["seeds"]))]
    jobs = jobs_of(table, listed(given["rows"]), words, seeds) if table.kind == "cells" else {}
    if given["run_missing"] == "true" and (code := run_missing(table, jobs, dirs, budget)):
        return code
    which = [f"{key}={own[key]}" for key in ("table", "rows", "seeds") if key in own]
    fill = shlex.join(["implicit-bench", "table", *which, *words.overrides, "run_missing=true"])
    grid = grid_of(table, jobs, cells.read(dirs), columns, words, fill)
    if not any(row for row in grid.rows):
        raise UsageError(f"table={table.name} has nothing to show")
    if given["out"]:
        write(grid, table.name, Path(given["out"]))
    show(grid)
    if given["publish"] == "true":
        publish(grid.used.values(), Path("results"))
    if given["logger"] == "wandb":
        send(grid, table.name)
    return 0


def listed(text: str) -> list[str]:
    return [word for word in text.strip("[]").split(",") if word]


def protocol_of(words: Words) -> str:
    said = [word.partition("=")[2] for word in words.overrides if word.startswith("protocol=")]
    return said[-1] if said else "sound"


def jobs_of(table: Table, rows: Sequence[str], words: Words,
            seeds: Sequence[int] = ()) -> dict[str, dict[int, config.Composed]]:  # fmt: skip
    """The trainings that a table wants: by row and seed."""
    protocol = protocol_of(words)
    seeds = seeds or table.seeds.get(protocol, papers.SEEDS["sound"])
    said = table.jobs(rows, words.overrides, cpu=False)
    composed = config.compose_all("train", [[*row, f"seed={seed}"] for row in said.values() for seed in seeds],
                                  words.search)  # fmt: skip
    rest = iter(composed)
    return {label: {seed: next(rest) for seed in seeds} for label in said}


def grid_of(table: Table, jobs: Mapping[str, Mapping[int, config.Composed]], everything: Sequence[Run],
            columns: Sequence[str], words: Words, fill: str) -> Grid:  # fmt: skip
    protocol = protocol_of(words)
    if table.kind == "claims":
        return of_claims(table, everything)
    if table.kind == "bars":
        return of_bars(table, everything, protocol)
    if table.kind == "board":
        return of_board(table, _measured(table, everything, words))
    wanted = {label: {seed: record.cell_id(job.config) for seed, job in seeds.items()} for label, seeds in jobs.items()}
    return of_cells(table, wanted, everything, protocol, columns, fill)


def _measured(table: Table, everything: Sequence[Run],
              words: Words) -> dict[str, tuple[float, float | None, int, Sequence[Run]]]:  # fmt: skip
    """Our accuracies, %, of the lines of a board that name a row of a table: of the machine with the most seeds."""
    found: dict[str, tuple[float, float | None, int, Sequence[Run]]] = {}
    for line in (line for line in table.lines if "table" in line):
        of = papers.table(line["table"], tuple(words.search))
        jobs = jobs_of(of, [line["row"]], words)
        wanted = {label: {s: record.cell_id(job.config) for s, job in each.items()} for label, each in jobs.items()}
        best = max(cells.lines(of, wanted, everything, protocol_of(words)), key=lambda each: len(each.runs))
        if values := cells.COLUMNS["test_acc"].of(best):
            sd = statistics.stdev(values) if len(values) > 1 else None
            found[line["model"]] = statistics.fmean(values), sd, len(values), [*best.runs.values()]
    return found


def run_missing(table: Table, jobs: Mapping[str, Mapping[int, config.Composed]], dirs: Sequence[Path],
                budget: float | None) -> int:  # fmt: skip
    """Train what has no finished record, a seed of every row before the next, until the time is over; what another
    process is at is left to it. 0, or 3 when some failed."""
    from ..train.command import train

    if table.kind != "cells":
        raise UsageError(f"table={table.name} is made of other tables' records; run_missing=true is for those")
    done = {record.cell_id(run.record["config"]) for run in cells.read(dirs)
            if run.record["command"] == "train" and run.state == "done"}  # fmt: skip
    todo = [(label, seed, job) for label, seeds in jobs.items() for seed, job in seeds.items()
            if record.cell_id(job.config) not in done]  # fmt: skip
    began, failed = time.monotonic(), 0
    for label, seed, job in sorted(todo, key=lambda each: each[1]):
        if budget is not None and time.monotonic() - began > budget:
            say("left", "the time is over; the same command goes on", err=True)
            break
        say("table", f"{table.name}: {label}, seed {seed}")
        try:
            outcome = train(job, job.overrides)
        except RunLocked as other:
            say("note", f"{other}", err=True)
            continue
        if outcome.exit_code == 130:
            return 130
        failed += outcome.exit_code != 0
    return 3 if failed else 0


def show(grid: Grid) -> None:
    """On standard output, in the format asked for."""
    if terminal.format != "text":
        print(grid.said(terminal.format), end="")
        return
    say("table", grid.title)
    for head, below in grid.blocks:
        print(terminal.hanging(f" {head[0]:4}{head[1]:21}", head[2]), *(f"     {line}" for line in below), sep="\n")
    if not grid.blocks:
        _rows(grid)
    for note in grid.notes:
        say("", note)


def _rows(grid: Grid) -> None:
    """On a narrow terminal without the columns that are the least missed."""
    tables.show(grid.columns, grid.rows, spare=[c for c in reversed(grid.columns[3:]) if c != "paper"])


def write(grid: Grid, name: str, folder: Path) -> None:
    """NAME.md, .csv, .tex, .json and .txt; the same records give the same bytes."""
    record.writable("out", folder)
    for format, suffix in SUFFIXES.items():
        (folder / f"{name}.{suffix}").write_text(grid.said(format), encoding="utf-8")


def publish(runs: Any, results: Path) -> None:
    """Copy records, and of their metrics the rows of whole epochs, to results/HARDWARE/."""
    count = 0
    for run in runs:
        source = run.folder / "record.json"
        if not source.exists():  # it is a copy itself
            continue
        folder = results / machine.folder_name(run.record["environment"]["hardware"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / f"{run.name}.record.json")
        rows = [row for row in record.read_jsonl(run.folder / "metrics.jsonl") if "epoch" in row]
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{run.name}.metrics.jsonl").write_text(text, encoding="utf-8")
        count += 1
    say("publish", f"{count} record{'s' * (count != 1)} copied to {results}/; those that were there stay")


def send(grid: Grid, name: str) -> None:
    """A W&B run with the table, made of the records that it names."""
    rec = record.new_record("table", {"table": name, "records": sorted(grid.used)}, status="done")
    rec |= {"tables": {name: [grid.columns, grid.rows]}, "scalars": []}
    folder = Path("runs") / record.folder_name("table", name, None, rec["run_id"])
    rec["attempt"] = record.next_attempt(folder, ("record.json",))
    record.write_record(folder, rec)
    sink = log.Wandb()
    sink.start(rec, folder)
    replay(sink, rec, folder)
    sink.finish(0)
    print(f"wrote   {folder}/", file=sys.stderr)
