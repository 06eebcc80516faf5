"""`implicit-bench train -m`: every job of a multirun, by Hydra and its launchers."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..guard import guarded, refuse
from ..handover import hand_over
from ..help import PROG
from ..schema import UsageError, first_line
from ..words import Words, of_hydra, quoted
from .board import BAD, Sweep, share_of_cores


class JobFailed(Exception):
    """A run of a sweep failed and has said so; the others go on."""


def sweep(words: Words) -> int:
    """What the words list, or the rows of a table; 3 when some failed."""
    jobs, paired, runs = _jobs(words, any(o.startswith("hydra/sweeper=") for o in words.overrides))
    bad, told = run(jobs, paired, runs, words)
    if jobs and not paired:  # a sweeper that chooses them may have tried anything
        from ..compare.command import after_sweep

        after_sweep(told, runs)
    return refuse("some runs of the sweep failed; the same command runs those again and no other", 3) if bad else 0


def run(jobs: Sequence[Sequence[str]] | None, paired: bool, runs: Path, words: Words
        ) -> tuple[bool, list[dict[str, Any]]]:
    """Whether any failed, and what each came to. `jobs`: the words of each, unless a sweeper chooses them; where they
    are `paired`, Hydra sees nothing of these words but what is its own."""
    from .. import config, record

    given = {o.partition("=")[0]: o.partition("=")[2] for o in words.overrides}
    record.writable("paths.runs", runs)
    named = config.parse([o for o in words.overrides if o.startswith("hydra.sweep.dir=")])
    top = str(named[-1].value()) if named else runs / ".sweeps"
    folder = Path(top) / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # its own: beside it may lie a user's files
    board, launcher = Sweep(folder.absolute()), given.get("hydra/launcher", "basic")
    own = of_hydra(words.overrides) if paired else words.overrides
    own = [o for o in own if not o.startswith("hydra.sweep.dir=")]
    own = [*own, f"+job=range({len(jobs or ())})"] if paired else own
    own += [f"hydra.sweep.dir={quoted(str(board.folder))}",
            "+hydra.callbacks.lean._target_=implicit_bench.sweep.board.Lean"]  # fmt: skip
    cluster: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([])
    if launcher == "ray":
        from .cluster import connected

        cluster = connected(words.overrides, words.search, runs)
    with cluster as more:
        board.begin(jobs, paired)
        return _launched(board, launcher, words, [*own, *more])


def _launched(board: Sweep, launcher: str, words: Words, own: Sequence[str]) -> tuple[bool, list[dict[str, Any]]]:
    gave_up = False
    try:
        apart = board.sparing() if launcher in ("joblib", "ray") else contextlib.nullcontext()
        with board.watched(here=launcher == "basic"), apart:
            hand_over("train", words, ["--multirun", *own], train_task)
    except JobFailed:
        pass
    except UsageError:
        raise
    except Exception as error:
        if launcher == "basic":
            raise
        gave_up = True
        print(f"{PROG}: the launcher {launcher} gave up: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    finally:
        told = board.close()
    return gave_up or any(said["state"] in BAD for said in told), told


def _jobs(words: Words, chosen: bool) -> tuple[list[list[str]] | None, bool, Path]:
    """The words of each job, whether they are no product of lists, and where the records go. Raises UsageError before
    anything runs. `chosen`: by a sweeper that reads ranges its own way, so that the jobs are not known."""
    from .. import config, papers

    if chosen:
        plainly = [o for o in words.overrides if o.startswith("paths.runs=")]
        return None, False, Path(config.compose("train", plainly, words.search).config["paths"]["runs"])
    table = papers.sweep(words.overrides, words.search)
    jobs = table or config.expand(words.overrides, words.search)
    some = jobs if table else config.each_value(words.overrides, words.search)
    composed = config.compose_all("train", some, words.search)
    for job in composed:
        config.make_alone(job.config)
    if any(job.config["match"] for job in composed):  # before jobs run side by side, and each measures a depth
        from .. import match

        match.matched(config.compose_all("train", jobs, words.search), words.search, aloud=False)
    return jobs, table is not None, Path(composed[0].config["paths"]["runs"])


def train_task(cfg: Any) -> float | None:
    """One job of a multirun, in this process or a launcher's worker; returns test accuracy, for sweepers."""
    from hydra.core.hydra_config import HydraConfig

    from .. import config, match
    from ..lock import BEAT_S, SILENCE_S, RunLocked
    from ..train.command import Outcome, train
    from ..train.signals import tell_queue

    runtime, began = HydraConfig.get(), time.perf_counter()
    with contextlib.suppress(OSError):  # a worker of a cluster began elsewhere
        os.chdir(runtime.runtime.cwd)
    search = [source.path for source in runtime.runtime.config_sources if source.provider == "command-line"]
    sweep, number = Sweep(Path(runtime.sweep.dir)), runtime.job.num
    if sweep.stopping:
        return None
    own = sweep.own_words(number)
    words = list(runtime.overrides.task) if own is None else own
    outcomes: list[Outcome] = []
    ended: dict[str, Any] = {"state": "interrupted"}

    def job() -> int:
        if own is None:
            choices = {k: v for k, v in runtime.runtime.choices.items() if not k.startswith("hydra/") and v is not None}
            given = config.resolved(cfg, choices, words)
        else:
            given = config.compose("train", own, search)
        gpu = given.config["gpu"]
        gpu["threads"] = gpu["threads"] or share_of_cores(runtime.launcher)
        outcomes.append(train(match.one(given, search), words))
        return outcomes[0].exit_code

    def in_turn() -> int:
        until = time.monotonic() + (SILENCE_S + 2 * BEAT_S if again else 0)
        while True:
            try:
                return job()
            except RunLocked:
                if time.monotonic() > until:
                    raise
                time.sleep(BEAT_S)

    def telling() -> int:
        try:
            return in_turn()
        except RunLocked:
            ended["state"] = "elsewhere"
            raise
        except Exception as problem:
            ended.update(state="failed", error=str(problem) or type(problem).__name__)
            raise

    again = number in sweep.told()  # its worker has died, and on another machine its lock outlives it for a while
    sweep.announce(number, words)
    try:
        with sweep.heeded() if {"ray", "n_jobs"} & {*runtime.launcher} else contextlib.nullcontext():
            code = guarded(telling)
        if outcomes:
            rec = outcomes[0].record
            state = "skipped" if outcomes[0].skipped else {0: "done", 1: "failed", 130: "interrupted"}[code]
            ended = {"state": state, "name": outcomes[0].folder.name, "error": rec["error"] or "",
                     "test_acc": rec["metrics"]["test_acc"]}  # fmt: skip
    finally:
        sweep.tell(number, words, seconds=time.perf_counter() - began, **ended)
    if code == 130:
        tell_queue()
        raise SystemExit(130)  # no Exception, so that Hydra stops the sweep; Ray tries it again, on another worker
    if ended["state"] == "elsewhere":
        return None
    if code:
        raise JobFailed
    return outcomes[0].record["metrics"]["test_acc"]
