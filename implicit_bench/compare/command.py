"""`implicit-bench compare`: ratios between trainings from their records alone; and the same at the end of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import log, mirror, record, runs, terminal
from ..bench.claims import OF_TESTS
from ..lock import RunLock
from ..record import RecordError
from ..report import plots, ratios, tables
from ..schema import UsageError, nearest
from ..sync import replay
from ..terminal import number, say, share
from ..words import plain
from . import spelled
from .figures import CUT, MEASURES, SHARE, WINDOW, Pair, line, of_row
from .rows import Row, Run, find, refuse_unlike, row

COLUMNS = ["model", "seeds", "val acc", "test acc", "step ms", "nfe f/b", "epochs", "train s", "s to target"]
FILES = ("record.json", "table.md", "speedup.svg")
LOGGERS = ("wandb", "none")
LACKS = {"elsewhere": "is at another process; the same command compares once that is done"}


def command(args: Sequence[str]) -> int:
    """`compare base=A against=B,C [FILTER ...]`. Raises UsageError and RecordError before anything is written."""
    for key in ("base", "against"):
        if len(given := [word for word in args if word.startswith(f"{key}=")]) > 1:
            raise UsageError(f"{' and '.join(given)} both say {key}; give one of them")
    words, _, options = plain(args, "compare", base="", against="", records="", logger="", plan="false",
                              **{"paths.runs": "runs"})  # fmt: skip
    base, against, logger, dirs = ([v for v in options[key] if v] for key in ("base", "against", "logger", "records"))
    if len(base) != 1:
        what = f"one base, not {' and '.join(base)}" if base else "a base, such as base=neural_ode"
        raise UsageError(f"compare wants {what}; what it is compared with is against=A,B")
    if not against:
        raise UsageError(f"compare wants what {base[0]} is compared with, such as against=cdeq,skip_cdeq")
    if twice := [name for k, name in enumerate(against) if name in (*base, *against[:k])]:
        raise UsageError(f"{twice[0]!r} is named twice; base={base[0]} is compared with each other row once")
    for key, known in (("logger", LOGGERS), ("plan", ("true", "false"))):
        if (said := ",".join(options[key])) and said not in known:
            raise UsageError(f"{key}={said!r} is not possible{nearest(said, known)}")
    top = Path(options["paths.runs"][0])
    found = find([*base, *against], words, [Path(folder) for folder in dirs] or [top])
    refuse_unlike(found)
    if options["plan"] == ["true"]:
        rows = [[r.label, seed, run.name] for r in found for seed, run in r.runs.items()]
        tables.show(["row", "seed", "run"], rows)
        say("plan", "these would be compared; nothing was written")
        return 0
    compare(found, top, logger[0] if logger else None)
    return 0


def after_sweep(jobs: Sequence[Mapping[str, Any]], top: Path) -> None:
    """What a sweep over models, whose runs are below `top`, says of them, within each combination of the other words
    but the seed; where the records do not allow it, a note says why. `jobs`: what Sweep.close tells of each."""
    if len({word for job in jobs for word in job["words"] if word.startswith("model=")}) < 2:
        return
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for job in jobs:
        rest = tuple(word for word in job["words"] if word.partition("=")[0] not in ("model", "seed"))
        groups.setdefault(rest, []).append(job)
    for rest, group in groups.items():
        if own := [word for word in rest if any(word not in other for other in groups)]:
            say("sweep", " ".join(own))
        try:
            rows = _trained(group, top)
            refuse_unlike(rows)
            compare(rows, top)
        except (UsageError, RecordError) as problem:
            say("note", f"no comparison: {problem}", err=True)


def _trained(jobs: Sequence[Mapping[str, Any]], top: Path) -> list[Row]:
    """The rows of some jobs that have been run, the base first: neural_ode if it is there, else the first model."""
    found: dict[str, list[Run]] = {}
    for job in jobs:
        if not job["name"]:
            which = " ".join(word for word in job["words"] if word.partition("=")[0] in ("model", "seed"))
            raise UsageError(f"{which} {LACKS.get(job['state'], 'has left no record')}")
        folder = top / job["name"]
        rec = {**record.read_record(folder), "folder": folder}
        found.setdefault(rec["config"]["model"]["name"], []).append(Run(folder.name, rec, runs.state(rec), folder))
    return [row(name, found[name]) for name in sorted(found, key=lambda name: name != "neural_ode")]  # which is stable


def compare(rows: Sequence[Row], top: Path, logger: str | None = None) -> None:
    """Print the comparisons of the first row with each other, and leave them below `top`."""
    pairs = [Pair(rows[0], other) for other in rows[1:]]
    figures = [of_row(each, pairs) for each in rows]
    found = [pair.record(measure) for pair in pairs for measure in pair.measures]
    if of_tests := [ratio for ratio in found if ratio["measure"] in OF_TESTS]:
        cut = {each.label for each in rows if any(map(_cut, each.runs.values()))}
        for ratio in of_tests:
            ratio["caveats"] += [CUT] if {ratio["numerator"], ratio["denominator"]} & cut else []
    first = rows[0].first.record
    identity = {"rows": {each.label: {str(s): run.record["run_id"] for s, run in each.runs.items()} for each in rows},
                "base": rows[0].label, "window": WINDOW, "share": SHARE, "gpu": first["config"]["gpu"]}  # fmt: skip
    rec = record.new_record("compare", identity, **{key: first[key] for key in (
        "experiment", "protocol", "length", "data")}, environment={**first["environment"]})  # fmt: skip
    lines = [line(each) for each in found]
    table = COLUMNS, [_cells(f) for f in figures]
    rec |= {"rows": figures, "ratios": found, "scalars": [[0, ratios.scalars(lines)]],
            "tables": {"rows": table, "ratios": [ratios.COLUMNS, [ratios.cells(each) for each in lines]]}}  # fmt: skip
    _print(rows, pairs, rec, lines, table)
    _keep(rec, lines, table, top / record.folder_name("compare", _dataset(first), None, rec["run_id"]),
          _sink(logger, first["config"].get("logger") or {}))  # fmt: skip


def _cut(run: Run) -> bool:
    said = ("length=", "recipe", "dataset", "network.", "protocol.", "stop.")
    own = ("network.untied", "network.inject", "stop.steps")  # what a row of a table has
    return any(word.startswith(said) and not word.startswith(own) for word in spelled.words(run.record))


def _dataset(rec: Mapping[str, Any]) -> str:
    return log.choices(rec["config"]).get("dataset", "data")


def _cells(f: Mapping[str, Any]) -> list[str]:
    metrics, timing, solve = f["metrics"], f["timing"], f["solve"]
    nfe = f"{number(solve['nfe_forward'])}/{number(solve['nfe_backward'])}"
    return [f["label"], " ".join(map(str, f["seeds"])), share(metrics["val_acc"]), share(metrics["test_acc"]),
            number(timing["step_ms"]), nfe, str(f["epochs"]), number(timing["train_s"]), number(timing["target_s"])]


def _print(rows: Sequence[Row], pairs: Sequence[Pair], rec: Mapping[str, Any], lines: Sequence[ratios.Line],
           table: tuple[list[str], list[list[str]]]) -> None:  # fmt: skip
    env, base = rec["environment"], rows[0]
    others = " · ".join(each.label for each in rows[1:])
    say("compare", f"{others} against {base.label}: {_dataset(base.first.record)}, trained alike and alone, by seed")
    threads = terminal.count(env["threads"], "thread")
    where = [str(env["gpu"] or env["cpu"]), threads, f"torch {env['torch']}", f"allocator {env['allocator']}"]
    say("machine", " · ".join([*where, f"batch {base.first.record['config']['recipe']['batch']}"]))
    for pair in pairs:
        for each, other in ((pair.base, pair.other), (pair.other, pair.base)):
            if lone := sorted(each.runs.keys() - other.runs.keys()):
                say("left", f"seed {', '.join(map(str, lone))} of {each.label}, which {other.label} has not")
    if not ratios.for_program(rec):
        tables.show(*table, spare=["nfe f/b", "epochs", "test acc"])
        say("", "train s: whole epochs, without validation and the cold first step · target: "
            f"{SHARE:.0%} of {base.label}'s last validation accuracy, lower medians of {WINDOW} epochs")  # fmt: skip
        ratios.show([ratios.cells(each) for each in lines], "paired by seed, 95 %")
    say("say", f'"{_headline(rec, lines)}"')


def _headline(rec: Mapping[str, Any], lines: Sequence[ratios.Line]) -> str:
    """Of the ratios with an interval, the one nearest to what a user waits for; none of solves that did not
    converge."""
    fine = [each for each in lines if not ratios.stuck(each.caveats)]
    if not fine:
        return f"no headline: {'; '.join(ratios.stuck(lines[0].caveats))}"
    times = [each for each in fine if each.measure in MEASURES]
    best = min(times, key=lambda each: (each.low is None, each.value is None, -MEASURES.index(each.measure)))
    acc = {f["label"]: share(f["metrics"]["test_acc"]) for f in rec["rows"]}
    return f"{ratios.sentence(best)}; test accuracy {' against '.join(acc[label] for label in best.order)}"


def _keep(rec: dict[str, Any], lines: Sequence[ratios.Line], table: tuple[list[str], list[list[str]]], folder: Path,
          sink: log.Sink) -> None:  # fmt: skip
    """Record, table, picture and W&B run, unless the folder has these very figures; an attempt before is kept."""
    record.writable("paths.runs", folder.parent)
    with RunLock(folder):
        before = record.read_record(folder) if (folder / "record.json").exists() else None
        if before and all(before.get(key) == record.plain(rec[key]) for key in ("rows", "ratios")):
            say("kept", f"{folder}/   which says the same")
            return
        rec["attempt"] = record.next_attempt(folder, FILES)
        rec["status"], rec["finished_at"] = "done", record.now()
        record.write_record(folder, rec)
        cells = [ratios.cells(each) for each in lines]
        said = f'{tables.markdown(*table)}\n{tables.markdown(ratios.COLUMNS, cells)}\n- "{_headline(rec, lines)}"\n'
        (folder / "table.md").write_text(said, encoding="utf-8")
        bars = [bar for each in lines for bar in each.bars()]
        title = f"{rec['data']['name']}, {rec['environment'].get('cpu')}"
        plots.ratio_bars([folder / "speedup.svg"], plots.WIDE, bars, title,
                         "ratio of geometric means by seed, 95 % interval")  # fmt: skip
        sink.start(rec, folder)
        replay(sink, rec, folder)
        sink.finish(0)
    say("wrote", f"{folder}/   {' · '.join(FILES)}")


def _sink(logger: str | None, settings: Mapping[str, Any]) -> log.Sink:
    """W&B as the base's trainings had it, unless `logger` says otherwise; under a W&B agent, whose run is a training's,
    none."""
    if mirror.sweep() or logger == "none" or (logger is None and str(settings.get("_target_")).endswith("NoSink")):
        return log.NoSink()
    return log.Wandb(**{key: settings[key] for key in ("mode", "project", "entity", "group") if key in settings})
