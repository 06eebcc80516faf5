"""The figures of docs/choosing.md: solvers, adjoints, tolerances and starts, each trained on digits, then timed.

usage: python scripts/choosing.py [solver|adjoint|tolerance|start ...] [--epochs 10] [--seeds 3] [--rounds 40]
                                  [--page FILE] [--results DIR] [--runs DIR] [key=value ...]

Rewrites the tables between the page's marks, and keeps the figures as results/<hardware>/choosing.json. Training runs
under --runs that are done are not made again; times are taken anew. --render only writes the page, from that file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import page
import torch
from torch.nn import functional as nnf

from implicit_bench import clock, config, machine
from implicit_bench.bench.rows import make_rows, steps_a_round
from implicit_bench.report import tables
from implicit_bench.terminal import duration, number, say, share
from implicit_bench.train.command import train

ALWAYS = ["dataset=digits", "gpu=cpu", "gpu.threads=1", "logger=none"]
TIGHT = ["stop.tol=1e-12", "stop.max_steps=1000"]


class Section(NamedTuple):
    first: str  # the name of the first column
    rows: dict[str, list[str]]
    columns: dict[str, Callable[[dict[str, Any]], str]]


def accuracy(row: dict[str, Any]) -> str:
    values = row["test_acc"]
    return share(mean(values)) + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def times(row: dict[str, Any]) -> str:
    """How many times as fast as the first row."""
    r = row["speed_up"]
    if r is None:
        return "1"
    interval = f" [{r['low']:.2f}, {r['high']:.2f}]" if r["low"] == r["low"] else ""
    return f"{r['value']:.2f}{interval}"


SOLVED: dict[str, Callable[[dict[str, Any]], str]] = {
    "evaluations a sample": lambda r: number(r["nfe_sample"]),
    "residual": lambda r: f"{r['residual']:.1e}",
    "converged": lambda r: f"{r['converged_fraction']:.1%}",
    "test accuracy": accuracy,
}
TIMED: dict[str, Callable[[dict[str, Any]], str]] = {
    "f / VJPs a step": lambda r: f"{r['f_calls']:.1f} / {r['vjps']:.1f}",
    "ms a step": lambda r: number(r["train_ms"]),
    "× as fast as the first": times,
}
LEARNED: dict[str, Callable[[dict[str, Any]], str]] = {
    "test accuracy": accuracy,
    "VJPs a step": lambda r: f"{r['vjps']:.1f}",
    "ms backward": lambda r: number(r["backward_ms"]),
    "ms a step": lambda r: number(r["train_ms"]),
    "gradient error": lambda r: f"{r['error_as_set']:.1e}",
    "at an exact z*": lambda r: f"{r['error']:.1e}",
    "KiB kept": lambda r: f"{r['kept_kib']:,.0f}",
}
GUESSED: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy of the start": lambda r: share(r["within"]["0"]),
    "1 evaluation": lambda r: share(r["within"]["1"]),
    "2": lambda r: share(r["within"]["2"]),
    **SOLVED,
}
ADJOINTS = {"ift, gmres": "ift", "ift, anderson": "ift adjoint.linear=anderson", "phantom": "phantom", "jfb": "jfb",
            "unroll": "unroll", "unroll, picard": "unroll solver=picard"}  # fmt: skip
STARTS = {"zero": "deq", "f_zero": "skip_reg_deq", "skip_net": "skip_deq"}
SOLVERS = ("broyden", "anderson", "picard", "vcab3", "tsit5")
SECTIONS = {
    "solver": Section("solver", {f"`{s}`": [f"solver={s}"] for s in SOLVERS}, {**SOLVED, **TIMED}),
    "adjoint": Section("adjoint", {f"`{k}`": f"adjoint={v}".split() for k, v in ADJOINTS.items()}, LEARNED),
    "tolerance": Section("`stop.tol`", {f"1e-{k}": [f"stop.tol=1e-{k}"] for k in (1, 2, 3, 4, 5)}, {**SOLVED, **TIMED}),
    "start": Section("start", {f"`{k}`": [f"model={v}"] for k, v in STARTS.items()}, {**GUESSED, **TIMED}),
}  # fmt: skip


@contextlib.contextmanager
def quietly():
    """What the commands print goes nowhere, unless they fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise


def trained(words: list[str], seeds: int, runs: Path) -> tuple[dict[str, Any], Path]:
    """Means over the seeds, of the accuracy every value; and the first seed's folder."""
    found, folders = [], []
    for seed in range(seeds):
        given = [*words, f"seed={seed}", f"paths.runs={runs}"]
        with quietly():
            outcome = train(config.compose("train", given), given)
        if outcome.exit_code:
            sys.exit(f"{' '.join(given)}: {outcome.record['error']}")
        found.append(outcome.record)
        folders.append(outcome.folder)
    test = [rec["solve"]["test"] for rec in found]
    within = [rec["metrics"]["test_acc_within"] for rec in found]
    return {"test_acc": [rec["metrics"]["test_acc"] for rec in found],
            **{k: mean(t[k] for t in test) for k in ("nfe_sample", "residual", "converged_fraction")},
            "within": {k: mean(w[k] for w in within) for k in within[0]}}, folders[0]  # fmt: skip


def benched(rows: list[list[str]], folders: list[Path], rounds: int) -> tuple[list[dict[str, Any]], bool | None]:
    """Times and counts of training steps at each row's trained weights, interleaved; whether nothing else was at work.

    The learning rate is so small that the weights stay what they are.
    """
    jobs = [config.compose("train", [*words, "recipe.lr=1e-6", "recipe.lr_min=0"]) for words in rows]
    devices = [config.make(job.config["gpu"], "gpu") for job in jobs]
    first = jobs[0].config
    data = config.make(first["dataset"], "dataset").load(Path(first["paths"]["data"]), devices[0].torch)
    timed = make_rows(jobs, [str(k) for k in range(len(jobs))], data, devices)
    for row, folder in zip(timed, folders):
        row.model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    alone = machine.Alone()
    for row in timed:
        row.warm_up()
    steps = steps_a_round([row.step_ms for row in timed])
    samples = clock.interleave({row.label: partial(row.measure, steps) for row in timed}, rounds=rounds)
    if samples.failed or samples.interrupted:
        sys.exit(f"bench: {samples.failed or 'interrupted'}")
    figures = [row.figures(samples.rows[row.label], (0.0, 0.0), {}) for row in timed]
    slower, *others = (f.times["train"] for f in figures)
    ratios = [None, *(clock.ratio(slower, other) for other in others)]
    return [{"train_ms": f.median("train"), "backward_ms": f.median("backward"), "f_calls": f.f_calls,
             "vjps": f.means["nfe_backward"], "speed_up": r and {"value": r.value, "low": r.low, "high": r.high}}
            for f, r in zip(figures, ratios)], alone.read()  # fmt: skip


def gradients(words: list[str], weights: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """The gradient of one batch's loss as one vector, and bytes that the forward keeps for the backward."""
    job = config.compose("train", words)
    parts = config.build(job.config)
    model = parts.model.to(dtype)
    model.load_state_dict(weights)
    data = parts.dataset.load(Path(job.config["paths"]["data"]), torch.device("cpu"))
    x, y = data.batch(data.train, torch.arange(parts.recipe.batch))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nnf.cross_entropy(model(x.to(dtype)).logits, y)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), sum(kept.values())


def judged(rows: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """Each adjoint's gradient against the exact one, at the same weights."""
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    exact, _ = gradients([*rows[0], *TIGHT, "adjoint.rtol=1e-12", "adjoint.max_iter=200"], weights, torch.float64)

    def error(words: list[str]) -> float:
        got, _ = gradients(words, weights, torch.float64)
        return float((got - exact).norm() / exact.norm())

    return [{"error_as_set": error(words), "error": error([*words, *TIGHT]),
             "kept_kib": gradients(words, weights, torch.float32)[1] / 1024} for words in rows]  # fmt: skip


def measure(name: str, common: list[str], args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool | None]:
    section, began = SECTIONS[name], time.perf_counter()
    model = [] if name == "start" else ["model=deq"]
    rows = [[*ALWAYS, *model, *words, *common] for words in section.rows.values()]
    learned, folders = zip(*(trained(words, args.seeds, args.runs) for words in rows))
    figures, alone = benched(rows, list(folders), args.rounds)
    more = judged(rows, folders[0]) if name == "adjoint" else [{}] * len(rows)
    say("rows", f"{name}: {len(rows)} in {duration(time.perf_counter() - began)}", err=True)
    return [{"label": label, "words": words, **a, **b, **c}
            for (label, words), a, b, c in zip(section.rows.items(), learned, figures, more)], alone  # fmt: skip


def table(name: str, rows: list[dict[str, Any]]) -> str:
    section = SECTIONS[name]
    cells = [[row["label"], *(cell(row) for cell in section.columns.values())] for row in rows]
    return tables.markdown([section.first, *section.columns], cells)


def circumstances(figures: dict[str, Any]) -> str:
    env, how = figures["environment"], figures["settings"]
    text = (
        f"Digits, dense network, batch 32; epochs: {how['epochs']}, seeds: {how['seeds']}. Times over {how['rounds']} "
        f"interleaved rounds at the trained weights, one thread, {env['hardware']}, torch {env['torch']}."
    )
    busy = sorted(name for name, alone in figures["alone"].items() if alone is False)
    if busy:
        text += f" Something else was at work ({', '.join(busy)}): those times do not count."
    if how["rounds"] < 40:
        text += " Too few rounds for an interval."
    return textwrap.fill(text, 120) + "\n"


def render(text: str, figures: dict[str, Any]) -> str:
    """The page with its tables, and what is said of how they were measured, put between their marks."""
    parts = {"how": circumstances(figures), **{name: table(name, rows) for name, rows in figures["tables"].items()}}
    return page.put(text, parts)


def main() -> int:
    parser = page.parser(__doc__, "choosing", {"epochs": 10, "seeds": 3, "rounds": 40})
    if (args := page.asked(parser, [*SECTIONS], render)) is None:
        return 0
    began = time.perf_counter()
    common = [f"recipe.epochs={args.epochs}", *args.common]
    environment = config.make(config.compose("train", ALWAYS).config["gpu"], "gpu").environment()
    folder = args.results / machine.folder_name(environment["hardware"])
    file = folder / "choosing.json"
    old = json.loads(file.read_text()) if file.exists() else {"tables": {}, "alone": {}}
    figures: dict[str, Any] = {
        "environment": {k: environment[k] for k in ("hardware", "cpu", "torch", "python", "allocator")},
        "settings": {"epochs": args.epochs, "seeds": args.seeds, "rounds": args.rounds, "words": common[1:]},
        "alone": old["alone"], "tables": old["tables"],
    }  # fmt: skip
    for name in args.names:
        figures["tables"][name], figures["alone"][name] = measure(name, common, args)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    args.page.write_text(render(args.page.read_text(), figures))
    say("wrote", f"{file} · {args.page} · {duration(time.perf_counter() - began)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
