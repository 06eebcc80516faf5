"""`implicit-bench train`: one job from config to record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import clock, config, record
from ..data import Data
from ..device import Device
from ..lock import RunLock
from ..log import Sink
from ..terminal import duration, say, share
from . import CheckpointError, Fit, Interrupted, NonFinite, Step, accuracy_within, budgets, evaluate

SAVED = ("last.pt", "previous.pt")


@dataclass
class Outcome:
    exit_code: int  # 0 done or skipped, 1 failed, 130 interrupted
    folder: Path
    record: dict[str, Any]


def note(text: str) -> None:
    say("note", text, err=True)


def train(job: config.Composed, words: Sequence[str] = ()) -> Outcome:
    """Train one job, or continue it, or say that it is done. Raises UsageError, RunLocked, RecordError, DataError."""
    began = time.perf_counter()
    cfg = job.config
    device: Device = config.make(cfg["gpu"], "gpu")
    cfg = {**cfg, "gpu": device.settings()}
    run_id = record.run_id(cfg)
    model_name, dataset = cfg["model"]["name"], job.choices["dataset"]
    runs = Path(cfg["paths"]["runs"])
    folder = record.lookup(runs, run_id) or runs / record.folder_name(model_name, dataset, cfg["seed"], run_id)
    if done := _finished(folder, cfg["force"]):
        return done
    with RunLock(folder):
        before = record.read_record(folder) if (folder / "record.json").exists() else None
        return _finished(folder, cfg["force"]) or _train(job, cfg, device, folder, before, words, began)


def _finished(folder: Path, force: bool) -> Outcome | None:
    """Asked before the lock, for a look changes nothing, and under it, since another process may just have ended."""
    before = record.read_record(folder) if (folder / "record.json").exists() else None
    if before is None or before["status"] != "done" or force:
        return None
    accuracy = share(before["metrics"]["test_acc"])
    say("train", f"{folder.name} is done: test accuracy {accuracy}; force=true trains it again")
    return Outcome(0, folder, before)


def _train(job: config.Composed, cfg: dict[str, Any], device: Device, folder: Path, before: dict[str, Any] | None,
           words: Sequence[str], began: float) -> Outcome:  # fmt: skip
    attempt = before["attempt"] if before else 1
    if before and before["status"] == "done":
        attempt += 1
        _set_aside(folder, before["attempt"])
    rec = record.new_record("train", cfg, attempt=attempt, experiment=job.choices.get("experiment"),
                            protocol=job.choices.get("protocol"), length=job.choices.get("length"))  # fmt: skip
    if before and before["status"] != "done":
        rec["resumed_from"], rec["started_at"] = before["resumed_from"], before["started_at"]
    sink: Sink = config.make(cfg["logger"], "logger")
    code, error = 1, None
    alone = clock.Alone()
    try:
        rec["environment"] = device.environment()
        parts = config.build(cfg)
        data = parts.dataset.load(Path(cfg["paths"]["data"]), device.torch, fetch=lambda line: say("data", line))
        model = device.place(parts.model)
        if device.compile:
            model.layer.cell.compile()
        counts = model.parameter_counts()
        rec["params"] = {"total": sum(counts.values()), "by_part": counts}
        rec["data"] = {"name": data.name, "sha256": data.sha256, "n_train": len(data.train), "n_val": len(data.val),
                       "n_test": len(data.test)}  # fmt: skip
        _header(job, folder, rec, words)
        total = parts.recipe.total_steps(len(data.train))
        step = Step(model, parts.penalties, parts.recipe, device, total)
        jsonl = record.Jsonl(folder / "metrics.jsonl")
        fit = Fit(model, step, data, parts.recipe, device, cfg["seed"], folder, jsonl, sink.log, **cfg["progress"])
        resumed = fit.resume(note)
        if resumed is None:
            jsonl.truncate(0)
        else:
            rec["resumed_from"] = [*rec["resumed_from"], {"step": resumed, "at": rec["started_at"]}]
            note(f"continuing at step {resumed:,} of {total:,}")
        record.write_record(folder, rec)
        config.save(cfg, folder / "config.yaml")
        sink.start(rec, folder, resume=resumed is not None)
        try:
            fit.run(note)
        finally:
            _fill(rec, fit)
        _test(rec, model, data, parts.recipe.eval_batch, device)
        rec["flops"]["step"] = _flops(step, data, device)
        code = 0
    except Interrupted:
        code = 130
    except (NonFinite, CheckpointError) as problem:
        error = str(problem)
    except (config.UsageError, record.RecordError, KeyboardInterrupt):
        raise
    except Exception as problem:
        if isinstance(problem, ValueError) and type(problem).__module__.startswith("implicit_bench"):
            raise
        error = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        rec["status"] = {0: "done", 130: "interrupted"}.get(code, "failed")
        rec["error"] = error
        rec["environment"]["alone"] = alone.read()
        rec["memory"]["peak_mib"] = clock.peak_memory_mib(device.torch)
        rec["timing"]["total_s"] = time.perf_counter() - began
        rec["finished_at"] = datetime.now().astimezone().isoformat(timespec="milliseconds")
        if rec["params"]["total"]:
            record.write_record(folder, rec)
        sink.summary(record.scalars(rec))
        sink.finish(code)
    _closing(code, error, folder, rec, sink)
    return Outcome(code, folder, rec)


def _set_aside(folder: Path, attempt: int) -> None:
    """force=true: what the finished attempt left stays, under names of its own."""
    for path in [folder / name for name in (*SAVED, "metrics.jsonl", "record.json")]:
        if path.exists():
            path.rename(path.with_name(f"attempt-{attempt}.{path.name}"))


def _fill(rec: dict[str, Any], fit: Fit) -> None:
    at = fit.at
    rec["steps"], rec["epochs"], rec["best_epoch"] = fit.step.taken, at.epoch, at.best_epoch
    rec["nonfinite_steps"] = fit.step.nonfinite
    for key, value in at.last.items():
        section, _, name = key.partition(".")
        if name and (section in ("metrics", "solve") or key == "timing.epoch_s"):
            rec[section][name] = value
    rec["timing"]["cold_s"] = at.cold_s
    for name, values in at.times.items():
        warm = values[min(10, len(values) - 1) :]
        rec["timing"][f"{name}_ms"] = clock.summary(warm)


def _test(rec: dict[str, Any], model: Any, data: Data, batch: int, device: Device) -> None:
    """The test split, touched here and nowhere else."""
    found = evaluate(model, data, data.test, batch, device)
    rec["metrics"] |= {"test_acc": found["acc"], "test_loss": found["loss"]}
    rec["solve"]["test"] = {k: found.get(k) for k in ("nfe_forward", "nfe_sample", "residual", "converged_fraction",
                                                       "status_counts")}  # fmt: skip
    rec["timing"]["predict_ms"] = clock.summary(found["predict_ms"])
    within = accuracy_within(model, data, data.test, batch, device, budgets(model))
    rec["metrics"]["test_acc_within"] = {str(k): v for k, v in within.items()}
    rec["metrics"]["start_acc"] = within.get(0)


class _NoModules:
    """Stands in for the counter's module tracker, which cannot follow a backward that solves a linear system."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _flops(step: Step, data: Data, device: Device) -> int:
    """Floating-point operations of one forward and backward, counted by torch (2 a multiply-add), after training."""
    index = torch.arange(min(step.recipe.batch, len(data.train)), device=device.torch)
    x, y = data.batch(data.train, index)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        out = step.model(device.images(x))
        torch.nn.functional.cross_entropy(out.logits, y).backward()
    step.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _header(job: config.Composed, folder: Path, rec: dict[str, Any], words: Sequence[str]) -> None:
    c = job.choices
    shown = [w for w in words if w.split("=")[0] not in ("model", "network", "dataset", "seed")]
    line = " ".join([f"model={c['model']}", *shown, f"network={c['network']}", f"dataset={c['dataset']}",
                     f"seed={rec['config']['seed']}"])  # fmt: skip
    stop = rec["config"]["stop"]
    until = {"residual": f"to residual {stop.get('tol')}", "end_time": f"to t = {stop.get('t1')}",
             "fixed_steps": f"{stop.get('steps')} applications"}.get(c["stop"], c["stop"])  # fmt: skip
    gradient = "ift (gmres)" if c["adjoint"] == "ift" else c["adjoint"]
    how = f"z0 = {c['init']} → {c['solver']} {until} → gradient: {gradient} · {rec['params']['total']:,} parameters"
    say("train", f"{line}      run {folder.name}\n{how}")


def _closing(code: int, error: str | None, folder: Path, rec: dict[str, Any], sink: Sink) -> None:
    if code == 0:
        test, metrics = rec["solve"]["test"], rec["metrics"]
        text = f"accuracy {share(metrics['test_acc'])} on {rec['data']['n_test']:,} unseen images"
        if test["status_counts"].get("REACHED_END", 0) == 0:
            text += (
                f" · {test['converged_fraction']:.1%} of them converged · {test['nfe_sample']:.1f} evaluations a solve"
            )
        if within := metrics["test_acc_within"]:
            parts = "   ".join(f"{k}: {share(v)}" for k, v in within.items())
            text += f"\nsteps allowed   {parts}   (0 = the head on the start z0 alone)"
        say("test", text)
        say("wrote", f"{folder}/   record.json · metrics.jsonl · last.pt · {duration(rec['timing']['total_s'])}")
    elif code == 130:
        say("train", f"interrupted at step {rec['steps']:,} and saved; the same command continues it", err=True)
    else:
        hint = f" (details in {folder / 'error.txt'})" if (folder / "error.txt").exists() else ""
        say("failed", f"{folder.name}: {error}{hint}", err=True)
