"""Where a table goes: to the terminal, into files, to results/, to W&B."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import log, machine, record, terminal
from ..jsonl import read_jsonl
from ..report import tables
from ..sync import replay
from ..terminal import say
from . import cells
from .grid import SUFFIXES, Grid


def show(grid: Grid) -> None:
    """On standard output, in the format asked for."""
    if terminal.format != "text":
        print(grid.said(terminal.format), end="")
        return
    say("table", grid.title)
    for head, below in grid.blocks:
        print(terminal.hanging(f" {head[0]:4}{head[1]:21}", head[2]))
        for protocol, line in below:
            print(terminal.hanging(f"     {protocol}", line))
    if not grid.blocks:
        tables.show(grid.columns, grid.rows, spare=grid.spare)  # a narrow terminal has not those missed the least
    for note in grid.notes:
        say("", note)


def write(grid: Grid, name: str, folder: Path, jobs: cells.Jobs) -> None:
    """NAME.md, .csv, .tex, .json, .txt, and NAME.bib of the methods; the same records give the same bytes."""
    record.writable("out", folder)
    for format, suffix in SUFFIXES.items():
        (folder / f"{name}.{suffix}").write_text(grid.said(format), encoding="utf-8")
    if cited := references([job.config for each in jobs.values() for job in each.values()]):
        (folder / f"{name}.bib").write_text(cited, encoding="utf-8")


def references(configs: Sequence[Mapping[str, Any]]) -> str:
    """The entries of refs.bib that have a class or a data set of these configs among their keywords."""
    flat = [(key, value) for cfg in configs for key, value in record.flat(cfg).items()]
    used = {str(value).rpartition(".")[2] for key, value in flat if key.endswith("_target_")}
    used |= {str(value) for key, value in flat if key == "dataset.name"}
    entries = (Path(__file__).parent / "refs.bib").read_text(encoding="utf-8").splitlines(keepends=True)
    found = [(entry, re.search(r"keywords = \{([^}]*)\}", entry)) for entry in entries]
    return "".join(entry for entry, words in found if words and used & {*words[1].split(", ")})


def publish(runs: Any, results: Path) -> None:
    """Copy records, and of their metrics the rows of whole epochs or, of a bench, its rounds, to results/HARDWARE/."""
    count = 0
    for run in runs:
        source = run.folder / "record.json"
        if not source.exists():  # it is a copy itself
            continue
        folder = results / machine.folder_name(run.record["environment"]["hardware"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / f"{run.name}.record.json")
        if (seen := run.folder / "eval/test.json").exists():
            shutil.copyfile(seen, folder / f"{run.name}.eval.json")
        rounds = run.record["command"] == "bench"
        rows = [row for row in read_jsonl(run.folder / "metrics.jsonl") if rounds or "epoch" in row]
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{run.name}.metrics.jsonl").write_text(text, encoding="utf-8")
        count += 1
    say("publish", f"{terminal.count(count, 'record')} copied to {results}/; those that were there stay")


def send(rec: dict[str, Any], name: str, page: str = "") -> None:
    """A W&B run of what was made of records, with its tables or its page."""
    folder = Path("runs") / record.folder_name(rec["command"], name, None, rec["run_id"])
    rec["attempt"] = record.next_attempt(folder, ("record.json", "report.html"))
    record.write_record(folder, rec)
    if page:
        (folder / "report.html").write_text(page, encoding="utf-8")
    sink = log.Wandb()
    sink.start(rec, folder)
    replay(sink, rec, folder)
    sink.finish(0)
    print(f"wrote   {folder}/", file=sys.stderr)
