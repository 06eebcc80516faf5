"""The measured tables of docs/faithfulness.md: what the papers' starts, stops and gradients do on small runs.

usage: python scripts/faithfulness.py [start|equilibrium|head|zero|converged|gradient ...] [--homo-steps 300]
                                      [--mdeq-steps 500] [--dense-steps 1000] [--images 1000] [--rounds 40] [--data DIR]
                                      [--page FILE] [--results DIR] [--runs DIR] [--only REGEX] [key=value ...]

Rewrites the tables between the page's marks, and keeps the figures, each with its machine, as
results/faithfulness.json. Sections share their models, whose weights at the first step, at a fifth and at the last are
kept under --runs and not trained again; times are taken anew. --only: of `converged` the rows whose labels match, the
others stay. --render only writes the page, from that file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import page
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from implicit_bench import clock, config, machine, record
from implicit_bench.bench.rows import Row
from implicit_bench.core import EndTime, FixedPoint, Residual, Status, solve
from implicit_bench.evaluation.look import look
from implicit_bench.models import Alternating, Stem, Zero
from implicit_bench.report import tables
from implicit_bench.terminal import duration, number, say, share
from implicit_bench.train import Tally
from implicit_bench.train.evaluate import accuracy_within, budgets, evaluate

Rows = list[dict[str, Any]]
Weights = dict[str, Any]
SKIPS = ("skip_deq", "skip_reg_deq", "skip_cdeq", "skip_reg_cdeq")
HOMO = {"shared": [], "alternating": ["init=alternating", "penalty=[none]"], "zero": ["init=zero", "penalty=[none]"]}
BATCHES = 4  # of training images, on which a solve is looked at


def homo(start: str, args: argparse.Namespace) -> list[str]:
    return ["experiment=homo_mnist", *HOMO[start], "recipe.batch=32", f"recipe.max_steps={args.homo_steps}"]


def mdeq(model: str, args: argparse.Namespace, protocol: str = "sound") -> list[str]:
    best = ["protocol.best=true"] if protocol == "faithful" and "cdeq" not in model else []  # as table=mdeq_fashion has
    return ["experiment=mdeq_fashion", f"model={model}", f"protocol={protocol}", *best, "recipe.batch=16",
            f"recipe.max_steps={args.mdeq_steps}"]  # fmt: skip


def row_of(words: list[str], args: argparse.Namespace, label: str = "") -> Row:
    """The model, its step and its data. A step that is not finite is left out and counted, not the end of all."""
    always = ["gpu=cpu", f"gpu.threads={args.threads}", "logger=none", "recipe.on_nonfinite=skip_step"]
    job = config.compose("train", [*always, *words, *args.common, f"paths.data={args.data}"])
    device = config.make(job.config["gpu"], "gpu")
    device.begin()
    data = config.make(job.config["dataset"], "dataset").load(args.data, device.torch, fetch=partial(say, "data"))
    return Row(label, job, data, device)


def stream(row: Row) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches on which `train` trains."""
    train, B, seed = row.data.train, row.recipe.batch, row.job.config["seed"]
    for epoch in itertools.count(1):
        order = row.data.order(len(train), seed, epoch)
        yield from row.data.batches(train, B, order, 0, row.recipe.steps_an_epoch(len(train)), augment=(seed, epoch))


def trained(words: list[str], args: argparse.Namespace) -> tuple[Row, dict[int, Weights]]:
    """The model with its last weights, and those at step 0, a fifth of the steps and the last, of one schedule."""
    row = row_of(words, args)
    total = row.recipe.max_steps
    file = args.runs / f"{row.name}-{record.run_id(row.job.config)}.pt"
    if file.exists():
        weights, row.step.nonfinite = torch.load(file, weights_only=True)
    else:
        began, weights = time.perf_counter(), {0: copy.deepcopy(row.model.state_dict())}
        for k, (x, y) in zip(range(1, total + 1), stream(row)):
            row.step(row.device.images(x), y)
            if k in (total // 5, total):
                weights[k] = copy.deepcopy(row.model.state_dict())
        args.runs.mkdir(parents=True, exist_ok=True)
        torch.save((weights, row.step.nonfinite), file)
        say("trained", f"{' '.join(words)} · {duration(time.perf_counter() - began)}", err=True)
    row.model.load_state_dict(weights[total])
    return row, weights


def solves(row: Row, weights: Weights) -> dict[str, Any]:
    """What training steps report at these weights, on the same batches for every model: a mean a batch or a sample."""
    tally, residuals = Tally(), []
    row.model.train()
    for k in range(BATCHES):
        row.model.load_state_dict(weights)  # each step moves them
        torch.manual_seed(k)  # dropout
        x, y = row.batch(k)
        task, out = row.step(x, y)
        tally.add(task, y, out, row.step.start_calls)
        residuals.append(out.layer.solution.stats.residual)
    m = tally.means()
    residual = torch.cat(residuals).nan_to_num(math.inf).median()
    return {"converged": m.get("converged_fraction"), "residual": float(residual), "f": m["nfe_forward"],
            "vjps": m["nfe_backward"], "gmres": m.get("linear_iterations"),
            "status": tally.status_counts()}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- sections


class Constant(nn.Module):
    """z0 = one given state for all images."""

    calls = 0

    def __init__(self, z: Tensor):
        super().__init__()
        self.z = z

    def forward(self, x: Tensor, f: Any) -> Tensor:
        return self.z.expand(len(x), -1)


def start(args: argparse.Namespace) -> Rows:
    rows = []
    for name in HOMO:
        row, _ = trained(homo(name, args), args)
        model, layer = row.model.eval(), row.model.layer
        with torch.no_grad():
            some = row.data.batches(row.data.train, 250, last=max(1, args.images // 500))
            mean = torch.cat([model(row.device.images(x)).layer.z for x, _ in some]).mean(0)
        starts = {"its own": layer.init, "alternating": Alternating(layer), "zero": Zero(layer),
                  "mean z(1)": Constant(mean), "stem": Stem(layer)}  # fmt: skip
        found = {}
        for tested, layer.init in starts.items():
            batches = row.data.batches(row.data.test.first(args.images), 250)
            seen = look(model, ((row.device.images(x), y) for x, y in batches), 0, row.device)
            found[tested] = {"acc": float(seen.right.float().mean()), "nfe": float(seen.nfe.float().mean())}
        rows.append({"label": f"`{name}`", "tested": found, "skipped_steps": row.step.nonfinite})
    return rows


def rms(a: Tensor) -> Tensor:
    return a.square().mean(-1).sqrt()


def equilibrium(args: argparse.Namespace) -> Rows:
    """Ratios are medians over images. F's own scale: its last norm's gamma, of which rms F is about the rms."""
    weights = trained(homo("shared", args), args)[1][args.homo_steps]
    row = row_of([*homo("shared", args), "gpu.channels_last=false"], args)  # a GroupNorm's jvp wants it, the homotopy's
    row.model.load_state_dict(weights)
    model, layer = row.model.eval(), row.model.layer
    x, _ = next(row.data.batches(row.data.test, args.field_images))
    with torch.no_grad():
        ctx = layer.cell.begin(model.stem(row.device.images(x)))
        z = model(row.device.images(x)).layer.z
    gamma = float(rms(layer.cell.field.outer.weight.detach()))

    def F(z: Tensor, t: Tensor) -> Tensor:
        return layer.cell(z, ctx, t)

    def facts(label: str, z: Tensor, status: Tensor | None = None) -> dict[str, Any]:
        with torch.no_grad():
            size, of = rms(F(z, z.new_zeros(len(z)))), rms(z)
        names = [] if status is None else [Status(int(s)).name for s in status]
        return {"label": label, "of_z": float((size / of).median()), "of_gamma": float((size / gamma).median()),
                "least_of_gamma": float((size / gamma).min()), "z": float(of.median()),
                "status": {name: names.count(name) for name in sorted(set(names))}}  # fmt: skip

    rows, at, one = [facts("t = 1", z)], z, z
    for t0, t in itertools.pairwise((1, 2, 5, 10)):
        with torch.no_grad():
            at = solve(F, at, solver=layer.solver, stop=EndTime(t - t0), reduce=layer.reduce).value
        rows.append(facts(f"t = {t}", at))
    z = one.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([z], max_iter=args.iterations, history_size=20, line_search_fn="strong_wolfe",
                              tolerance_grad=0, tolerance_change=0)  # fmt: skip

    def square() -> Tensor:
        lbfgs.zero_grad()
        loss = F(z, z.new_zeros(len(z))).square().mean(-1).sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        return loss

    lbfgs.step(square)
    rows.append(facts(f"least \\|F\\| from z(1), {args.iterations} L-BFGS iterations", z.detach()))
    node = config.compose("train", ["solver=homotopy", "solver.linear_max_iter=20"]).config["solver"]
    homotopy = config.make(node, "solver")
    for label, begin in (("z(1)", one), ("zero", torch.zeros_like(one))):
        with torch.no_grad():
            end = solve(FixedPoint(lambda z, t: z + F(z, t)), begin, solver=homotopy, reduce=layer.reduce,
                        stop=Residual(1e-2, max_steps=args.path_steps))  # fmt: skip
        rows.append(facts(f"`solver=homotopy` from {label}", end.value, end.status))
    return rows


def head(args: argparse.Namespace) -> Rows:
    def dense(model: str) -> list[str]:
        return ["experiment=cdeq_mnist", f"model={model}", f"recipe.max_steps={args.dense_steps}"]

    rows = []
    for name, words in (("MDEQ, Fashion-MNIST", partial(mdeq, args=args)), ("dense, MNIST", dense)):
        for model in SKIPS:
            row, _ = trained(words(model), args)
            seen = row.data, row.data.test.first(args.images), row.recipe.eval_batch, row.device
            test = evaluate(row.model, *seen)
            within = accuracy_within(row.model, *seen, budgets(row.model))
            rows.append({"label": f"{name}: `{model}`", "start_acc": within[0], "test_acc": test["acc"],
                         "test_acc_within": {str(k): v for k, v in within.items()}, "f": test["nfe_forward"],
                         "converged": test.get("converged_fraction"), "skipped_steps": row.step.nonfinite})  # fmt: skip
    return rows


STILL = ["recipe.lr=1e-7", "recipe.lr_min=0", "protocol.start_lr=1e-9"]  # weights stay while steps are timed


def zero(args: argparse.Namespace) -> Rows:
    """f(0, x) starts on the weights trained from zero; HomoODE's starts each on their own."""
    rows = []
    groups = {
        **{m: {"zero": mdeq(m, args), "f_zero": [*mdeq(m, args), "init=f_zero"]} for m in ("deq", "cdeq")},
        "homo_ode": {s: homo(s, args) for s in ("zero", "alternating", "shared")},
    }
    for model, words in groups.items():
        kept = {s: trained(words[s if model == "homo_ode" else "zero"], args)[1] for s in words}
        for at in (0, max(kept["zero"])):
            timed = {s: row_of([*words[s], *STILL], args, s) for s in words}
            found = {s: solves(row, kept[s][at]) for s, row in timed.items()}
            for s, row in timed.items():
                row.model.load_state_dict(kept[s][at])
                row.measure(1)  # caches and allocator
            samples = clock.interleave({s: partial(row.measure, 1) for s, row in timed.items()}, rounds=args.rounds)
            if samples.failed or samples.interrupted:
                sys.exit(f"zero: {samples.failed or 'interrupted'}")
            times = {s: samples.rows[s]["train"] for s in words}
            for s in words:
                r = None if s == "zero" else clock.ratio(times["zero"], times[s])
                rows.append({"label": f"`{model}`, `{s}`, step {at}", **found[s], "train_ms": median(times[s]),
                             "speed_up": r and {"value": r.value, "low": r.low, "high": r.high, "n": r.n}})  # fmt: skip
    return rows


def converged(args: argparse.Namespace) -> Rows:
    rows = []
    models = [*itertools.product(("sound", "faithful"), ("deq", "cdeq", *SKIPS))]
    for protocol, model in models:
        if re.search(args.only, label := f"`{protocol}`, `{model}`"):
            row, kept = trained(mdeq(model, args, protocol), args)
            rows.append({"label": label, "skipped_steps": row.step.nonfinite,
                         "at": {str(k): solves(row, w) for k, w in kept.items()}})  # fmt: skip
    for protocol, model in models:
        if not re.search(args.only, label := f"CIFAR-10: `{protocol}`, `{model}`"):
            continue
        words = ["experiment=cdeq_cifar10_small", f"model={model}", f"protocol={protocol}", "recipe.batch=8"]
        row = row_of(words, args)
        rows.append({"label": label, "at": {"0": solves(row, copy.deepcopy(row.model.state_dict()))}})
    return rows


class Gradient(NamedTuple):
    whole: Tensor
    stem: Tensor
    out: Any  # models.LayerOutput


def gradient_of(words: list[str], weights: Weights, args: argparse.Namespace) -> Gradient:
    """Of the first batch's task loss, in float64 and with one dropout mask for all; what gets none has zeros."""
    row = row_of([*words, "gpu.dtype=float64"], args)
    row.model.load_state_dict(weights)
    x, y = row.batch(0)
    torch.manual_seed(0)
    out = row.model(x)
    nnf.cross_entropy(out.logits, y).backward()
    parts = [torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in part.parameters()])
             for part in (row.model, row.model.stem)]  # fmt: skip
    return Gradient(*parts, out.layer)


def against(got: Gradient, exact: Gradient) -> dict[str, float]:
    found = {}
    for part in ("whole", "stem"):
        a, b = getattr(got, part), getattr(exact, part)
        found |= {f"{part}_error": float((a - b).norm() / b.norm()),
                  f"{part}_cosine": float(nnf.cosine_similarity(a, b, dim=0))}  # fmt: skip
    return found


RULES = {
    "`adjoint=ift`": [],
    "`adjoint.x_gradient=one_step`": ["adjoint.x_gradient=one_step"],
    "GMRES to .05 + .05 \\|b\\|, 20": ["adjoint.rtol=.05", "adjoint.atol=.05", "adjoint.max_iter=20"],
    "GMRES to .01 + .01 \\|b\\|, 15": ["adjoint.rtol=.01", "adjoint.atol=.01", "adjoint.max_iter=15"],
    "GMRES to .05 + .05 \\|b\\|, 20, `one_step`": ["adjoint.rtol=.05", "adjoint.atol=.05", "adjoint.max_iter=20",
                                                  "adjoint.x_gradient=one_step"],
    "`adjoint=jfb`": ["adjoint=jfb"],
}  # fmt: skip
BACKS = {"`adjoint=unroll`": [], "`adjoint=backsolve`": ["adjoint=backsolve"],
         "`adjoint=backsolve adjoint.frozen=true`": ["adjoint=backsolve", "adjoint.frozen=true"]}  # fmt: skip


def gradient(args: argparse.Namespace) -> Rows:
    """Against the exact rule, and against backpropagation through the very solve, which needs no equilibrium.

    Exact: cdeq at the z where its own solve ended, as an MDEQ may have no fixed point that can be found, by a tight
    linear solve; homo_ode by unrolling a tight solve, with rules at that tolerance too.
    """
    rows = []
    few = [*homo("shared", args), "recipe.batch=8"]  # every state of a tight solve is kept
    tight = ["solver.rtol=1e-6", "solver.atol=1e-6", "stop.max_steps=10000"]
    for model, words, rules, fine, exactly, unroll, of in (
        ("cdeq", mdeq("cdeq", args), RULES, [], ["adjoint.rtol=1e-8", "adjoint.max_iter=300"],
         ["adjoint=unroll", "adjoint.checkpoint=true"], mdeq("cdeq", args)),
        ("homo_ode", few, BACKS, tight, [], ["adjoint=unroll"], homo("shared", args)),
    ):  # fmt: skip
        kept = trained(of, args)[1]
        for at in (0, max(kept)):
            exact = gradient_of([*words, *fine, *exactly], kept[at], args)
            through = gradient_of([*words, *unroll], kept[at], args)
            for label, rule in rules.items():
                own = gradient_of([*words, *rule], kept[at], args)
                got = gradient_of([*words, *fine, *rule], kept[at], args) if fine else own
                log = own.out.backward
                linear = (log.iterations, log.rhs_norm) if model == "cdeq" else (None, None)
                most = [None if a is None else float(a.max()) for a in linear]
                rows.append({"label": f"`{model}`, step {at}: {label}", **against(got, exact),
                             "as_set": against(own, through), "gmres": most[0], "rhs_norm": most[1], "vjps": log.vjps,
                             "residual": float(own.out.solution.stats.residual.max())})  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- page


def tested(name: str, row: dict[str, Any]) -> str:
    return f"{share(row['tested'][name]['acc'])} · {number(row['tested'][name]['nfe'])}"


def each(key: str, row: dict[str, Any]) -> str:
    return " / ".join(figure(key, at) for at in row["at"].values())


def figure(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "–"
    if key.endswith("cosine"):
        return f"{value:.3f}"
    return share(value) if key.endswith("acc") else f"{value:.0%}" if key == "converged" else number(value, 2)


def lost(row: dict[str, Any]) -> str:
    counts = [at["status"] for at in row["at"].values()]
    return " / ".join(f"{each.get('NONFINITE', 0) / sum(each.values()):.0%}" for each in counts)


def times(row: dict[str, Any]) -> str:
    r = row["speed_up"]
    if r is None:
        return "1"
    interval = "" if r["n"] < clock.MIN_ROUNDS else f" [{r['low']:.2f}, {r['high']:.2f}]"
    return f"{r['value']:.2f}{interval}"


def columns(shown: Callable[[str, dict[str, Any]], str], **keys: str) -> dict[str, Callable[[dict[str, Any]], str]]:
    return {name.replace("_", " "): partial(shown, key) for name, key in keys.items()}


class Section(NamedTuple):
    measure: Callable[[argparse.Namespace], Rows]
    first: str  # the name of the first column
    columns: dict[str, Callable[[dict[str, Any]], str]]


SOLVED = {"converged": "converged", "residual": "residual", "f": "f", "VJPs": "vjps", "GMRES": "gmres"}
SECTIONS = {
    "start": Section(start, "trained from", {name: partial(tested, name) for name in (
        "its own", "alternating", "zero", "mean z(1)", "stem")}),
    "equilibrium": Section(equilibrium, "z", {
        "rms F / rms z": partial(figure, "of_z"), "rms F / rms gamma": partial(figure, "of_gamma"),
        "its least": partial(figure, "least_of_gamma"), "rms z": partial(figure, "z"),
        "ended": partial(figure, "status")}),
    "head": Section(head, "model", {
        "start alone": partial(figure, "start_acc"),
        **{name: lambda r, k=k: share(r["test_acc_within"].get(k)) for name, k in (("1 evaluation", "1"), ("2", "2"))},
        "whole solve": partial(figure, "test_acc"), "evaluations": partial(figure, "f"),
        "converged": partial(figure, "converged")}),
    "zero": Section(zero, "model, start, weights", {
        **columns(figure, **SOLVED), "ms a step": partial(figure, "train_ms"), "× as fast as from zero": times}),
    "converged": Section(converged, "protocol, model", {**columns(each, **SOLVED), "not finite": lost}),
    "gradient": Section(gradient, "gradient", {
        **columns(figure, error="whole_error", cosine="whole_cosine"),
        **columns(figure, stem_error="stem_error", stem_cosine="stem_cosine"),
        "error to unroll": lambda r: figure("whole_error", r["as_set"]),
        "stem error to unroll": lambda r: figure("stem_error", r["as_set"]),
        "GMRES": partial(figure, "gmres"), "\\|b\\|": partial(figure, "rhs_norm"),
        "residual": partial(figure, "residual")}),
}  # fmt: skip
SIZES = ("homo_steps", "mdeq_steps", "dense_steps", "images", "field_images", "iterations", "path_steps", "rounds",
         "threads")  # fmt: skip
USED = {"start": ("homo_steps", "images"), "head": ("mdeq_steps", "dense_steps", "images"),
        "converged": ("mdeq_steps",), "equilibrium": ("homo_steps", "field_images", "iterations", "path_steps"),
        "zero": ("homo_steps", "mdeq_steps", "rounds", "threads"),
        "gradient": ("homo_steps", "mdeq_steps")}  # fmt: skip


def table(name: str, found: dict[str, Any]) -> str:
    section, how = SECTIONS[name], found["settings"]
    sizes = [f"{key.replace('_', ' ')} {how[key]:,}" for key in USED[name]]
    said = "; ".join([*sizes, *how["words"], found["hardware"], f"torch {found['torch']}"]) + "."
    if name == "zero" and found["alone"] is False:
        said += " Something else was at work: the times do not count."
    for machine_of in sorted({row["hardware"] for row in found["rows"] if "hardware" in row}):
        labels = [row["label"] for row in found["rows"] if row.get("hardware") == machine_of]
        said += f" On {machine_of}: {'; '.join(labels)}."
    if bad := [row["label"] for row in found["rows"] if row.get("skipped_steps")]:
        said += f" Steps that were not finite were left out in the training of {', '.join(bad)}."
    cells = [[row["label"], *(cell(row) for cell in section.columns.values())] for row in found["rows"]]
    return textwrap.fill(said, 120) + "\n\n" + tables.markdown([section.first, *section.columns], cells)


def render(text: str, figures: dict[str, Any]) -> str:
    """The page with its tables, each under the sizes that it was measured at."""
    return page.put(text, {name: f"{table(name, figures[name])}\n" if name in figures else "To be measured.\n"
                           for name in SECTIONS})  # fmt: skip


def main() -> int:
    parser = page.parser(__doc__, "faithfulness", dict(zip(SIZES, (300, 500, 1000, 1000, 64, 200, 40, 40, 2))))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", default="", metavar="REGEX")
    if (args := page.asked(parser, [*SECTIONS], render)) is None:
        return 0
    if args.only and args.names != ["converged"]:
        parser.error(f"--only={args.only} chooses among the rows of converged; name that section alone")
    gpu = config.compose("train", ["gpu=cpu", f"gpu.threads={args.threads}"]).config["gpu"]
    environment = config.make(gpu, "gpu").environment()
    file = args.results / "faithfulness.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        began, alone = time.perf_counter(), machine.Alone()
        rows = SECTIONS[name].measure(args)
        settings = {**{key: getattr(args, key) for key in SIZES}, "words": args.common}
        found = {"hardware": environment["hardware"], "torch": environment["torch"], "alone": alone.read(),
                 "settings": settings, "rows": rows}  # fmt: skip
        if args.only:
            anew = {row["label"]: {**row, "hardware": environment["hardware"]} for row in rows}
            found = {**figures[name], "rows": [anew.get(row["label"], row) for row in figures[name]["rows"]]}
        figures[name] = record.plain(found)
        file.write_text(json.dumps(figures, indent=1) + "\n")  # after each: the next may take long
        args.page.write_text(render(args.page.read_text(), figures))
        say("rows", f"{name}: {len(rows)} in {duration(time.perf_counter() - began)}", err=True)
    say("wrote", f"{file} · {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
