"""Metric sinks. They mirror metrics.jsonl and record.json; nothing is read back from them, and none can stop a run."""

from __future__ import annotations

import atexit
import contextlib
import copy
import json
import os
import queue
import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .mirror import MARKER, content, marker, run_name, sweep
from .record import METRICS, flat

Values = Mapping[str, Any]  # METRICS keys, or any: dots and nested dicts become slashes
GROUPS = ("model", "network", "init", "solver", "stop", "adjoint", "penalty", "dataset")


class Sink:
    """`start`, then rows; `finish` in a finally, with the run's exit code. None raises; only wait and finish wait."""

    def start(self, record: Values, folder: Path, *, resume: bool = False) -> None: ...
    def wait(self, seconds: float) -> None: ...  # until started or given up: before anything is timed
    def hold(self) -> None: ...  # from here a table grows on stderr: what is there to say waits for finish
    def log(self, row: Values, step: int) -> None: ...  # a row of metrics.* holds `epoch` too
    def summary(self, values: Values) -> None: ...
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...
    def image(self, name: str, path: str | Path) -> None: ...
    def finish(self, exit_code: int = 0) -> None: ...


class NoSink(Sink):
    """logger=none."""


class Wandb(Sink):
    """Weights & Biases, in a thread of its own: importing and starting it takes seconds, an unreachable server tens.

    mode=auto is online where a key is configured and accepted, else offline (in FOLDER/wandb, for `sync`), unless
    WANDB_MODE says which. Whatever goes wrong is one line on stderr, and the run goes on. W&B's id is the run_id: a
    resumed training continues it, a forced one replaces it, and bench and compare keep each attempt (-2, -3, ...).
    Under a sweep agent of W&B project and id are the agent's, and ours is run_id in W&B's config.
    Nothing about machine, code or environment is sent; our record holds what matters.
    """

    def __init__(self, mode: Literal["auto", "online", "offline"] = "auto", project: str = "implicit-bench",
                 entity: str | None = None, group: str | None = None, init_timeout: float = 10,
                 finish_timeout: float = 60, system_metrics: bool = False):  # fmt: skip
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"logger.mode is auto, online or offline, not {mode!r}; logger=none is for no W&B")
        self.mode, self.project, self.entity, self.group = mode, project, entity, group
        self.init_timeout, self.finish_timeout, self.system_metrics = init_timeout, finish_timeout, system_metrics
        self.state = "off"  # starting, then online or offline; off before, after, and when W&B failed
        self.place = ""  # the run's page, or its folder for wandb sync
        self.problem = ""  # the first thing that went wrong
        self._pid = 0

    def start(self, record: Values, folder: Path, *, resume: bool = False, id: str | None = None) -> None:
        """`id` stands in for the run's own."""
        mode = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if mode == "disabled":
            return
        self.state, self.place, self.problem, self._pid = "starting", "", "", os.getpid()
        self._held: list[str] | None = None  # lines that wait for the end
        self._speech = threading.Lock()
        self._run: Any = None
        self._wandb: Any = None  # the module
        self._jobs: queue.SimpleQueue[Callable[[], Any] | int] = queue.SimpleQueue()  # an exit code ends them
        self._ready = threading.Event()
        identity = self._identity(record, Path(folder), resume, id)
        self._thread = threading.Thread(target=self._work, args=(mode, identity), name="wandb", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        if self._ours():
            self._ready.wait(seconds)

    def hold(self) -> None:
        if self._ours():
            with self._speech:
                self._held = self._held or []

    def log(self, row: Values, step: int) -> None:
        values = {"step": step, **_flat(row)}  # W&B's own step stays unused: it drops rows that a resumed run repeats
        self._put(lambda: self._run.log(values))

    def summary(self, values: Values) -> None:
        found = _flat(values)
        self._put(lambda: self._run.summary.update(found))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        names, data = [*columns], [list(row) for row in rows]
        self._put(lambda: self._run.log({slashed(name): self._wandb.Table(names, data, allow_mixed_types=True)}))

    def image(self, name: str, path: str | Path) -> None:
        def job() -> None:
            drawing = Path(path).suffix in (".svg", ".html")  # W&B's images are bitmaps
            shown = self._wandb.Html(Path(path).read_text()) if drawing else self._wandb.Image(str(path))
            self._run.log({slashed(name): shown})

        self._put(job)

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run. Waits for uploads, init_timeout + finish_timeout seconds at most."""
        if not self._ours():
            return
        self._jobs.put(exit_code)
        self._thread.join(self.init_timeout + self.finish_timeout)
        if self._thread.is_alive():
            self._off("has not finished in time")
            atexit.register(leave, exit_code)  # runs before wandb's own hooks, which would wait for ever
        atexit.unregister(self._drain)
        self._release()
        self._pid, self.state = 0, "off"

    def _identity(self, record: Values, folder: Path, resume: bool, id: str | None) -> dict[str, Any]:
        """What wandb.init gets, copied: the run goes on and changes its record."""
        training, picked = record["command"] == "train", choices(record["config"])
        name = [picked.get("model"), picked.get("solver"), picked.get("dataset"), f"s{record['config'].get('seed', 0)}"]
        labels = {**{key: record.get(key) for key in ("experiment", "protocol", "length")}, **picked}
        agents = bool(sweep())  # then W&B takes project, entity and id from its agent's environment
        return {
            "project": None if agents else self.project,
            "entity": None if agents else self.entity,
            "group": self.group or record.get("experiment"),
            "job_type": record["command"],
            "id": None if agents else id or run_name(record),
            "name": "-".join(filter(None, name)) if training else folder.name.removesuffix(f"-{record['run_id']}"),
            "tags": sorted(f"{group}={value}"[:64] for group, value in labels.items() if value not in (None, "none")),
            "config": {**copy.deepcopy(record["config"]), **({"run_id": record["run_id"]} if agents else {})},
            "resume": "allow" if training and resume and not agents else None,
            "dir": str(folder.absolute()),  # wandb's service may be that of a parent process, which is elsewhere
        }

    def _work(self, mode: str, identity: dict[str, Any]) -> None:
        """The thread, the only caller of wandb."""
        try:
            Path(identity["dir"], "wandb").mkdir(parents=True, exist_ok=True)  # else wandb falls back to /tmp
            self._open(mode, identity)
        except Exception as error:
            self._off(f"could not start ({_line(error)})")
        self._ready.set()
        while not isinstance(job := self._jobs.get(), int):
            try:
                job()
            except Exception as error:
                self._off(f"failed ({_line(error)})")
        try:
            if self._run is not None:
                self._run.finish(job)
                if not self.problem:
                    self._mark(identity)
        except Exception as error:
            self._off(f"failed at the end ({_line(error)})")
        if self.problem and (wandb := sys.modules.get("wandb")):
            with contextlib.suppress(Exception):  # else its own hook does it at exit, aloud where its service is dead
                wandb.teardown(job)

    def _open(self, mode: str, identity: dict[str, Any]) -> None:
        import wandb

        options: dict[str, Any] = {
            "silent": True, "quiet": True, "console": "off", "init_timeout": self.init_timeout,
            "finish_timeout": self.finish_timeout, "finish_timeout_raises": True,
            "reinit": "create_new", "host": "", "save_code": False,
            "disable_git": True, "disable_code": True, "disable_job_creation": True, "x_disable_meta": True,
            "x_disable_machine_info": True, "x_save_requirements": False, "x_disable_stats": not self.system_metrics,
        }  # fmt: skip
        self._wandb = wandb
        known = set(wandb.Settings.model_fields)  # x_ ones come and go between versions
        settings = wandb.Settings(**{key: value for key, value in options.items() if key in known})
        reason, state = "", "offline"
        if mode not in ("offline", "dryrun"):
            try:
                wandb.setup(wandb.Settings(mode="online", silent=True, quiet=True))
                if wandb.login(prompt=False):
                    self._run, state = wandb.init(mode="online", settings=settings, **identity), "online"
                else:
                    reason = self._fall_back(None)
            except Exception as error:  # a wrong key, or no network
                wandb.teardown(1)  # else its service holds on to the id of the run that could not go online
                reason = self._fall_back(error)
        if self._run is None:
            wandb.setup(wandb.Settings(mode="offline", silent=True, quiet=True))  # without: telemetry, even offline
            self._run = wandb.init(mode="offline", settings=settings, **identity)
        atexit.register(self._drain)
        self._run.define_metric("*", step_metric="step")
        for metric in METRICS:
            if metric.key.startswith("metrics."):
                self._run.define_metric(slashed(metric.key), step_metric="epoch")
        if state == "online":
            self.place = str(self._run.url or "")
            self._tell(f"W&B online: {self.place}")
        else:
            self.place = _short(self._run.settings.sync_dir)
            ours = f"implicit-bench sync {shlex.quote(_path(identity['dir']))}"  # which leaves the agent's id behind
            later = f"wandb sync {shlex.quote(self.place)}" if sweep() else ours
            self._tell(f"W&B offline{reason}; upload later with: {later}")
        self.state = state

    def _fall_back(self, error: Exception | None) -> str:
        """Why an online run becomes an offline one; no error is no key."""
        return f" ({_line(error)})" if error else " (no key found)"

    def _mark(self, identity: Values) -> None:
        """Note for `sync` what W&B now has of this run, unless that is less than the run's own files."""
        folder, run = Path(identity["dir"]), self._run
        before = marker(folder)
        if (self.state == "offline" and identity["resume"]) or (sweep() and before):
            return
        place = self.place if self.state == "online" else os.path.relpath(run.settings.sync_dir, folder)
        found = {"id": run.id, "project": run.project, "entity": identity["entity"], "state": self.state,
                 "place": place, "sweep": sweep(), "content": content(folder)}  # fmt: skip
        (folder / MARKER).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _drain(self) -> None:
        """At exit without a finish: rows first, then wandb's own hook ends the run with the process's exit code."""
        done = threading.Event()
        if self._ours():
            self._jobs.put(done.set)
            done.wait(self.init_timeout)
            self._release()

    def _off(self, what: str) -> None:
        if self.state != "off":
            self.state, self.problem = "off", what
            self._tell(f"W&B {what}; the run goes on without it, metrics.jsonl has every row")

    def _tell(self, line: str) -> None:
        with self._speech:
            if self._held is None:
                _say(line)
            else:
                self._held.append(line)

    def _release(self) -> None:
        with self._speech:
            held, self._held = self._held or [], None
        for line in held:
            _say(line)

    def _put(self, job: Callable[[], Any]) -> None:
        if self._ours():
            self._jobs.put(lambda: job() if self.state != "off" else None)

    def _ours(self) -> bool:
        return self._pid == os.getpid()  # a forked worker has no thread to do jobs


def choices(config: Values) -> dict[str, str]:
    """What each config group was set to: its `name`, else its class as it is called there (EndTime is end_time); of
    penalties, all there are."""
    found = {}
    for group in GROUPS:
        value = config.get(group)
        if group == "penalty" and isinstance(value, Mapping):
            found[group] = "+".join(value)
        elif isinstance(value, Mapping):
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", value.get("_target_", ""))
            foreign = "torchdiffeq/" + value["method"] if words.endswith("Torch_Diffeq") else ""
            found[group] = value.get("name") or foreign or words.rpartition(".")[2].lower()
    return {group: name for group, name in found.items() if name}


def leave(exit_code: int) -> None:
    """End the process now: W&B hangs, and everything of ours is on disk."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def slashed(key: str) -> str:
    """A metric's name in W&B: timing.step_ms -> timing/step_ms."""
    return key.replace(".", "/")


def _flat(values: Values) -> dict[str, Any]:
    return {slashed(key): value.item() if getattr(value, "ndim", None) == 0 else value
            for key, value in flat(values).items() if value is not None and not isinstance(value, Mapping)}  # fmt: skip


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _short(path: str) -> str:
    return str(path).removeprefix(os.getcwd() + os.sep)


def _path(text: str) -> str:
    """As a command takes it for a path, and no name of a run."""
    short = _short(text)
    return short if os.sep in short else f".{os.sep}{short}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
