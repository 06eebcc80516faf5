"""`implicit-bench train`: one job from config to record."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import clock, config, machine, record
from ..core import Status
from ..data import Data, DataError
from ..device import Device
from ..jsonl import Jsonl
from ..lock import RunLock
from ..log import NoSink, Sink
from ..mirror import sweep
from ..sync import replay
from ..terminal import duration, progress, say, share
from ..world import apart, gathered, left_alone, of_first, shareable, started, synchronised, together, world
from . import CheckpointError, Fit, Interrupted, NonFinite, Step, accuracy_within, budgets, count_flops, evaluate
from .signals import sigterm_as_ctrl_c

SAVED = ("last.pt", "previous.pt")


@dataclass
class Outcome:
    exit_code: int  # 0 done or skipped, 1 failed, 130 interrupted
    folder: Path
    record: dict[str, Any]
    skipped: bool = False


def note(text: str) -> None:
    progress("note", text)


def train(job: config.Composed, words: Sequence[str] = ()) -> Outcome:
    """Train one job, or continue it, or say that it is done. Raises UsageError, RunLocked, RecordError, DataError."""
    began = time.perf_counter()
    device: Device = config.make(job.config["gpu"], "gpu")
    if started().size > 1 and not device.ddp:
        raise config.UsageError(f"torchrun has started {started().size} processes of one run; add gpu=ddp, or start "
                                "it without torchrun")  # fmt: skip
    if started().size > 1 and job.config["match"] == "time":
        raise config.UsageError("match=time measures in one process; find the figure without torchrun, and give it")
    with together(device.begin, device.torch):
        return _together(job, words, device, began)


def _together(job: config.Composed, words: Sequence[str], device: Device, began: float) -> Outcome:
    cfg = {**job.config, "gpu": device.settings()}
    run_id = record.run_id(cfg)
    runs = Path(cfg["paths"]["runs"])
    name = record.folder_name(cfg["model"]["name"], job.choices["dataset"], cfg["seed"], run_id)
    folder: Path = of_first(lambda: record.lookup(runs, run_id) or runs / name)
    if done := of_first(lambda: _finished(folder, cfg)):
        return done
    environment = device.environment()
    parts = config.build(cfg)  # what cannot work is said before anything is written
    sink: Sink = config.make(cfg["logger"], "logger")
    data = parts.dataset.load(Path(cfg["paths"]["data"]), device.torch, fetch=lambda line: say("data", line),
                              workers=cfg["loader"]["workers"])  # fmt: skip
    n = parts.recipe.eval_images
    data = replace(data, val=data.val.first(n), test=data.test.first(n))
    try:
        parts.recipe.total_steps(len(data.train))
        shareable(parts.model.layer, parts.recipe.batch)
    except ValueError as mistake:
        raise config.UsageError(str(mistake)) from None
    record.writable("paths.runs", runs)
    with contextlib.ExitStack() as held:
        if world().first:
            held.enter_context(RunLock(folder))
        held.enter_context(sigterm_as_ctrl_c())
        if done := of_first(lambda: _finished(folder, cfg)):
            return done
        rec = of_first(lambda: _begin(job, cfg, folder))
        earlier, rec["environment"] = rec["environment"], environment
        _header(job, folder, rec, parts.model.parameter_counts(), words)
        if (size := world().size) > 1:
            agreed = "each solved by itself" if parts.model.layer.reduce.per_sample else "what steers is summed"
            note(f"{size} processes, {parts.recipe.batch // size} images of a batch each: {agreed}")
        own = folder if world().first else Path(held.enter_context(TemporaryDirectory()))  # what the others write
        return _train(parts, data, device, folder, own, rec, earlier, sink if world().first else NoSink(), began, held)


def _finished(folder: Path, cfg: dict[str, Any]) -> Outcome | None:
    """Asked before the lock, for a look changes nothing, and under it, since another process may just have ended."""
    before = record.read_record(folder) if (folder / "record.json").exists() else None
    if before is None or before["status"] != "done" or cfg["force"]:
        return None
    accuracy = share(before["metrics"]["test_acc"])
    say("train", f"{folder.name} is done: test accuracy {accuracy}; force=true trains it again")
    if sweep():  # whose agent waits for the metric of a run of its own
        sink: Sink = config.make(cfg["logger"], "logger")
        sink.start(before, folder)
        replay(sink, before, folder)
        sink.finish(0)
    return Outcome(0, folder, before, skipped=True)


def _begin(job: config.Composed, cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A new record, which takes up that of an unfinished run and sets that of a finished one aside."""
    rec = record.new_record("train", cfg, experiment=job.choices.get("experiment"),
                            protocol=job.choices.get("protocol"), length=job.choices.get("length"))  # fmt: skip
    if not (folder / "record.json").exists():
        rec["attempt"] = record.next_attempt(folder, ())
        return rec
    before = record.read_record(folder)
    if before["status"] == "done":
        rec["attempt"] = record.next_attempt(folder, (*SAVED, "metrics.jsonl", "record.json"))
    else:
        rec |= {key: before[key] for key in ("attempt", "resumed_from", "started_at", "environment", "steps")}
        rec["timing"]["total_s"] = before["timing"]["total_s"]
        rec["memory"]["peak_mib"] = before["memory"]["peak_mib"]
    return rec


def _train(parts: config.Parts, data: Data, device: Device, folder: Path, own: Path, rec: dict[str, Any],
           earlier: dict[str, Any], sink: Sink, began: float, files: contextlib.ExitStack) -> Outcome:  # fmt: skip
    """`earlier`: the environment of the sessions before this one."""
    cfg, code, error, fit = rec["config"], 1, None, None
    begun = any((folder / name).exists() for name in SAVED)
    quiet = [earlier["alone"]] if begun else []  # None of a session that was killed
    earlier_s = rec["timing"]["total_s"] or 0.0  # of the sessions before this one
    alone = machine.Alone(root=os.getppid() if world().size > 1 else None)
    machine.reset_peak_memory(device.torch)
    try:
        model = device.place(parts.model)
        if world().size > 1:
            synchronised(model)
            if not world().first:  # masks of its own for each one's images
                torch.manual_seed(int(torch.randint(2**62, ())) + world().rank)
        counts = model.parameter_counts()
        rec["params"] = {"total": sum(counts.values()), "by_part": counts}
        rec["data"] = data.facts()
        step = Step(model, parts.penalties, parts.recipe, device, parts.recipe.total_steps(len(data.train)))
        jsonl = files.enter_context(contextlib.closing(Jsonl(own / "metrics.jsonl")))
        fit = Fit(model, step, data, parts.recipe, device, cfg["seed"], folder, jsonl, sink.log, **cfg["progress"],
                  before_table=sink.hold)  # fmt: skip
        resumed = fit.resume(note)
        if len({*gathered(resumed)}) > 1:
            raise CheckpointError(f"the processes of this run do not see the same {folder}; give paths.runs a folder "
                                  "that all nodes share")  # fmt: skip
        if resumed is None:
            jsonl.truncate(0)
        else:
            rec["resumed_from"] = [*rec["resumed_from"], {"step": resumed, "at": record.now()}]
            if earlier["hardware"] != rec["environment"]["hardware"]:
                fit.at.times, quiet = {}, [None]  # no clock of one machine
            note(f"continuing at step {resumed:,} of {fit.total:,}")
        record.write_record(own, rec)
        config.save(cfg, own / "config.yaml")
        sink.start(rec, folder, resume=resumed is not None)
        try:
            fit.run(note)
        finally:
            _fill(rec, fit)
        _test(rec, model, data, parts.recipe.eval_batch, device)
        x, y = data.batch(data.train, torch.arange(min(parts.recipe.batch, len(data.train)), device=device.torch))
        with apart():
            rec["flops"]["step"] = count_flops(step, device.images(x), y)
        code = 0
    except Interrupted:
        code = 130
    except KeyboardInterrupt:  # a second one, or before the first step
        code, rec["steps"] = 130, fit.saved_step if fit and fit.saved_step > 0 else rec["steps"]
    except CheckpointError:  # nothing has been touched: it is for the user to mend
        raise
    except (NonFinite, DataError) as problem:
        error = str(problem)
    except Exception as problem:
        error = left_alone(problem) or machine.told(problem)
        (own / "error.txt").write_text(traceback.format_exc())
    rec["status"] = {0: "done", 130: "interrupted"}.get(code, "failed")
    rec["error"] = error
    quiet.append(alone.read())
    rec["environment"]["alone"] = False if False in quiet else None if None in quiet else True
    peaks = rec["memory"]["peak_mib"], machine.peak_memory_mib(device.torch)
    rec["memory"]["peak_mib"] = max((mib for mib in peaks if mib is not None), default=None)
    rec["timing"]["total_s"] = earlier_s + time.perf_counter() - began
    rec["finished_at"] = record.now()
    record.write_record(own, rec)
    sink.summary(record.scalars(rec))
    sink.finish(code)
    _closing(code, error, folder, rec)
    return Outcome(code, folder, rec)


def _fill(rec: dict[str, Any], fit: Fit) -> None:
    at = fit.at
    rec["steps"], rec["best_epoch"] = fit.step.taken, at.best_epoch
    rec["epochs"] = at.epoch - (at.batch > 0)  # that ended, the last maybe by recipe.max_steps
    rec["nonfinite_steps"] = fit.step.nonfinite
    for key, value in at.last.items():
        section, _, name = key.partition(".")
        if name and (section in ("metrics", "solve") or key == "timing.epoch_s"):
            rec[section][name] = value
    rec["timing"]["cold_s"] = at.cold_s
    solving = fit.recipe.pretrain_steps if fit.step.taken > fit.recipe.pretrain_steps else 0
    for name, values in at.times.items():
        left_out = max(10, solving) - (fit.step.taken - len(values))
        rec["timing"][f"{name}_ms"] = clock.summary(values[max(0, min(left_out, len(values) - 1)) :])


def _test(rec: dict[str, Any], model: Any, data: Data, batch: int, device: Device) -> None:
    """The test split, touched here and, but for recipe.watch_test, nowhere else."""
    found = evaluate(model, data, data.test, batch, device)
    rec["metrics"] |= {"test_acc": found["acc"], "test_loss": found["loss"]}
    rec["solve"]["test"] = {k: found.get(k) for k in ("nfe_forward", "nfe_sample", "residual", "converged_fraction",
                                                       "status_counts")}  # fmt: skip
    rec["timing"]["predict_ms"] = clock.summary(found["predict_ms"])
    within = accuracy_within(model, data, data.test, batch, device, budgets(model))
    rec["metrics"]["test_acc_within"] = {str(k): v for k, v in within.items()}
    rec["metrics"]["start_acc"] = within.get(0)


def _header(job: config.Composed, folder: Path, rec: dict[str, Any], counts: dict[str, int],
            words: Sequence[str]) -> None:  # fmt: skip
    c = job.choices
    shown = [w for w in words if w.split("=")[0] not in ("model", "network", "dataset", "seed")]
    line = " ".join([f"model={c['model']}", *shown, f"network={c['network']}", f"dataset={c['dataset']}",
                     f"seed={rec['config']['seed']}"])  # fmt: skip
    for remark in remarks(job):
        say("note", remark, err=True)
    stop = rec["config"]["stop"]
    until = {"residual": f"to residual {stop.get('tol')}", "end_time": f"to t = {stop.get('t1')}",
             "fixed_steps": f"{stop.get('steps')} applications"}.get(c["stop"], c["stop"])  # fmt: skip
    adjoint = rec["config"]["adjoint"]
    means = [adjoint.get("linear"), "restarted: the paper's in cost" if adjoint.get("restarts") else None,
             "frozen" if adjoint.get("frozen") else None]  # fmt: skip
    said = ", ".join(word for word in means if word)
    gradient = f"{c['adjoint']} ({said})" if said else c["adjoint"]
    how = f"z0 = {c['init']} → {c['solver']} {until} → gradient: {gradient} · {sum(counts.values()):,} parameters"
    say("train", f"{line}      run {folder.name}\n{how}")


def remarks(job: config.Composed) -> list[str]:
    """What is allowed, and may not do what it seems to."""
    c, found = job.choices, []
    penalties, stop = job.config["penalty"], job.config["stop"]
    if c["init"] == "skip_net" and not {"skip", "init_fit"} & penalties.keys():
        found.append("init=skip_net learns from penalty=[skip] or penalty=[init_fit] alone, and neither is there: the "
                     "predictor never changes")  # fmt: skip
    if c["init"] == "zero" and "init_fit" in penalties:
        found.append("penalty=[init_fit] has no predictor to train with init=zero: it changes nothing")
    if c["init"] == "zero" and "skip" in penalties:
        found.append("penalty=[skip] has no predictor to train with init=zero: it only pulls the solution to zero")
    if c["adjoint"] in ("ift", "jfb", "phantom") and "t1" in stop:
        found.append(f"adjoint={c['adjoint']} takes z({stop['t1']:g}) for a fixed point; the residual tells how far "
                     "off that is")  # fmt: skip
    return found


def _closing(code: int, error: str | None, folder: Path, rec: dict[str, Any]) -> None:
    if code == 0:
        test, metrics = rec["solve"]["test"], rec["metrics"]
        text = f"accuracy {share(metrics['test_acc'])} on {rec['data']['n_test']:,} unseen images"
        if (share_done := test["converged_fraction"]) is not None:
            text += f" · {share_done:.1%} of them converged · {test['nfe_sample']:.1f} evaluations a sample"
        if len(within := metrics["test_acc_within"]) > 1:
            parts = "   ".join(f"{k}: {share(v)}" for k, v in within.items())
            text += f"\nsteps allowed   {parts}   (0 = the head on the start z0 alone)"
        say("test", text)
        if share_done is not None and share_done < record.CONVERGED_ENOUGH:
            bad = {k: n for k, n in test["status_counts"].items() if Status[k] > Status.REACHED_END}
            name = max(bad, key=bad.__getitem__)
            advice = Status[name].advice
            say("note", f"{sum(bad.values()):,} test solves did not converge, most of them {name}: {advice}", err=True)
        say("wrote", f"{folder}/   record.json · metrics.jsonl · last.pt · {duration(rec['timing']['total_s'])}")
    elif code == 130:
        if rec["steps"]:
            say("train", f"interrupted at step {rec['steps']:,} and saved; the same command continues it", err=True)
        else:
            say("train", "interrupted before anything was saved; the same command begins anew", err=True)
    else:
        hint = f" (details in {folder / 'error.txt'})" if (folder / "error.txt").exists() else ""
        if world().first:
            say("failed", f"{folder.name}: {error}{hint}", err=True)
        else:  # whose standard error is nowhere
            with contextlib.redirect_stderr(sys.__stderr__):
                say("failed", f"{folder.name}: process {world().rank} of {world().size}: {error}", err=True)
