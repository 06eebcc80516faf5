"""The command line: one dispatcher. Help and list answer without importing torch or Hydra."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .help import HELP, PROG, USAGE


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
    rows = config.expand(words.overrides, words.search)
    if named := any(word.partition("=")[0].split(".")[0] == "dataset" for word in words.overrides):
        jobs = config.compose_all("data", rows, words.search)
    else:
        names = sorted({path.stem for folder in (config.config_dir(), *map(Path, words.search))
                        for path in (folder / "dataset").glob("*.yaml")})  # fmt: skip
        jobs = config.compose_all("data", [[f"dataset={name}", *row] for row in rows for name in names], words.search)
    from .report import tables
    from .terminal import say

    table = []
    for job in jobs:
        dataset, root = config.make(job.config["dataset"], "dataset"), Path(job.config["paths"]["data"])
        if named:
            dataset.fetch(root, lambda line: say("data", line))
            continue
        row = dataset.describe(root)
        mb = ["?" if n is None else f"{n:,.0f}" if n else "–" for n in (row["bytes"] / 1e6, row["download_mb"])]
        table.append([job.choices["dataset"], row["state"], *mb, row["folder"], row["how"]])
    if not named:
        print(tables.text(["data set", "state", "MB", "to fetch, MB", "folder", "how"], table))
    return 0


def _check(args: list[str]) -> int:
    from . import config

    words = split(args)
    if words.flags:
        return _show("check", words)
    jobs = config.compose_all("check", config.expand(words.overrides, words.search), words.search)
    from .check import check

    return max([check(job) for job in jobs])


def _list(args: list[str]) -> int:
    from .config import config_dir, plural
    from .schema import GROUPS, UsageError, nearest

    words = split(args)
    if words.flags or words.multirun:
        raise UsageError("list takes no flag but --config-dir")
    args, folders = words.overrides, [config_dir(), *map(Path, words.search)]
    names = {name: group for group in GROUPS for name in (plural(group), group)}
    for a in args:
        if a not in names:
            options = [plural(group) for group in GROUPS]
            raise UsageError(f"nothing called {a!r} to list{nearest(a, options, len(options))}")
    wanted = [names[a] for a in args] or GROUPS
    for group in wanted:
        if len(wanted) > 1:
            print(f"{group}=")
        paths = [(path, f / group) for f in folders for path in (f / group).rglob("*.yaml")]
        found = {path.relative_to(folder).with_suffix("").as_posix(): path for path, folder in paths}
        for name, path in sorted(found.items()):
            comments = [line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            print(f"  {name:<19} {next((c for c in comments if not c.startswith('@')), '')}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "bench": _bench, "check": _check, "data": _data, "list": _list
}  # fmt: skip
