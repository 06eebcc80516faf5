"""A multirun: what each of its jobs came to, and how far all of them are, in a folder that every process sees."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..machine import cores
from ..record import whole
from ..report import tables
from ..terminal import ONE_BAR, Bar, duration, progress, say, share

STATES = ("done", "skipped", "elsewhere", "failed", "interrupted", "lost", "not begun")
BAD = ("failed", "lost", "not begun")
RUNNING = "running"
_ended: dict[str, dict[int, dict[str, Any]]] = {}  # by folder, what is read once: it changes no more
STOP = "stop"  # a file of the sweep's folder
PATIENCE_S = 60.0  # for a step to end, and its state to be saved
SHOWN = 40  # jobs; of more, only those that are not done


class Sweep:
    """FOLDER/plan.json is the parent's, FOLDER/N.json that of a job which has begun. Plain files, for a launcher may
    run a job in any process of any machine that sees the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, jobs: Sequence[Sequence[str]] | None, paired: bool = False) -> None:
        """The words of each job, where they are known; `paired`: Hydra is told a job's number only, since the words
        are no product of lists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("plan", {"jobs": jobs and [[*words] for words in jobs], "paired": paired, "began": time.time()})

    @property
    def plan(self) -> dict[str, Any]:
        return self._read("plan") or {"jobs": None, "paired": False, "began": time.time()}

    def own_words(self, number: int) -> list[str] | None:
        plan = self.plan
        return plan["jobs"][number] if plan["paired"] else None

    def tell(self, number: int, words: Sequence[str], state: str, seconds: float | None = None, name: str = "",
             error: str = "", test_acc: float | None = None) -> None:  # fmt: skip
        """A job has ended so. One that never tells, or cannot, is lost."""
        with contextlib.suppress(OSError):
            self._write(str(number), {"words": [*words], "state": state, "seconds": seconds, "name": name,
                                      "error": error, "test_acc": test_acc})  # fmt: skip

    def told(self) -> dict[int, dict[str, Any]]:
        """By number, what the jobs that have begun came to so far."""
        ended = _ended.setdefault(str(self.folder), {})
        numbers = sorted(int(name[:-5]) for name in os.listdir(self.folder) if name[:-5].isdigit())
        found = {number: ended.get(number) or self._read(str(number)) for number in numbers}
        told = {number: said for number, said in found.items() if said}
        ended.update({number: said for number, said in told.items() if said["state"] not in (RUNNING, "interrupted")})
        return told

    def announce(self, number: int, words: Sequence[str]) -> None:
        """Before a job: the place it has among all, and the time that those left will take at the pace so far."""
        plan, told = self.plan, {k: said for k, said in self.told().items() if said["state"] != RUNNING}
        many = len(plan["jobs"] or ())
        total = f" of {many}" if many else ""
        counts = ", ".join(f"{n} {state}" for state, n in _counts(told).items())
        trained = sum(said["state"] not in ("skipped", "elsewhere") for said in told.values())
        text = f"job {number + 1}{total}" + (f" · {counts}" if counts else "")
        if trained and many:
            pace = (time.time() - plan["began"]) / trained
            text += f" · about {duration(pace * (many - len(told)))} left"
        progress("sweep", text)
        self.tell(number, words, RUNNING)

    @property
    def stopping(self) -> bool:
        return (self.folder / STOP).exists()

    @contextlib.contextmanager
    def sparing(self) -> Iterator[None]:
        """Within, Ctrl-C and SIGTERM ask the jobs of other processes to save and end, and act when they have: a
        launcher would end its workers in the middle of a step. A second Ctrl-C acts at once."""
        signals = signal.SIGINT, signal.SIGTERM

        def end(signum: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            progress("sweep", "asking the jobs that run to save and end")
            (self.folder / STOP).touch()
            until = time.monotonic() + PATIENCE_S
            while any(said["state"] == RUNNING for said in self.told().values()) and time.monotonic() < until:
                time.sleep(0.2)
            raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(s, end) for s in signals]
        try:
            yield
        finally:
            for s, handler in zip(signals, before):
                signal.signal(s, handler)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Within, a job that is asked to end gets the signal that a scheduler would send."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                if self.stopping:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def close(self) -> list[dict[str, Any]]:
        """Print what became of every job, remove the folder, and return what `tell` was told of each, in order."""
        plan, told = self.plan, self.told()
        _ended.pop(str(self.folder), None)
        for said in told.values():
            if said["state"] == RUNNING:
                said |= {"state": "lost", "error": "its process ended without a word"}
        for number, words in enumerate(plan["jobs"] or ()):
            told.setdefault(number, {"words": words, "state": "not begun", "name": "", "seconds": None,
                                     "test_acc": None, "error": ""})  # fmt: skip
        counts = _counts(told)
        spent = duration(time.time() - plan["began"])
        common = set.intersection(*[set(said["words"]) for said in told.values()]) if len(told) > 1 else set()
        told = dict(sorted(told.items()))
        seen = told if len(told) <= SHOWN else {k: said for k, said in told.items() if said["state"] not in STATES[:2]}
        rows = [[str(number + 1), " ".join(word for word in said["words"] if word not in common), said["state"],
                 share(said["test_acc"]), "–" if said["seconds"] is None else duration(said["seconds"]),
                 said["error"] or said["name"]] for number, said in seen.items()]  # fmt: skip
        if rows:
            tables.show(["job", "words", "state", "test acc", "time", "run, or error"], rows, spare=["time"])
        say("sweep", f"{len(told)} jobs: {', '.join(f'{n} {state}' for state, n in counts.items())} · {spent}")
        for path in (*self.folder.glob("*.json"), self.folder / STOP, self.folder / "multirun.yaml"):  # that is Hydra's
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a launcher's own logs may be there
            self.folder.rmdir()
        return [*told.values()]

    @contextlib.contextmanager
    def watched(self, here: bool) -> Iterator[None]:
        """While the jobs run: where they do so elsewhere, one bar for all of them."""
        before = os.environ.get(ONE_BAR)
        os.environ[ONE_BAR] = str(os.getpid())
        stop = threading.Event()
        thread = None if here else threading.Thread(target=self._watch, args=(stop,), daemon=True)
        if thread:
            thread.start()
        try:
            yield
        finally:
            os.environ.pop(ONE_BAR)
            os.environ.update({} if before is None else {ONE_BAR: before})
            stop.set()
            if thread:
                thread.join()

    def _watch(self, stop: threading.Event) -> None:
        jobs = self.plan["jobs"]
        with Bar(jobs and len(jobs), "jobs") as bar:
            while not stop.wait(1.0):
                counts = _counts(self.told())
                bar.at(sum(counts.values()), lambda counts=counts: ", ".join(f"{n} {s}" for s, n in counts.items()))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with whole(self.folder / f"{name}.json") as file:
            file.write(json.dumps(content).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class Lean:
    """A callback of Hydra's, which reads all its files again for every job, and keeps of each what it returned, with
    both its configs: 170 kB a job."""

    def on_multirun_start(self, config: Any, **more: Any) -> None:
        from hydra.core.global_hydra import GlobalHydra

        from ..known import know

        know(GlobalHydra.instance().config_loader())

    def on_job_end(self, config: Any, job_return: Any, **more: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda **given: None
        raise AttributeError(name)


def _counts(told: dict[int, dict[str, Any]]) -> Counter[str]:
    """In the order of STATES."""
    counts = Counter(said["state"] for said in told.values())
    return Counter({state: counts[state] for state in STATES if counts[state]})


def shared(jobs: Sequence[Any], hydras: Sequence[str], search: Sequence[str]) -> None:
    """Give composed jobs the threads that they will have under the launcher that these words of Hydra's name."""
    if not hydras:
        return
    from ..config import launcher

    share = share_of_cores(launcher(hydras, search))
    for job in jobs:
        job.config["gpu"]["threads"] = job.config["gpu"]["threads"] or share


def share_of_cores(launcher: Mapping[str, Any]) -> int | None:
    """Threads for a job that runs beside others under this launcher of Hydra's, so that they do not fight; None where
    it has the machine to itself."""
    if n_jobs := launcher.get("n_jobs"):  # joblib: -1 is every core, -2 all but one
        beside = n_jobs if n_jobs > 0 else max(1, cores() + 1 + n_jobs)
        return max(1, cores() // beside)
    if "cpus_per_task" in launcher:  # submitit
        return min(cores(), launcher["cpus_per_task"] or 1)
    if "ray" in launcher:
        return max(1, int(launcher["ray"].get("remote", {}).get("num_cpus") or 1))
    return None
