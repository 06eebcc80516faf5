"""Weights at which rows are timed: along training, made once by the loop of `train` and kept; and of finished runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import record
from ..jsonl import Jsonl
from ..lock import RunLock
from ..terminal import progress
from ..train import Fit, checkpoint, evaluate
from .rows import Row

SEEN = 500  # validation images, for the accuracy that stands beside a time


def where(row: Row, k: int | None) -> Path | None:
    """The file that keeps the row's state after k steps; the last checkpoint of a run; None for initial weights."""
    if row.job.trained:
        return row.job.trained / checkpoint.NAMES[0]
    return kept(row, k) if k else None


def kept(row: Row, k: int) -> Path:
    if k == row.total and (done := finished(row)):
        return done / checkpoint.NAMES[0]
    cfg = of_training(row)
    cfg["gpu"] = {**cfg["gpu"], "threads": None}  # which change a rounding, and cost hours to train anew for
    name = record.folder_name(row.name, row.job.choices["dataset"], cfg["seed"], record.run_id(cfg))
    return Path(cfg["paths"]["runs"], ".trained", name, f"at-{k}.pt")


def of_training(row: Row) -> dict[str, Any]:
    """The row's config as `train` has it."""
    return {key: value for key, value in row.job.config.items() if key not in record.MEASURING}


def finished(row: Row) -> Path | None:
    """The folder of a training that is done and was the row's, with its checkpoint: its end is that of the recipe."""
    cfg = of_training(row)
    cell, dtype = record.cell_id(cfg), cfg["gpu"]["dtype"]
    pattern = f"{record.folder_name(row.name, row.job.choices['dataset'], cfg['seed'], '')}*"
    for last in sorted(Path(cfg["paths"]["runs"]).glob(f"{pattern}/{checkpoint.NAMES[0]}")):
        with contextlib.suppress(record.RecordError):
            rec = record.read_record(last.parent)
            if (rec["command"], rec["status"], record.cell_of(rec), rec["config"]["gpu"]["dtype"]) == (
                    "train", "done", cell, dtype):  # fmt: skip
                return last.parent
    return None


def lacks(row: Row, at: Sequence[int]) -> list[int]:
    """Those of the steps whose weights are not kept, in order."""
    return sorted(k for k in at if k and not kept(row, k).exists())


def trained(row: Row, at: Sequence[int]) -> None:
    """Train the row to each of these steps, as far as that has not been done; its own weights stay what they are.

    A training that was interrupted goes on where it stood. The recipe's own pretraining is part of it, as in `train`,
    though what is timed solves. Raises train.Interrupted after saving, train.NonFinite.
    """
    missing = lacks(row, at)
    if not missing:
        return
    folder, cfg = kept(row, 0).parent, row.job.config
    with (RunLock(folder), row.unchanged(), row.pretraining(),
          contextlib.closing(Jsonl(folder / "metrics.jsonl")) as jsonl):  # fmt: skip
        fit = Fit(row.model, row.step, row.data, row.step.recipe, row.device, cfg["seed"], folder, jsonl,
                  lambda values, step: None, **cfg["progress"])  # fmt: skip
        begun = checkpoint.load(folder, torch.device("cpu"), lambda line: None)
        if begun and begun["step"] > missing[0]:  # past it: once more from the beginning
            for name in checkpoint.NAMES:
                (folder / name).unlink(missing_ok=True)
        torch.manual_seed(cfg["seed"])  # dropout
        fit.resume(lambda line: progress("note", line))
        for k in missing:
            progress("train", f"{row.label} to step {k:,}, kept in {folder}/")
            fit.run(lambda line: None, until=k)
            val = row.data.val.first(SEEN)
            seen = evaluate(row.model, row.data, val, row.recipe.eval_batch, row.device) if len(val) else {"acc": None}
            checkpoint.write(kept(row, k), {**row.state(), "val_acc": seen["acc"]})


def put(row: Row, k: int | None, of: Row) -> None:
    """Let the row be timed at its weights after k steps or of its run, or those of another, where they stand still."""
    path = where(of, k)
    row.still = torch.load(path, map_location=row.device.torch, weights_only=True) if path else of.initial
    if run := row.still.get("progress"):  # a checkpoint of `train`
        row.val_acc = run["last"].get("metrics.val_acc")
    else:
        row.val_acc = row.still.get("val_acc")
    row.put(row.still)
