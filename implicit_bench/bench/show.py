"""What a bench prints, draws, writes beside its record and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import clock
from ..report import plots, ratios, tables
from ..terminal import count, duration, number, say, share
from .ratios import Comparison, Figures, Stage
from .rows import Row

COLUMNS = ["model", "params", "train ms", "backward", "predict", "calls f/vjp", "residual", "capped", "val acc",
           "×floor", "MiB", "GFLOP/s"]  # fmt: skip
SPARE = ["params", "GFLOP/s", "MiB", "capped", "residual", "val acc", "predict"]


def row(f: Figures, at: int | None) -> dict[str, Any]:
    """A row of the record."""
    times = {f"{name}_ms": clock.summary(values) for name, values in f.times.items() if name != "nfe"}
    return {"label": f.label, "model": f.model, **({} if at is None else {"at": at}), "params": f.parameters,
            "solve": dict(f.means), "timing": times, "unit_ms": f.price._asdict(), "floor_ms": f.floor_ms,
            "own_ms": f.own_ms, "val_acc": f.val_acc,
            "memory": {f"{k}_mib": f.mib(k) for k in f.memory} | {f"{k}_mib_readings": f.memory[k] for k in f.memory},
            "flops": {"step": f.flops}}  # fmt: skip


def cells(f: Figures) -> list[str]:
    train, mib = f.median("train"), f.mib("train")
    speed = f.flops and f.flops / train / 1e6
    return [f.label, f"{f.parameters:,}", number(train), number(f.median("backward")), number(f.median("predict")),
            f"{f.f_calls:.1f}/{f.means['nfe_backward']:.1f}",
            number(f.means["residual"], 2) if f.ends_at_residual else "–",
            f"{1 - f.means['converged_fraction']:.0%}" if f.ends_at_residual else "–", share(f.val_acc),
            f"{train / f.floor_ms:.2f}" if f.priced else "–", number(mib), number(speed)]  # fmt: skip


def line(c: Comparison) -> ratios.Line:
    value = c.ratio.value if c.ratio.value == c.ratio.value else None
    low, high = (c.ratio.low, c.ratio.high) if c.ratio.n >= clock.MIN_ROUNDS else (None, None)
    return ratios.Line(c.id, c.slower.label, c.faster.label, c.measure, value, low, high, c.ratio.verdict, c.paper,
                       c.caveats)  # fmt: skip


def show(rows: Sequence[Row], stages: Sequence[Stage], failed: Mapping[str, str], rec: dict[str, Any],
         folder: Path) -> None:  # fmt: skip
    head = circumstances(rows[0], stages, rec)
    for label, text in head:
        say(label, text)
    read = not ratios.for_program(rec)
    markdown = []
    for stage in stages:
        markdown += _stage(stage, rows[0].recipe.batch, failed, read)
    if not stages and read:
        tables.show(COLUMNS, _failures(failed))
    say("", "×floor: a step's time over (calls of f and VJPs × the price of one alone) · capped: solves not converged")
    for label, error in failed.items():
        say("failed", f"{label}: {error}")
    found = [(stage, c) for stage in stages for c in stage.found]
    if enough := [(s, c) for s, c in found if c.ratio.n >= clock.MIN_ROUNDS]:
        fine = [(s, c) for s, c in enough if not ratios.stuck(c.caveats)]
        s, c = min(fine or enough, key=lambda pair: (pair[1].measure != "train", -(pair[0].at or 0)))
        why = f"no headline: {'; '.join(ratios.stuck(c.caveats))}"
        say("say", f'"{ratios.sentence(line(c))}{beside(s, c)}"' if fine else why)
    (folder / "table.md").write_text("\n".join([*markdown, *(f"- {label}: {text}" for label, text in head)]) + "\n")
    batch = rows[0].recipe.batch
    bars = [bar for s, c in found if c.measure in ("train", "backward", "predict") for bar in line(c).bars(_point(s))]
    if bars:
        plots.ratio_bars([folder / "speedup.svg"], plots.WIDE, bars, f"{rec['data']['name']}, batch {batch}, "
                           f"{stages[0].rounds} paired rounds, {rec['environment'].get('cpu')}")  # fmt: skip
    named = {"rows" if s.at is None else f"rows_{s.at}": [COLUMNS, [cells(f) for f in s.figures]] for s in stages}
    columns = ["step", *ratios.COLUMNS]
    rec["tables"] = {**named, "ratios": [columns, [[s.at or 0, *ratios.cells(line(c))] for s, c in found]]}
    rec["scalars"] = [[s.at or 0, ratios.scalars([line(c) for c in s.found])] for s in stages]


def beside(stage: Stage, c: Comparison) -> str:
    """What has to stand beside a time: the accuracy there, and when."""
    acc = {f.label: f.val_acc for f in (c.faster, c.slower)}
    known = [acc[label] for label in line(c).order if acc[label] is not None]
    accuracy = f"; validation accuracy {' against '.join(map(share, known))}" if len(known) == 2 else ""
    return accuracy + ("" if stage.at is None else f", step {stage.at:,}")


def _point(stage: Stage) -> str:
    return "" if stage.at is None else f", step {stage.at:,}"


def circumstances(first: Row, stages: Sequence[Stage], rec: dict[str, Any]) -> list[tuple[str, str]]:
    env, job = rec["environment"], first.job
    rounds = " + ".join(f"{s.rounds} rounds of {count(s.steps, 'step')}" for s in stages) or "no round"
    ended = " · INTERRUPTED" if any(s.interrupted for s in stages) else ""
    names = [f.label for f in stages[0].figures] if stages else []
    what = f"{job.table.name}: {job.table.title}" if job.table else " · ".join(names)
    how = f"protocol {rec['protocol']}, batch {first.recipe.batch}, {job.config['gpu']['dtype']}"
    spent = duration(sum(s.seconds for s in stages))
    quiet = {True: "nothing else running", False: "NOT alone on the machine", None: "load unknown"}[env["alone"]]
    threads = f"{first.device.threads} thread{'s' * (first.device.threads > 1)}"
    where = [str(env["gpu"] or env["cpu"]), threads, f"torch {env['torch']}", f"allocator {env['allocator']}", quiet]
    if peak := env.get("convolution_gflops"):
        where.insert(2, f"convolution {peak:,.0f} GFLOP/s")
    lines = [("bench", f"{what}\n{how}; same data and threads, interleaved, {rounds}, {spent}{ended}"),
             ("machine", " · ".join(where))]  # fmt: skip
    if unsettled := sorted({label for s in stages for label in s.unsettled}):
        lines.append(("warm", f"{', '.join(unsettled)} not settled within 2 % after 10 passes"))
    return lines


def _failures(failed: Mapping[str, str]) -> list[list[str]]:
    return [[label, *["failed"] * (len(COLUMNS) - 1)] for label in failed]


def _stage(stage: Stage, batch: int, failed: Mapping[str, str], read: bool) -> list[str]:
    """Print the rows and ratios at one point of training, if by somebody they are `read`; returns them as Markdown."""
    rows = [*(cells(f) for f in stage.figures), *_failures(failed)]
    lines = [ratios.cells(line(c)) for c in stage.found]
    point = f"batch {batch}, n = {stage.rounds}{_point(stage)}"
    if read:
        if stage.at is not None:
            say("step", f"{stage.at:,}")
        tables.show(COLUMNS, rows, spare=SPARE)
        if lines:
            ratios.show(lines, f"paired by round, 95 %, {point}")
    reasons, told = [], set()
    for c in stage.found:  # a pair is explained once, by its training time
        pair = frozenset((c.slower.label, c.faster.label))
        if c.measure == "train" and pair not in told and c.ratio.verdict in ("faster", "slower") and c.why():
            reasons.append(c.why())
            told.add(pair)
    for reason in reasons:
        say("why", reason)
    said = [f"- {ratios.sentence(line(c))}{beside(stage, c)}" for c in stage.found]
    heading = [] if stage.at is None else [f"## Step {stage.at:,}", ""]
    return [*heading, tables.markdown(COLUMNS, rows), f"Batch {batch}, {stage.rounds} paired rounds.", "", *said,
            *(f"- why: {reason}" for reason in reasons), ""]  # fmt: skip
