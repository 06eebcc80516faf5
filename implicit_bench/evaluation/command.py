"""`implicit-bench eval`: accuracy, solves, budgets, robustness and spectral radius of a trained run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import config, record, schema, terminal
from ..core import FixedPoint, OwnLoop, Residual, Status, solve
from ..data import Data
from ..device import Device
from ..models import Classifier
from ..report import plots, tables
from ..runs import Run, restore, trusted
from ..schema import UsageError
from ..terminal import Bar, number, progress, say, share
from .look import COLUMNS, Forward, Seen, at_tolerance, blurred, look, noisy, spectral_radius, within

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def evaluate(job: config.Composed, search: Sequence[str] = ()) -> int:
    """Print what a run's weights do on a split, and keep it as eval/SPLIT.json in the run's folder."""
    cfg = job.config
    settings = SimpleNamespace(**cfg["eval"])
    for key in ("steps", "noise", "blur"):
        if wrong := [value for value in cfg["eval"][key] if not 0 <= value < math.inf]:
            raise UsageError(f"eval.{key}={wrong[0]} must not be negative")
    if wrong := [value for value in cfg["eval"]["tolerances"] if not 0 < value < 1]:
        raise UsageError(f"eval.tolerances={wrong[0]} must lie in (0, 1), such as 1e-3")
    runs = Path(cfg["paths"]["runs"])
    run = Run(folder := record.find(runs, cfg["run"], "train"), record.read_record(folder))
    if run.record["command"] != "train":
        raise UsageError(f"{folder.name} is a {run.record['command']}'s; eval looks at trainings")
    recorded = run.config["gpu"]
    gpu = {**cfg["gpu"], "dtype": recorded["dtype"] if cfg["gpu"]["dtype"] == "float32" else cfg["gpu"]["dtype"]}
    device: Device = config.make(gpu, "gpu")
    device.begin()
    trust = cfg["allow_targets"]
    picked = _solvers(settings.solvers, trust, search) if cfg["plot"] else {}
    model = restore(run, device, trust)
    dataset = config.make(run.config["dataset"], "dataset")
    data = dataset.load(Path(cfg["paths"]["data"]), device.torch, fetch=lambda line: say("data", line, err=True))
    split = getattr(data, settings.split)
    if not len(split):
        raise UsageError(f"eval.split={settings.split} is empty in this run (dataset.val_size=0); use eval.split=test")
    split = split.first(settings.images)
    _say_changes(run, data, trust)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in data.batches(split, settings.batch or run.config["recipe"]["eval_batch"]):
            yield device.images(x), y

    found, seen = _measure(model, batches, device, settings, dataset)
    found |= {"run": record.name_of(run.folder), "split": settings.split, "n": len(split)}
    independent = model.layer.reduce.per_sample
    out = run.folder / "eval"
    out.mkdir(exist_ok=True)
    pictures = []
    if cfg["plot"]:
        x = next(iter(batches()))[0][:100]
        tol = getattr(model.layer.stop, "tol", None)
        traces = _traces(model, x, picked)
        found["residual_by_step"] = {name: trace.nanmedian(dim=1).values.tolist() for name, trace in traces.items()}
        pictures += plots.residuals(out / "residual", traces, tol, found["run"])
        if not pictures:
            progress("note", "no picture of residuals: this model does not look for a fixed point of one cell")
        if independent and isinstance(split.x, Tensor) and seen.nfe.unique().numel() > 1:
            pictures += plots.most_and_least(out / "evaluations", split.x, seen, found["run"])
        else:
            progress("note", "no picture of images by evaluations: all of them take the same, or they lie in files")
    (out / f"{settings.split}.json").write_text(json.dumps(record.plain(found), indent=1) + "\n")
    _print(found)
    written = " · ".join([f"{settings.split}.json", *(p.name for p in pictures)])
    say("wrote", f"{out}/   {written}")
    return 0


def _say_changes(run: Run, data: Data, trust: Sequence[str]) -> None:
    """What has changed since the run: it is not what was trained that would be looked at."""
    before, now = run.record["data"]["sha256"], data.sha256
    if before is not None and before != now:
        say("note", f"the data set is not the one it was trained on (sha256 {now[:10]}, then {before[:10]})", err=True)
    sources = schema.sources(trusted(run.config, trust))
    for module, was in (run.config.get("sources") or {}).items():
        if (is_now := sources.get(module)) != was:
            say("note", f"{module} has been edited since (hash {is_now}, then {was})", err=True)


def _measure(model: Classifier, batches: Batches, device: Device, settings: SimpleNamespace,
             dataset: Any) -> tuple[dict[str, Any], Seen]:  # fmt: skip
    """Every pass, with a bar over them: what was found, and what the model as trained saw."""
    layer = model.layer
    std = torch.tensor(dataset.std).view(1, -1, 1, 1).to(device.torch)
    passes: list[tuple[str, Forward]] = [("as trained", model)]
    passes += [(f"tolerance {tol:g}", at_tolerance(model, tol)) for tol in settings.tolerances]
    if isinstance(layer.stop, Residual):  # an ODE stopped early is nothing, an untied or fixed depth is itself
        passes += [(terminal.count(k, "step"), within(model, k)) for k in settings.steps]
    elif settings.steps:
        progress("note", "eval.steps is for solves that stop at a residual, and is left out here")
    passes += [(f"noise {sd:g}", noisy(model, sd, std)) for sd in settings.noise]
    passes += [(f"blur {sd:g}", blurred(model, sd)) for sd in settings.blur]
    seen = {}
    with Bar(len(passes), "passes") as bar:
        for k, (name, forward) in enumerate(passes):
            seen[name] = look(forward, batches(), layer.init.calls, device)
            bar.at(k + 1, lambda name=name: name)
            if not sys.stderr.isatty():
                progress("pass", f"{k + 1}/{len(passes)} {name}")
    clean = seen["as trained"]
    found: dict[str, Any] = {"conditions": [dict(zip(COLUMNS, s.row(name))) for name, s in seen.items()]}
    levels = torch.tensor(list(QUANTILES.values()))
    finite = clean.residual[clean.residual.isfinite()]
    found["nfe"] = dict(zip(QUANTILES, clean.nfe.float().quantile(levels).tolist()))
    found["residual"] = dict(zip(QUANTILES, finite.float().quantile(levels).tolist())) if len(finite) else None
    found["status"] = {Status(k).name: n for k, n in enumerate(clean.status.bincount().tolist()) if n}
    classes = dataset.classes
    pairs = torch.bincount(clean.y * classes + clean.predicted, minlength=classes**2)
    found["confusion"] = pairs.view(classes, classes).tolist()
    found["nfe_right"], found["nfe_wrong"] = None, None
    if layer.reduce.per_sample and clean.nfe.unique().numel() > 1:
        for key, rows in (("nfe_right", clean.right), ("nfe_wrong", ~clean.right)):
            nfe = clean.nfe[rows].float()
            found[key] = {"n": len(nfe), "mean": float(nfe.mean()), "median": float(nfe.median())} if len(nfe) else None
    found["radius"] = None
    if settings.radius_images and layer.field == "equilibrium" and not hasattr(layer.cell, "cells"):
        radius = spectral_radius(model, next(iter(batches()))[0][: settings.radius_images])
        found["radius"] = {**dict(zip(QUANTILES, radius.float().cpu().quantile(levels).tolist())), "n": len(radius)}
    return found, clean


def _solvers(names: Sequence[str], trust: Sequence[str], search: Sequence[str]) -> dict[str, Any]:
    made = {}
    jobs = [[f"solver={name}", f"allow_targets=[{','.join(trust)}]"] for name in names]
    for name, job in zip(names, config.compose_all("train", jobs, search)):
        solver = config.make(job.config["solver"], "solver")
        if isinstance(solver, OwnLoop):
            raise UsageError(f"eval.solvers={name} goes to an end time and leaves no trace of residuals; use tsit5")
        made[name] = solver
    return made


@torch.no_grad()
def _traces(model: Classifier, x: Tensor, solvers: dict[str, Any]) -> dict[str, Tensor]:
    """Relative residual after every step, (steps + 1, B) a solver, from the model's own start on the same images."""
    layer = model.layer
    if layer.field != "equilibrium" or hasattr(layer.cell, "cells"):
        return {}
    features = model.stem(x)
    ctx = layer.cell.begin(features)

    def f(z: Tensor, t: Tensor) -> Tensor:
        return layer.cell(z, ctx, t)

    start = layer.init(features, f)
    stop = Residual(tol=1e-6, max_steps=40, best=False)
    found = {}
    for name, solver in solvers.items():
        trace = solve(FixedPoint(f), start, solver=solver, stop=stop, reduce=layer.reduce, trace=True).stats.trace
        if trace is not None:
            found[name] = trace.cpu()
    return found


def _print(found: dict[str, Any]) -> None:
    if terminal.format == "json":
        print(json.dumps(record.plain(found), indent=1))
        return
    clean = found["conditions"][0]
    wrong = found["n"] - sum(row[k] for k, row in enumerate(found["confusion"]))
    say("eval", f"{found['run']} · {found['split']} split, {found['n']:,} images")
    say("answer", f"accuracy {share(clean['accuracy'])} · loss {number(clean['loss'])} · {wrong:,} wrong")
    solves = f"evaluations {_spread(found['nfe'], '{:g}'.format)}"
    if found["residual"]:
        solves += f"\nresidual    {_spread(found['residual'], '{:.1e}'.format)}"
    solves += f"\nstatus      {' · '.join(f'{name} {n:,}' for name, n in found['status'].items())}"
    if found["nfe_right"]:
        sides = [(side, found[f"nfe_{side}"]) for side in ("right", "wrong")]
        told = [f"{side} answers {number(s['mean'])} (median {number(s['median'])}, n {s['n']:,})"
                for side, s in sides if s]  # fmt: skip
        solves += f"\nevaluations of {', '.join(told)}"
    say("solve", solves)
    if radius := found["radius"]:
        one = f"{number(radius['max'])} (the batch is one system)"
        many = f"{_spread(radius, number)} ({radius['n']} images)"
        say("radius", f"|largest eigenvalue| of df/dz at z*: {many if radius['n'] > 1 else one}")
    rows = [[row[c] for c in COLUMNS] for row in found["conditions"]]
    percent = {"accuracy": share, "converged": lambda v: "–" if v is None else f"{v:.0%}"}
    tables.show(COLUMNS, rows, percent, spare=["p90", "loss"])
    if terminal.format == "text":
        _print_confusion(found["confusion"])


def _print_confusion(confusion: list[list[int]]) -> None:
    if len(confusion) <= 20:
        columns = ["true \\ said", *map(str, range(len(confusion)))]
        rows = [[str(k), *(str(n) if n else "·" for n in row)] for k, row in enumerate(confusion)]
        print(tables.text(columns, rows))
        return
    wrong = sorted((-n, k, j) for k, row in enumerate(confusion) for j, n in enumerate(row) if k != j and n)
    print(tables.text(["true class", "said", "images"], [[str(k), str(j), str(-n)] for n, k, j in wrong[:10]]))


def _spread(q: dict[str, float], spell: Callable[[float], str]) -> str:
    return " · ".join(f"{name} {spell(q[name])}" for name in QUANTILES)
