"""`implicit-bench bench`: rows, rounds, ratios, record."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from .. import clock, config, machine, record, terminal
from ..device import Device
from ..lock import RunLock
from ..log import Sink
from ..report import plots, ratios, tables
from ..terminal import Bar, duration, number, progress, say
from .ratios import Comparison, Figures, comparisons
from .rows import Row, labels, make_rows, refuse_unlike, steps_a_round

Table = tuple[list[str], list[list[str]]]  # columns, rows
FILES = ("record.json", "table.md", "speedup.svg", "metrics.jsonl")


def seconds(text: str | int | float | None) -> float | None:
    """20s, 5m or 1h, in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text))
    if not match or not float(match[1]):
        raise config.UsageError(f"time={text!r} is not a time; write 20s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def agreed(jobs: Sequence[config.Composed], words: Sequence[str]) -> tuple[float | None, int, list[Device],
                                                                           list[dict[str, Any]]]:  # fmt: skip
    """The time or the rounds that the jobs have, devices and configs. Raises UsageError where they are no bench."""
    if len(jobs) < 2:
        raise config.UsageError("bench compares two rows or more; list values, such as model=neural_ode,cdeq")
    first = jobs[0].config
    budget, rounds = seconds(first["time"]), first["rounds"]
    said = [word for word in words if word.startswith(("rounds=", "time=")) and word != "time=null"]
    if len(said) > 1:
        raise config.UsageError(f"{' and '.join(said)} both say when to end; give one of them")
    if budget is None and (not isinstance(rounds, int) or rounds < 1):
        raise config.UsageError(f"rounds={rounds!r} is not possible; write a whole number, 40 or more for an interval")
    devices: list[Device] = [config.make(job.config["gpu"], "gpu") for job in jobs]
    configs = [{**job.config, "gpu": device.settings()} for job, device in zip(jobs, devices)]
    refuse_unlike(configs)
    return budget, rounds, devices, configs


def bench(jobs: Sequence[config.Composed], words: Sequence[str]) -> int:
    """Time the jobs against each other; 0, or 1 when a row failed. Raises UsageError before anything runs."""
    began = time.perf_counter()
    budget, rounds, devices, configs = agreed(jobs, words)
    first = jobs[0].config
    dataset = jobs[0].choices["dataset"]
    pruned = [{k: v for k, v in c.items() if k not in record.LABELS | {"rounds", "time"}} for c in configs]
    identity = {"rows": pruned, "rounds": rounds if budget is None else None, "time": budget}
    folder = Path(first["paths"]["runs"]) / record.folder_name("bench", dataset, None, record.run_id(identity))
    environment = devices[0].environment()
    data = config.make(first["dataset"], "dataset").load(
        Path(first["paths"]["data"]), devices[0].torch, fetch=lambda line: say("data", line))  # fmt: skip
    rows = make_rows(jobs, labels(jobs, words), data, devices)
    record.writable("paths.runs", Path(first["paths"]["runs"]))
    with RunLock(folder):
        attempt = _set_aside(folder)
        rec = record.new_record("bench", identity, attempt=attempt, protocol=jobs[0].choices.get("protocol"),
                                experiment=jobs[0].choices.get("experiment"))  # fmt: skip
        rec["environment"], rec["data"] = environment, data.facts()
        sink: Sink = config.make(first["logger"], "logger")
        sink.start(rec, folder)
        sink.wait(30)  # nothing else may run while the clock does
        try:
            return _run(rows, rec, folder, sink, rounds, budget, began)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)  # before the first round
            rec["status"] = "interrupted" if stopped else "failed"
            rec["error"] = None if stopped else f"{type(error).__name__}: {error}"
            record.write_record(folder, rec)
            sink.finish(1)
            raise


def _run(rows: Sequence[Row], rec: dict[str, Any], folder: Path, sink: Sink, rounds: int,
         budget: float | None, began: float) -> int:  # fmt: skip
    alone = machine.Alone()
    step_ms = [row.warm_up() for row in rows]
    unsettled = [row.label for row in rows if row.warm and not row.warm.settled]
    k = steps_a_round(step_ms)
    expected = budget or rounds * k * sum(step_ms) * 1.5e-3
    how_long = f"{rounds} rounds" if budget is None else duration(budget)
    plan = f"{len(rows)} rows × {how_long} of {_steps(k)}, about {duration(expected)} from here"
    progress("plan", f"{plan}; Ctrl-C prints what there is")
    before = _prices(rows)
    bar = Bar(0 if budget else rounds, "rounds")

    def on_round(done: int, figures: dict[str, dict[str, float]]) -> None:
        jsonl.append({"step": done, **figures})
        bar.at(done)

    with contextlib.closing(record.Jsonl(folder / "metrics.jsonl")) as jsonl:
        samples = clock.interleave(
            {row.label: partial(row.measure, k) for row in rows},
            rounds=rounds if budget is None else None,
            seconds=budget,
            on_round=on_round,
        )
    bar.close()
    after = _prices(rows) if not samples.interrupted else before
    rec["environment"]["alone"] = alone.read()
    # A price is what f costs undisturbed: the lower of two readings, so that one bad moment does not spoil it.
    units = [tuple(map(min, a, b)) for a, b in zip(before, after)]
    figures = [row.figures(samples.rows[row.label], *unit) for row, unit in zip(rows, units)
               if row.label in samples.rows and samples.rounds]  # fmt: skip
    found = comparisons(figures) if len(figures) > 1 else []
    table = _table(figures, samples.failed)
    circumstances = _print(rows, samples, found, figures, table, rec, unsettled, k)
    rec["steps"] = samples.rounds * k
    rec["timing"]["cold_s"] = sum(row.warm.cold_s for row in rows if row.warm)
    rec["memory"]["peak_mib"] = machine.peak_memory_mib(rows[0].device.torch)
    rec |= {"rows": [_row(f) for f in figures], "ratios": [c.record() for c in found], "failed_rows": samples.failed,
            "rounds": samples.rounds, "steps_a_round": k, "unsettled": unsettled}  # fmt: skip
    sentences = "\n".join(f"- {_sentence(c)}" for c in found)
    (folder / "table.md").write_text(f"{tables.markdown(*table)}\n{sentences}\n\n{circumstances}\n")
    bars = [(c.title, c.ratio.value, c.ratio.low, c.ratio.high) for c in found]
    if bars:
        plots.speedup_bars(folder / "speedup.svg", bars, f"{rec['data']['name']}, batch {rows[0].recipe.batch}, "
                           f"{samples.rounds} paired rounds, {rec['environment'].get('cpu')}")  # fmt: skip
        sink.image("speedup", folder / "speedup.svg")
    sink.table("rows", *table)
    sink.summary({f"ratio.{c.measure}.{c.slower.label}_over_{c.faster.label}": c.ratio.value for c in found})
    code = 130 if samples.interrupted else 1 if samples.failed else 0
    rec["status"] = "interrupted" if samples.interrupted else "failed" if samples.failed else "done"
    rec["error"] = "; ".join(f"{k}: {v}" for k, v in samples.failed.items()) or None
    rec["timing"]["total_s"] = time.perf_counter() - began
    rec["finished_at"] = datetime.now().astimezone().isoformat(timespec="milliseconds")
    record.write_record(folder, rec)
    sink.finish(code)
    total = duration(rec["timing"]["total_s"])
    say("wrote", f"{folder}/   record.json · table.md · speedup.svg · {total} with warm-up")
    return code


def _prices(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """ms of one f and of one VJP for each row, measured once for all rows of one cell."""
    found: list[tuple[Any, tuple[float, float]]] = []
    for row in rows:
        if not any(cell == row.cell for cell, _ in found):
            found.append((row.cell, row.unit_costs()))
    return [next(price for cell, price in found if cell == row.cell) for row in rows]


def _steps(k: int) -> str:
    return f"{k} step{'s' * (k != 1)}"


def _set_aside(folder: Path) -> int:
    """Keep the attempt before under its own names; returns the number of this one."""
    if not (folder / "record.json").exists():
        return 1
    before = record.read_record(folder)["attempt"]
    record.set_aside(folder, FILES, before)
    return before + 1


def _table(figures: Sequence[Figures], failed: dict[str, str]) -> Table:
    columns = ["model", "params", "train ms", "backward", "predict", "calls f/vjp", "residual", "capped", "×floor"]
    rows = []
    for f in figures:
        m = f.means
        rows.append([f.label, f"{f.parameters:,}", number(f.median("train")), number(f.median("backward")),
                     number(f.median("predict")), f"{f.f_calls:.1f}/{m['nfe_backward']:.1f}",
                     number(m["residual"], 2) if f.ends_at_residual else "–",
                     f"{1 - m['converged_fraction']:.0%}" if f.ends_at_residual else "–",
                     f"{f.median('train') / f.floor_ms:.2f}" if f.priced else "–"])  # fmt: skip
    return columns, rows + [[label, *["failed"] * 8] for label in failed]


def _line(c: Comparison) -> ratios.Line:
    low, high = (c.ratio.low, c.ratio.high) if c.ratio.n >= clock.MIN_ROUNDS else (None, None)
    return ratios.Line(c.id, c.slower.label, c.faster.label, c.measure, c.ratio.value, low, high, c.ratio.verdict,
                       c.paper, c.caveats)  # fmt: skip


def _cells(c: Comparison) -> list[str]:
    return ratios.cells(_line(c))


def _sentence(c: Comparison) -> str:
    return ratios.sentence(_line(c))


def _print(rows: Sequence[Row], samples: clock.Samples, found: Sequence[Comparison], figures: Sequence[Figures],
           table: Table, rec: dict[str, Any], unsettled: Sequence[str], k: int) -> str:  # fmt: skip
    env = rec["environment"]
    shared = "same data, batch and threads, interleaved"
    names = " · ".join(row.label for row in rows)
    ended = " · INTERRUPTED" if samples.interrupted else ""
    head = f"{names}: {shared}, {samples.rounds} rounds of {_steps(k)}, {duration(samples.seconds)}{ended}"
    quiet = {True: "nothing else running", False: "NOT alone on the machine", None: "load unknown"}[env["alone"]]
    threads = f"{rows[0].device.threads} thread{'s' * (rows[0].device.threads > 1)}"
    batch, allocator = f"batch {rows[0].recipe.batch}", f"allocator {env['allocator']}"
    where = " · ".join([str(env["cpu"]), threads, f"torch {env['torch']}", allocator, quiet, batch])
    lines = [("bench", head), ("machine", where)]
    if unsettled:
        lines.append(("warm", f"{', '.join(unsettled)} not settled within 2 % after 10 passes"))
    for label, text in lines:
        say(label, text)
    if terminal.format == "json":  # numbers, not what is written for a reader
        both = {"rows": [_row(f) for f in figures], "ratios": [c.record() for c in found]}
        print(json.dumps(record.plain(both), indent=1))
    else:
        tables.show(*table, spare=["params", "capped", "residual", "predict"])
    say("", "×floor: a step's time over (calls of f and VJPs × the price of one alone) · capped: solves not converged")
    for label, error in samples.failed.items():
        say("failed", f"{label}: {error}")
    if found and terminal.format != "json":
        ratios.show([_cells(c) for c in found], "paired by round, 95 %")
    told: set[frozenset[str]] = set()
    for c in found:  # a pair is explained once, by its training time
        pair = frozenset((c.slower.label, c.faster.label))
        if c.measure == "train" and pair not in told and c.ratio.verdict in ("faster", "slower") and c.why():
            say("why", c.why())
            told.add(pair)
    for c in sorted((c for c in found if c.ratio.n >= clock.MIN_ROUNDS), key=lambda c: c.measure != "train")[:1]:
        say("say", f'"{_sentence(c)}"')
    return "\n".join(f"- {label}: {text}" for label, text in lines)


def _row(f: Figures) -> dict[str, Any]:
    return {"label": f.label, "model": f.model, "params": f.parameters, "solve": dict(f.means),
            "timing": {f"{name}_ms": clock.summary(values) for name, values in f.times.items()},
            "unit_ms": {"f": f.f_ms, "vjp": f.vjp_ms}, "floor_ms": f.floor_ms}  # fmt: skip
