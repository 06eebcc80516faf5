"""`implicit-bench table`: the papers' tables and the verdict on their claims, from records; runs what is missing."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .. import config, papers, record
from ..bench import claims
from ..bench.command import seconds
from ..compare.rows import Run
from ..lock import RunLocked
from ..papers import Table
from ..plan import plan_training
from ..schema import UsageError, files, nearest
from ..sweep.board import shared
from ..terminal import say
from ..words import Words, as_meant, of_hydra, split
from . import cells, verdicts
from .columns import COLUMNS
from .grid import SUFFIXES, Grid, of_bars, of_board, of_cells, of_claims
from .out import publish, send, show, write

KEYS = {"table": "claims", "records": "runs,results", "columns": "", "rows": "", "seeds": "", "run_missing": "false",
        "time": "", "publish": "false", "out": "", "logger": "none"}  # fmt: skip
WHICH = ("table", "records", "columns", "rows", "seeds")  # what the command below a table says again


def command(args: Sequence[str]) -> int:
    """`table table=NAME [key=value ...]`. Raises UsageError and RecordError before anything is written."""
    given, words = keyed(args, KEYS)
    if given["run_missing"] == "true" and any(arg.startswith("logger=") for arg in args):  # of its trainings as well
        words.overrides.append(f"logger={given['logger']}")
    launch = words
    words = words._replace(overrides=[word for word in words.overrides if not word.startswith("hydra")])
    if words.flags or (launch.overrides != words.overrides and not words.multirun):
        raise UsageError("table takes no flag but --config-dir and, with run_missing=true, -m hydra/launcher=NAME")
    if words.multirun and (given["run_missing"] != "true" or given["time"]):
        raise UsageError("-m hands a table's missing runs to a launcher: it wants run_missing=true, and no time=")
    if given["run_missing"] != "true" and (words.plan or given["time"]):
        asked = "plan=true" if words.plan else f"time={given['time']}"
        raise UsageError(f"{asked} is about what run_missing=true would do; say that too")
    for key in ("run_missing", "publish"):
        if given[key] not in ("true", "false"):
            raise UsageError(f"{key}={given[key]!r} is not possible{nearest(given[key], ('true', 'false'))}")
    if given["logger"] not in ("wandb", "none"):
        raise UsageError(f"logger={given['logger']!r} is not possible{nearest(given['logger'], ('wandb', 'none'))}")
    budget, code = seconds(given["time"] or None), 0
    table = papers.table(given["table"], tuple(words.search))
    _fits(table, words, given)
    dirs = [Path(folder) for folder in listed(given["records"])]
    if not dirs:
        raise UsageError("records= names no folder; leave it out for records=runs,results")
    if own := [Path(word.partition("=")[2]) for word in words.overrides if word.startswith("paths.runs=")]:
        if given["run_missing"] == "true" and not words.plan:
            record.writable("paths.runs", own[-1])
        dirs = [*(folder for folder in dirs if folder != own[-1]), *([own[-1]] if own[-1].is_dir() else [])]
    columns = listed(given["columns"]) or table.columns
    for name in columns:
        if name not in COLUMNS:
            raise UsageError(f"no column {name!r}{nearest(name, [*COLUMNS])}")
    if said := [word for word in words.overrides if word.startswith("seed=")]:
        raise UsageError(f"a table has its seeds; say seeds={said[0].partition('=')[2]} for others")
    if not all(seed.isdigit() for seed in listed(given["seeds"])):
        raise UsageError(f"seeds={given['seeds']} is not possible; write whole numbers, such as seeds=0,1")
    seeds = [*map(int, listed(given["seeds"]))]
    jobs = jobs_of(table, listed(given["rows"]), words, seeds) if table.kind == "cells" else {}
    if words.plan:
        missing = [job for _, _, job in todo(table, jobs, dirs)]
        shared(missing, of_hydra(launch.overrides), words.search)
        return plan_training(missing)
    if given["run_missing"] == "true":
        began = time.monotonic()
        code = run_missing(table, jobs, dirs, budget, launch)
        left = budget and budget - (time.monotonic() - began)
        if not code and not launch.multirun and any(COLUMNS[name].timed for name in columns):
            code = time_missing(table, jobs, dirs, left, words)
        if code == 130:
            return code
    which = [f"{key}={given[key]}" for key in KEYS if given[key] != KEYS[key] and key in WHICH]
    grid = grid_of(table, jobs, cells.read(dirs), columns, words, filling(which, words))
    if not any(row for row in grid.rows):
        raise UsageError(f"table={table.name} has nothing to show")
    if given["out"]:
        write(grid, table.name, Path(given["out"]), jobs)
    show(grid)
    if given["out"]:
        say("wrote", f"{given['out']}/   {table.name}.{', .'.join(SUFFIXES.values())}{', .bib' * bool(jobs)}", err=True)
    if given["publish"] == "true":
        publish(grid.used.values(), Path("results"))
    if given["logger"] == "wandb" and not code:
        used = sorted({id for id, _ in grid.used})
        rec = record.new_record("table", {"table": table.name, "records": used}, status="done")
        send({**rec, "tables": {table.name: [grid.columns, grid.rows]}}, table.name)
    return code


def _fits(table: Table, words: Words, given: Mapping[str, str]) -> None:
    """Raises UsageError for what this table has no use for."""
    if table.kind == "cells":
        for label, row in table.rows.items():
            if unknown := next((column for column in row.published if column not in COLUMNS), None):
                raise UsageError(f"table={table.name}, row {label}: no column {unknown!r} to be published"
                                 f"{nearest(unknown, [*COLUMNS])}")  # fmt: skip
        claims.asked(table)
        return
    takes = ["protocol"] if table.kind in ("bars", "board") else []
    said = [*(word for word in words.overrides if word.partition("=")[0] not in takes),
            *(f"{key}={given[key]}" for key in ("rows", "columns", "seeds") if given[key])]  # fmt: skip
    if said:
        raise UsageError(f"table={table.name} has no use for {said[0]!r}; it is made of other tables' records")
    if (protocol := protocol_of(words)) not in (known := files("protocol", tuple(words.search))):
        raise UsageError(f"no protocol {protocol!r}{nearest(protocol, [*known])}")


def keyed(args: Sequence[str], keys: Mapping[str, str]) -> tuple[dict[str, str], Words]:
    """The values of a command's own keys, with their defaults, and the words that are for Hydra. Raises UsageError for
    a key that is nearly one of its own."""
    said = [(key, value) for key, equals, value in (a.partition("=") for a in args) if equals]
    for key, _ in said:
        if key not in keys and key != "seed" and difflib.get_close_matches(key, keys, 1, 0.8):
            raise UsageError(f"no key {key!r}{nearest(key, [*keys])}")
    own = {key: value for key, value in said if key in keys}
    return {**keys, **own}, split([a for a in args if a.partition("=")[0] not in own])


def listed(text: str) -> list[str]:
    return [word.strip() for word in text.strip("[]").split(",") if word.strip()]


def filling(which: Sequence[str], words: Words) -> str:
    """The command that runs what is missing of a table."""
    found = (f"--config-dir={folder}" for folder in words.search)
    return shlex.join(["implicit-bench", "table", *which, *words.overrides, "run_missing=true", *found])


def protocol_of(words: Words) -> str:
    said = [word.partition("=")[2] for word in words.overrides if word.startswith("protocol=")]
    return said[-1] if said else "sound"


def jobs_of(table: Table, rows: Sequence[str], words: Words,
            seeds: Sequence[int] = ()) -> dict[str, dict[int, config.Composed]]:  # fmt: skip
    """The trainings that a table wants: by row and seed."""
    protocol = protocol_of(words)
    seeds = seeds or table.seeds.get(protocol, papers.SEEDS["sound"])
    said = table.jobs(rows, words.overrides, cpu=False)
    apart = any("${seed}" in path.read_text("utf-8") for top in words.search for path in Path(top).rglob("*.yaml"))
    rows_of = [[*row, f"seed={seed}"] for row in said.values() for seed in (seeds if apart else seeds[:1])]
    composed = iter(config.compose_all("train", rows_of, words.search))
    if apart:
        return {label: {seed: next(composed) for seed in seeds} for label in said}
    return {label: {seed: _seeded(job, seed) for seed in seeds} for label, job in zip(said, composed)}


def _seeded(job: config.Composed, seed: int) -> config.Composed:
    """The same with another seed: composing takes a third of a second, and no file of ours reads the seed elsewhere."""
    others = [word for word in job.overrides if not word.startswith("seed=")]
    return replace(job, config={**job.config, "seed": seed}, overrides=[*others, f"seed={seed}"])


def grid_of(table: Table, jobs: cells.Jobs, everything: Sequence[Run],
            columns: Sequence[str], words: Words, fill: str) -> Grid:  # fmt: skip
    protocol = protocol_of(words)
    if table.kind == "claims":
        found = of_claims(table, everything, verdicts.fitting(words.search))
    elif table.kind == "bars":
        found = of_bars(table, everything, protocol, verdicts.fitting(words.search))
    elif table.kind == "board":
        found = of_board(table, _measured(table, everything, words))
    else:
        found = of_cells(table, jobs, everything, protocol, columns, fill)
    return replace(found, name=table.name)


def touched(table: Table, everything: Sequence[Run], protocol: str) -> bool:
    """Whether any record could be a cell's: of the table's experiment, or a bench of it."""
    experiments = {word.partition("=")[2] for word in table.words if word.startswith("experiment=")}
    return any(run.record["protocol"] == protocol and (
        run.record["config"].get("table") == table.name if run.record["command"] == "bench"
        else not experiments or run.record["experiment"] in experiments) for run in everything)  # fmt: skip


def _measured(table: Table, everything: Sequence[Run],
              words: Words) -> dict[str, tuple[float, float | None, int, Sequence[Run]]]:  # fmt: skip
    """Our accuracies, %, of the lines of a board that name a row of a table: of the machine with the most seeds."""
    found: dict[str, tuple[float, float | None, int, Sequence[Run]]] = {}
    for line in (line for line in table.lines if "table" in line):
        of = papers.table(line["table"], tuple(words.search))
        if not touched(of, everything, protocol_of(words)):
            continue
        jobs = jobs_of(of, [line["row"]], words)
        best = max(cells.lines(of, jobs, everything, protocol_of(words)), key=lambda each: len(each.runs))
        if values := COLUMNS["test_acc"].of(best):
            sd = statistics.stdev(values) if len(values) > 1 else None
            found[line["model"]] = statistics.fmean(values), sd, len(values), [*best.runs.values()]
    return found


def todo(table: Table, jobs: cells.Jobs, dirs: Sequence[Path]) -> list[tuple[str, int, config.Composed]]:
    """What has no finished record, a seed of every row before the next. Raises UsageError."""
    if table.kind != "cells":
        raise UsageError(f"table={table.name} is made of other tables' records; run_missing=true is for those")
    done = {record.cell_of(run.record) for run in cells.read(dirs)
            if run.record["command"] == "train" and run.state == "done"}  # fmt: skip
    missing = [(label, seed, job) for label, seeds in jobs.items() for seed, job in seeds.items()
               if record.cell_id(job.config) not in done]  # fmt: skip
    return sorted(missing, key=lambda each: each[1])


def run_missing(table: Table, jobs: cells.Jobs, dirs: Sequence[Path],
                budget: float | None, launch: Words) -> int:  # fmt: skip
    """Train what has no finished record until the time is over; what another process is at is left to it. With -m by
    the launcher named. 0, or 3 when some failed."""
    from ..sweep.command import run
    from ..train.command import train

    missing = todo(table, jobs, dirs)
    if launch.multirun and missing:
        runs = Path(missing[0][2].config["paths"]["runs"])
        return 3 if run([job.overrides for _, _, job in missing], True, runs, launch)[0] else 0
    began, failed = time.monotonic(), 0
    for label, seed, job in missing:
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


def time_missing(table: Table, jobs: cells.Jobs, dirs: Sequence[Path],
                 left: float | None, words: Words) -> int:  # fmt: skip
    """Bench the rows that have not been timed on this machine, in the time left or ten minutes, beside a row that they
    can be compared with: the table's first, even if another machine has timed it."""
    from .. import match
    from ..bench.command import bench

    gpu = next(iter(next(iter(jobs.values())).values())).config["gpu"]
    here = cells.machine({"environment": config.make(gpu, "gpu").environment(), "config": {"gpu": gpu}})
    lines = cells.lines(table, jobs, cells.read(dirs), protocol_of(words))
    timed = {line.label for line in lines if line.timed and line.machine == here}
    untimed = [label for label in jobs if label not in timed]
    beside = next((label for label in table.chosen(None) if [label] != untimed), None)
    if not untimed or beside is None or (left is not None and left < 1):
        return 0
    runs = Path(next(iter(next(iter(jobs.values())).values())).config["paths"]["runs"])
    if todo(table, jobs, [*dirs, runs]):
        say("note", "no times yet: another process is at some of the trainings", err=True)
        return 0
    chosen = as_meant(f"rows={','.join([beside, *(label for label in untimed if label != beside)])}")
    asked = [f"table={table.name}", chosen, f"time={left or 600:.0f}s", *words.overrides]
    found = papers.rows(asked, words.search)
    assert found is not None
    rows = config.compose_all("bench", [*found[1].values()], words.search)
    for job, label in zip(rows, found[1]):
        job.table, job.label = found[0], label
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what was asked for is the table
            return bench(match.matched(rows, words.search), asked)
    except RunLocked as other:
        say("note", f"{other}", err=True)
        return 0
