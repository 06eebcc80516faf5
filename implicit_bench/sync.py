"""W&B runs rebuilt from our records: the run that the live sink writes, from record.json and metrics.jsonl."""

from __future__ import annotations

import atexit
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .jsonl import read_jsonl
from .lock import RunLock, RunLocked
from .log import Sink, Wandb, leave
from .mirror import content, key_source, marker, run_name, sweep
from .record import RecordError, pick, read_record, scalars
from .terminal import say

EXIT = {"done": 0, "failed": 1, "interrupted": 130}
REFUSED = re.compile(r"previously created and deleted|HTTP 409|Response \[409\]")
UPLOAD_S = 600.0


class SyncError(RuntimeError):
    """A run could not be sent; one sentence."""


class Unreachable(SyncError):
    """Nor could any other."""


class Sent(NamedTuple):
    """What became of a run: `label` is sent, offline, same or skipped."""

    label: str
    text: str


class Resend(Wandb):
    """Says nothing itself, `problem` tells; a run that cannot go online is not written offline instead."""

    def _tell(self, line: str) -> None: ...

    def _fall_back(self, error: Exception | None) -> str:
        raise error or LookupError("no key found; `wandb login` stores one, mode=offline needs none")

    def finish(self, exit_code: int = 0) -> None:
        super().finish(exit_code)
        if self.problem and self._thread.is_alive():  # the process is to end with our code, not with the run's
            atexit.register(leave, 1)


def named(dirs: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The folders of the runs that go by these names; of every run where none is given. Raises RecordError."""
    if names:
        return [pick(dirs, name) for name in names]
    folders = [path.parent for top in dirs for path in sorted(top.glob("*/record.json"))]
    if not folders:
        raise RecordError(f"there are no runs in {' and '.join(map(str, dirs))}; records=DIR says where they are")
    return folders


def sync(folders: Sequence[Path], mode: str = "auto", project: str | None = None, entity: str | None = None,
         force: bool = False) -> int:  # fmt: skip
    """Send the runs in these folders and say of each what became of it; 1 if one that should have gone did not.

    A run that W&B has already, by the marker that the live run or the last sync left, is not sent again (`force` does).
    What is sent replaces the run of that id: W&B overwrites rows one by one, config, tags and summary whole; surplus
    rows, as of a training that was resumed online, stay. A W&B that cannot be reached ends it; the same command goes on
    from there. mode=auto is online where a key is configured, unless WANDB_MODE says which.
    """
    code = 0
    for left, folder in zip(range(len(folders) - 1, -1, -1), map(Path, folders)):
        try:
            label, text = send(folder, mode, project, entity, force)
            say(label, f"{folder.name}: {text}")
        except (SyncError, RecordError) as problem:
            over = isinstance(problem, Unreachable)
            rest = f"; {left} more not tried" if over and left else ""
            say("failed", f"{folder.name}: {problem}{rest}", err=True)
            code = 1
            if over:
                break
    return code


def send(folder: Path, mode: str = "auto", project: str | None = None, entity: str | None = None,
         force: bool = False) -> Sent:  # fmt: skip
    """One run. Raises SyncError, RecordError."""
    if sweep():
        raise Unreachable("WANDB_SWEEP_ID is set, and W&B would take this for its agent's run; unset it")
    mode = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    if mode not in ("auto", "online", "offline", "dryrun", "disabled"):
        mode = "online"  # as wandb takes it, "run" among others
    if mode == "disabled":
        raise Unreachable("WANDB_MODE=disabled switches W&B off")
    if mode == "auto":
        mode = "online" if key_source() else "offline"
    record = read_record(folder)
    if not folder.is_dir():
        raise SyncError("it is a record without a run's folder, which has the rows that W&B wants")
    try:
        with RunLock(folder):
            if record["status"] == "running":
                return Sent("skipped", "it was ended before it could say how; the command that began it continues it")
            return _send(record, folder, "offline" if mode == "dryrun" else mode, project, entity, force)
    except RunLocked as locked:
        return Sent("skipped", str(locked))
    except OSError as problem:
        raise SyncError(f"cannot write there ({problem.strerror})") from None


def replay(sink: Sink, record: dict[str, Any], folder: Path) -> None:
    """Tell a started sink what the live run told it."""
    if record["command"] == "train":
        for row in read_jsonl(folder / "metrics.jsonl"):
            sink.log(row, row["step"])
        sink.summary(scalars(record))
        return
    if (folder / "speedup.svg").exists():
        sink.image("speedup", folder / "speedup.svg")
    if (folder / "report.html").exists():
        sink.image("report", folder / "report.html")
    for name, (columns, rows) in record.get("tables", {}).items():
        sink.table(name, columns, rows)
    for step, values in record.get("scalars", ()):
        sink.log(values, step)
        sink.summary(values)


def _send(record: dict[str, Any], folder: Path, mode: str, project: str | None, entity: str | None,
          force: bool) -> Sent:  # fmt: skip
    logger = record["config"].get("logger") or {}
    project = project or logger.get("project") or os.environ.get("WANDB_PROJECT") or "implicit-bench"
    entity, known = entity or logger.get("entity"), marker(folder)
    elsewhere = bool(known) and (known["project"], known["entity"]) != (project, entity)
    if known.get("sweep") and not force:
        keeps = known["place"] if known["state"] == "online" else f"`{_upload(folder, known['place'])}` keeps it there"
        return Sent("skipped", f"it belongs to the W&B sweep {known['sweep']}: {keeps}; force=true sends a copy")
    if known and not (elsewhere or force) and known["content"] == content(folder) and known["state"] == mode:
        if mode == "online":
            return Sent("same", f"already there: {known['place']}")
        if (folder / known["place"]).is_dir():
            return Sent("same", f"already there; upload it with: {_upload(folder, known['place'])}")
    sink = Resend(mode, project, entity, logger.get("group"), finish_timeout=UPLOAD_S)  # type: ignore[arg-type]
    names, refused = _names(record), []
    if known and not (elsewhere or known.get("sweep")) and known["id"] in names:
        names = names[names.index(known["id"]) :]
    for id in names:
        sink.start(record, folder, id=id)
        sink.wait(120)
        if not REFUSED.search(sink.problem):
            break
        sink.finish(1)
        refused.append(id)
    if sink.problem or sink.state == "starting":
        raise Unreachable(f"W&B {sink.problem or 'does not answer'}; nothing is lost, the same command sends it later")
    state, place = sink.state, sink.place
    older = sorted(path for path in (folder / "wandb").glob("offline-run-*") if not os.path.samefile(path, place)
                   ) if state == "offline" else []  # fmt: skip
    replay(sink, record, folder)
    sink.finish(EXIT[record["status"]])
    if sink.problem:
        raise SyncError(f"W&B {sink.problem}; nothing is lost, the same command sends it again")
    text = place if state == "online" else f"upload it with: {_upload(folder, os.path.relpath(place, folder))}"
    if refused:
        text += f"\nas {id}, for {' and '.join(refused)} was deleted at W&B, which takes no id back"
    if older:
        text += f"\nit replaces {', '.join(map(str, older))}"
    return Sent("sent" if state == "online" else "offline", text)


def _names(record: dict[str, Any]) -> list[str]:
    """W&B's ids for a run, the second for when the first was deleted there, and so on; no other attempt's."""
    own = run_name(record)
    base = own if record["command"] == "train" or own != record["run_id"] else f"{own}-1"
    return [own, *(f"{base}-{n}" for n in range(2, 10))]


def _upload(folder: Path, place: str) -> str:
    return f"wandb sync {shlex.quote(str(folder / place))}"
