"""The command line: one dispatcher. Help and list answer without importing torch or Hydra."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guard import guarded
from .help import HELP, PROG, USAGE
from .schema import UsageError, files, nearest
from .words import Words, as_meant, of_hydra, plain, split

if TYPE_CHECKING:
    from . import config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. User mistakes are one sentence on stderr and code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if "--version" in args:
        from . import __version__

        print(f"{PROG} {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name == "complete":  # what a shell asks at each Tab
        from .complete import complete

        print(*complete(" ".join(rest), COMMANDS), sep="\n")
        return 0
    if name not in COMMANDS:
        print(f"{PROG}: no command {name!r}{nearest(name, [*COMMANDS])}", file=sys.stderr)
        return 2
    if any(a in ("-h", "--help") for a in rest):
        print(HELP[name], end="")
        return 0
    return guarded(lambda: _with_manners(name, rest))


def _with_manners(name: str, args: list[str]) -> int:
    """-q and format= are about the terminal: no command sees them, and no run's identity."""
    from . import terminal

    formats = [a.partition("=")[2] for a in args if a.startswith("format=")]
    possible = terminal.TEX if name == "table" else terminal.FORMATS
    for format in formats:
        if format not in possible:
            raise UsageError(f"no format {format!r}{nearest(format, possible)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (name != "train" or {"-m", "--multirun"} & {*args}):
        raise UsageError("torchrun's processes share one training alone; start this without torchrun")
    rest = [a for a in args if a not in ("-q", "--quiet") and not a.startswith("format=")]
    if formats and name == "train" and "plan=true" not in rest:
        raise UsageError("train prints no table to format; its figures are in record.json, and runs format=csv has all")
    with terminal.manners("-q" in args or "--quiet" in args, (formats or ["text"])[-1]):
        return COMMANDS[name](rest)


def _show(command: str, words: Words) -> int:
    """What Hydra's flags ask for; for every row of a sweep, as YAML documents."""
    from . import config
    from .handover import hand_over

    rows = [*_rows(command, words)[1].values()]
    config.compose_all(command, rows, words.search)  # a mistake is one sentence
    for row in rows:
        if len(rows) > 1:
            print("---")
        hand_over(command, words, [*words.flags, *row], print)
    return 0


def _composing(task: Callable[[Words], int]) -> Callable[[list[str]], int]:
    """The command of a task, which Hydra's flags and plan=true ask something about instead of doing it."""

    def command(args: list[str]) -> int:
        words = split(args)
        name = task.__name__.removeprefix("_")
        if words.multirun and name != "train":
            rows = "key=a,b lists its rows" if name == "bench" else "it does one thing at a time"
            raise UsageError(f"{name} takes no -m; {rows}")
        if name == "eval":  # as in runs, a plain word names the run
            plainly = [w if "=" in w else as_meant(f"run={w}") for w in words.overrides]
            words = words._replace(overrides=plainly)
        if words.flags:
            return _show(name, words)
        return _plan(name, words) if words.plan else task(words)

    return command


def _rows(command: str, words: Words) -> tuple[Any, dict[str, list[str]]]:
    """The table asked for, if any, and the words of each job by its row there, or by its number."""
    from . import config, papers

    if command == "bench" and (found := papers.rows(words.overrides, words.search)):
        return found
    rows = papers.sweep(words.overrides, words.search) if words.multirun else None
    return None, {str(i): row for i, row in enumerate(rows or config.expand(words.overrides, words.search))}


def _jobs(command: str, words: Words, aloud: bool = True) -> list[config.Composed]:
    from . import config

    if command == "bench" and any(word.startswith("runs=") for word in words.overrides):
        from .bench.finished import of_runs

        return of_runs(words)
    table, rows = _rows(command, words)
    jobs = config.compose_all(command, [*rows.values()], words.search)
    for job, label in zip(jobs, rows if table else ()):
        job.table, job.label = table, label
    from . import match  # and torch with it, which a mistake in the words need not wait for

    return match.matched(jobs, words.search, not words.plan, aloud)


def _train(words: Words) -> int:
    if words.multirun:
        from .sweep.command import sweep

        return sweep(words)
    if hydras := of_hydra(words.overrides):
        raise UsageError(f"{hydras[0]} is about a sweep; add -m, or leave it out")
    from . import config

    composed = config.compose("train", words.overrides, words.search)
    from . import match
    from .train.command import train

    [job] = match.matched([composed], words.search)
    return train(job, words.overrides).exit_code


def _plan(command: str, words: Words) -> int:
    if command == "data":
        return _data(words)
    jobs = _jobs(command, words)
    from . import plan
    from .sweep.board import shared

    shared(jobs, of_hydra(words.overrides), words.search)
    if command == "train":
        return plan.plan_training(jobs)
    return plan.plan_bench(jobs, words.overrides) if command == "bench" else plan.plan_others(command, jobs)


def _bench(words: Words) -> int:
    jobs = _jobs("bench", words)
    from .bench.command import bench

    return bench(jobs, words.overrides)


def _data(words: Words) -> int:
    """Fetch what is named; tell of all, or with plan=true of those, what is there and what it would cost."""
    from . import config

    named = any(word.partition("=")[0].split(".")[0] == "dataset" for word in words.overrides)
    rows = config.expand(words.overrides, words.search)
    if not named:
        names = files("dataset", words.search)
        rows = [[f"dataset={name}", *row] for row in rows for name in names]
    jobs = config.compose_all("data", rows, words.search)
    from .report import tables
    from .terminal import say

    sets = [(config.make(job.config["dataset"], "dataset"), Path(job.config["paths"]["data"])) for job in jobs]
    if named and not words.plan:
        for dataset, root in sets:
            dataset.fetch(root, lambda line: say("data", line))
        return 0
    found = [dataset.describe(root) for dataset, root in sets]
    table = [[job.choices["dataset"], row["state"], row["bytes"] / 1e6,
              0.0 if row["state"] == "present" else row["download_mb"], row["folder"], row["how"]]
             for job, row in zip(jobs, found)]  # fmt: skip
    mb = dict.fromkeys(("MB", "to fetch, MB"), lambda n: "?" if n is None else f"{n:,.0f}" if n else "–")
    tables.show(["data set", "state", "MB", "to fetch, MB", "folder", "how"], table, mb, spare=["how", "folder"])
    return 0


def _eval(words: Words) -> int:
    jobs = _jobs("eval", words)
    from .evaluation.command import evaluate

    return max([evaluate(job, words.search) for job in jobs])


def _check(words: Words) -> int:
    jobs = _jobs("check", words)
    from .check import check

    return max([check(job) for job in jobs])


def _list(args: list[str]) -> int:
    from .listing import listing

    return listing(split(args))


def _runs(args: list[str]) -> int:
    from .runs import command

    words, flags, options = plain(args, "runs", ("-y",), records="runs")
    return command(words, [Path(folder) for folder in options["records"]], "-y" in flags)


def _doctor(args: list[str]) -> int:
    words, _, options = plain(args, "doctor", records="runs", data="data")
    if words:
        raise UsageError(f"doctor takes no word {words[0]!r}; records=DIR and data=DIR say where to look")
    from .doctor import examine, show

    found = examine(Path(options["records"][0]), Path(options["data"][0]))
    show(found)
    return int(any(finding.state == "bad" for finding in found))


def _sync(args: list[str]) -> int:
    words, flags, options = plain(args, "sync", ("--force", "--offline"), records="runs", project="", entity="")
    from .sync import named, sync

    folders = named([Path(folder) for folder in options["records"]], words)
    mode = "offline" if "--offline" in flags else "auto"
    project, entity = (options[key][0] or None for key in ("project", "entity"))
    return sync(folders, mode, project, entity, force="--force" in flags)


def _of(module: str, name: str) -> Callable[[list[str]], int]:
    """A command of another module, which is imported when it is asked for."""
    return lambda args: getattr(importlib.import_module(f".{module}", __package__), name)(args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **{task.__name__.removeprefix("_"): _composing(task) for task in (_train, _eval, _bench, _check, _data)},
    "compare": _of("compare.command", "command"), "table": _of("table.command", "command"),
    "report": _of("table.report", "command"), "list": _list,
    "runs": _runs, "sync": _sync, "doctor": _doctor, "completion": _of("complete", "script"),
}  # fmt: skip
