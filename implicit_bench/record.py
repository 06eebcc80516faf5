"""What a run is called and what it leaves behind: identity, metric names, record.json, metrics.jsonl."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

SCHEMA_VERSION = 1
NUMERICS = 3  # raise by hand when a change alters what a config gives by more than rounding; every run id changes
CONVERGED_ENOUGH = 0.95  # a run of which less has converged gets no headline
STATUSES = ("running", "done", "failed", "interrupted")
# Top-level config keys that say nothing about the result: labels (resolved into the rest), where to write, how to load.
LABELS = {"model", "experiment", "protocol", "length", "logger", "paths", "force", "hydra", "progress", "loader",
          "allow_targets", "match", "match_to"}
MEASURING = {"rounds", "time", "at", "memory", "peers"}  # of bench; train has none of it


class RecordError(ValueError):
    """A record, a metrics file or a run's name cannot be used; one sentence says which and what to do."""


class NoRun(RecordError):
    """No run has this name."""


class Metric(NamedTuple):
    key: str  # dots mirror record.json; W&B has the same with slashes
    unit: str
    better: Literal["lower", "higher"] | None
    sentence: str


METRICS = (
    Metric("metrics.train_loss", "nats", "lower", "Mean task loss of the last training epoch, penalties left out."),
    Metric("metrics.train_acc", "share", "higher", "Accuracy over the last training epoch, as its weights were then."),
    Metric("metrics.val_acc", "share", "higher", "Accuracy on the validation split after the last epoch."),
    Metric("metrics.val_loss", "nats", "lower", "Task loss on the validation split after the last epoch."),
    Metric("metrics.test_acc", "share", "higher", "Accuracy on the test split, which is touched once."),
    Metric("metrics.test_loss", "nats", "lower", "Task loss on the test split."),
    Metric("metrics.start_acc", "share", "higher", "Test accuracy of the head on z0 alone, no solver step taken."),
    Metric("metrics.test_acc_best_paper_style", "share", "higher",
           "Best test accuracy over all epochs, as papers report it: optimistic, and only with recipe.watch_test."),
    Metric("timing.total_s", "s", "lower", "Wall-clock of the whole command."),
    Metric("timing.cold_s", "s", "lower", "First steps, compilation and autotuning: outside every other time."),
    Metric("timing.epoch_s", "s", "lower",
           "The last training epoch, or what recipe.max_steps left of it, without validation and checkpoints."),
    Metric("timing.step_ms", "ms", "lower", "One training step: forward from a batch on the device to the update."),
    Metric("timing.forward_ms", "ms", "lower", "The forward part of a training step."),
    Metric("timing.backward_ms", "ms", "lower", "The backward part of a training step."),
    Metric("timing.optimizer_ms", "ms", "lower", "The optimiser's part of a training step."),
    Metric("timing.data_ms", "ms", "lower", "Waiting for a batch to be on the device; no part of the step."),
    Metric("timing.predict_ms", "ms", "lower", "One batch forward without gradient, in evaluation mode."),
    Metric("solve.nfe_forward", "calls", "lower", "Calls of f in a forward solve, start and re-attaching included."),
    Metric("solve.nfe_backward", "calls", "lower", "Vector-Jacobian products in a backward, the first one included."),
    Metric("solve.linear_iterations", "iterations", "lower", "Iterations of the backward's linear solve."),
    Metric("solve.residual", "relative", "lower", "Residual at exit against |f|; none for an end-time solve."),
    Metric("solve.rhs_norm", "norm", None, "Norm of the backward system's right-hand side."),
    Metric("solve.converged_fraction", "share", "higher", "Share of samples that met the stopping rule."),
    Metric("solve.backward_converged", "share", "higher", "Share of samples whose backward solve met its tolerance."),
    Metric("memory.peak_mib", "MiB", "lower", "Peak memory of the run: torch's on a GPU, else the whole process's."),
    Metric("flops.step", "FLOP", "lower", "Floating-point operations of a training step, counted."),
    Metric("nonfinite_steps", "steps", "lower", "Steps whose loss or gradient was not finite: skipped, or the last."),
    *(Metric(f"speedup.{of}", "times", "higher", f"One row's {what} over another's; 2 is twice as fast.")
      for of, what in (("train", "training step"), ("backward", "backward"), ("predict", "prediction"), (
          "step", "step"), ("epochs", "time to equal epochs"), ("accuracy", "time to equal accuracy"))),
)  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def run_id(config: Mapping[str, Any]) -> str:
    """10 hex digits that name what a resolved config computes.

    sha256 of NUMERICS and the config less LABELS, as JSON with sorted keys and no spaces. Numbers count by value (1e-3
    is 0.001, 1.0 is 1), but true is not 1, "1" is not 1, and null is not the same as an absent key. A tuple is a list.
    """
    return _hash(config, LABELS)


def cell_id(config: Mapping[str, Any]) -> str:
    """run_id less the gpu group: equal for the same experiment on other hardware, dtype or threads."""
    return _hash(config, LABELS | {"gpu"})


def cell_of(record: Mapping[str, Any]) -> str:
    """Its cell_id; of a record of other NUMERICS, which has another run_id than its config has now, none that is."""
    config = record["config"]
    return cell_id(config) if run_id(config) == record["run_id"] else f"{cell_id(config)} as {record['run_id']} was"


def _hash(config: Mapping[str, Any], less: set[str]) -> str:
    kept = {key: value for key, value in config.items() if key not in less}
    values = plain(kept, lambda number: int(number) if number.is_integer() else _spelled(number))
    text = json.dumps([NUMERICS, values], sort_keys=True, separators=(",", ":"))
    if "${" in text:
        raise ValueError(f"the config still holds an interpolation ({text[text.index('${') :][:40]}); resolve it first")
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _spelled(number: float) -> float | str:
    """For a config, where infinity is not null, and JSON has no word for it."""
    return number if math.isfinite(number) else str(number)


def plain(value: Any, number: Callable[[float], Any] | None = None) -> Any:
    """Values for strict JSON: NaN becomes null (or what `number` says), a tensor its number, an enum its name."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, number) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, number) for item in value]
    if isinstance(value, (Enum, Path)):
        return value.name if isinstance(value, Enum) else str(value)
    if isinstance(value, float):
        return number(value) if number else value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        return plain(value.item(), number)
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def folder_name(model: str, dataset: str, seed: int | None, run_id: str) -> str:
    """skip_deq-digits-s0-3fa9c1d20b; a run without one seed (a bench) has no s part."""
    parts = [model, dataset, *([] if seed is None else [f"s{seed}"]), run_id]
    return "-".join(parts).replace("/", "_")


def find(runs_dir: str | Path, text: str, command: str | None = None) -> Path:
    """The folder of one run (in results/, its record's file): "last" started (by `command`, if it is given), its path,
    or any unique prefix of its id or of its name."""
    if os.sep in text and (Path(text) / "record.json").is_file():  # a shell's completion writes the path
        return Path(text)
    ids = _ids(Path(runs_dir))
    if text == "last" and (by := [path for path in ids if command in (None, peek(path).get("command"))]):
        return max(by, key=lambda path: started(peek(path), path))
    exact = [path for path, id in ids.items() if text in (name_of(path), id)]
    fits = exact or [path for path, id in ids.items() if any(n.startswith(text or "/") for n in (name_of(path), id))]
    if len(fits) == 1:
        return fits[0]
    if fits:
        shown = ", ".join(map(name_of, fits[:5])) + (", ..." if len(fits) > 5 else "")
        raise RecordError(f"{text!r} fits {len(fits)} runs: {shown}; give more letters")
    near = difflib.get_close_matches(text, [*map(name_of, ids), *ids.values()], n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "implicit-bench runs lists them" if ids else "there are none yet"
    raise NoRun(f"no run {text!r} in {runs_dir}; {hint}")


def pick(dirs: Sequence[Path], text: str) -> Path:
    """`find` in the first of several folders that has it. Raises RecordError where that has more than one."""
    for top in dirs[:-1]:
        with contextlib.suppress(NoRun):
            return find(top, text)
    return find(dirs[-1], text)


def lookup(runs_dir: str | Path, run_id: str) -> Path | None:
    """The folder that holds this run, whatever labels its name carries: a finished one first, then the latest."""
    named = {path: _ID.search(path.name) for path in _folders(Path(runs_dir))}
    fits = {path: peek(path) for path, id in named.items() if not id or id[1] == run_id}  # few, of a thousand
    fits = {path: rec for path, rec in fits.items() if named[path] or rec.get("run_id") == run_id}
    return max(fits, key=lambda path: (fits[path].get("status") == "done", started(fits[path], path)), default=None)


def name_of(path: Path) -> str:
    """What a run is called: its folder, which record.json lies in, or in results/ its file NAME.record.json."""
    return (path.parent if path.name == "record.json" else path).name.removesuffix(".record.json")


_ID = re.compile(r"-([0-9a-f]{10})$")


def _folders(top: Path) -> list[Path]:
    every = sorted(top.iterdir()) if top.is_dir() else []
    return [path for path in every if not path.name.startswith((".", "attempt-")) and path.is_dir()]


def _ids(top: Path) -> dict[Path, str]:
    """Every run with its id: the end of its name, else (a folder someone renamed) what its record says."""
    files = [*sorted(top.glob("*.record.json")), *sorted(top.glob("*/*.record.json"))]
    files = [path for path in files if not path.name.startswith((".", "attempt-"))]
    named = {path: _ID.search(name_of(path)) for path in (*_folders(top), *files)}
    ids = {path: id[1] if id else peek(path).get("run_id") for path, id in named.items()}
    return {path: id for path, id in ids.items() if id}


def peek(folder: Path) -> dict[str, Any]:
    """The record if it can be read: one broken run must not hide the others."""
    try:
        return read_record(folder)
    except RecordError:
        return {}


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def started(record: Mapping[str, Any], path: Path) -> float:
    """When a run began, in seconds since the epoch; what the file system says where its record does not."""
    try:
        return datetime.fromisoformat(record["started_at"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return path.stat().st_mtime


def writable(key: str, folder: Path) -> None:
    """Make a folder that the user named. Raises RecordError that names the key."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission to write there"
    except OSError as problem:
        reason = problem.strerror or str(problem)
    if reason:
        raise RecordError(f"{key}={folder} cannot be used ({reason}); name a folder that you can write to")


def new_record(command: str, config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A record with every key in its order; `fields` sets top-level keys, and updates those that are sections."""
    sections: dict[str, dict[str, Any]] = {}
    for head, _, key in (metric.key.partition(".") for metric in METRICS):
        sections.setdefault(head, {})[key] = None  # in timing, all ..._ms are {median, p10, p90, n}
    environment = "hardware cpu gpu threads world_size allocator torch cuda python versions git alone"
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "run_id": run_id(config), "attempt": 1, "command": command,
        "status": "running", "error": None, "experiment": None, "protocol": None, "length": None,
        "config": dict(config), "params": {"total": None, "by_part": {}},
        "data": dict.fromkeys(("name", "sha256", "n_train", "n_val", "n_test")),
        "steps": 0, "epochs": 0, "best_epoch": None, "metrics": sections["metrics"], "timing": sections["timing"],
        "solve": {**sections["solve"], "status_counts": {}}, "memory": sections["memory"], "flops": sections["flops"],
        "nonfinite_steps": 0, "resumed_from": [], "environment": dict.fromkeys(environment.split()),
        "started_at": now(), "finished_at": None,
    }  # fmt: skip
    for key, value in fields.items():
        if key not in record:
            raise TypeError(f"a record has no {key!r}; nearest: {difflib.get_close_matches(key, record, 1, 0)[0]}")
        record[key] = {**record[key], **value} if isinstance(record[key], dict) else value
    return record


def write_record(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write record.json, whole or not at all."""
    if record.get("status") not in STATUSES:
        raise RecordError(f"a record's status is one of {', '.join(STATUSES)}, not {record.get('status')!r}")
    path = Path(folder, "record.json")
    text = json.dumps({**plain(record), "config": plain(record["config"], _spelled)}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        file.write(text.encode() + b"\n")
    return path


@contextlib.contextmanager
def whole(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write, which is there whole or not at all: a reader, or a crash, sees the old one or the new one.
    `before` is called when only its name is missing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except OSError as problem:  # which knows no name where it is the writing that fails
        raise OSError(problem.errno, problem.strerror or str(problem), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a run's folder, or in a file."""
    path = Path(path, "record.json") if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no valid JSON: {error}"
        raise RecordError(f"{path} cannot be read ({why}); delete it and run again, or copy it anew") from None
    found: dict[str, Any] = record if isinstance(record, dict) else {}
    if isinstance(version := found.get("schema_version"), int) and version > SCHEMA_VERSION:
        raise RecordError(f"{path} has schema {version}, newer than {SCHEMA_VERSION}; upgrade implicit-bench")
    if lacks := [key for key in new_record("", {}) if key not in found]:
        raise RecordError(f"{path} is no run record (it lacks {', '.join(lacks[:3])}); delete it and run again")
    return found


def next_attempt(folder: Path, names: Iterable[str]) -> int:
    """The number of a new attempt in this folder; what the one before left there keeps a name of its own."""
    before: int = read_record(folder)["attempt"] if (folder / "record.json").exists() else 0
    for path in [folder / name for name in names if before and (folder / name).exists()]:
        path.rename(path.with_name(f"attempt-{before}.{path.name}"))
    kept = (_ATTEMPT.match(path.name) for path in folder.glob("attempt-*"))  # all that there is after a kill
    return max([before, *(int(found[1]) for found in kept if found)]) + 1


_ATTEMPT = re.compile(r"attempt-(\d+)\.")


def records(dirs: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Every record under the given folders (record.json, or NAME.record.json as in results/), each file once."""
    files: dict[Path, None] = {}
    for top in map(Path, dirs):
        if not top.exists():
            raise RecordError(f"no folder {top} to read records from")
        files.update((file.resolve(), None) for file in ([top] if top.is_file() else record_files(top)))
    return [read_record(file) for file in files]


def record_files(top: Path) -> Iterator[Path]:
    """record.json and NAME.record.json below a folder, sorted, without those of earlier attempts; W&B's and hidden
    folders are not looked into."""
    for folder, below, files in os.walk(top):
        below[:] = sorted(name for name in below if name != "wandb" and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files)
                    if re.search(r"(^|\.)record\.json$", name) and not name.startswith("attempt-"))  # fmt: skip


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under their METRICS keys; of a spread, its median; what was not measured is absent."""
    found = {}
    for metric in METRICS:
        value: Any = record
        for part in metric.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        value = value.get("median") if isinstance(value, Mapping) else value
        if isinstance(value, (int, float)):
            found[metric.key] = value
    return found
