"""The figures of docs/reliability.md: what a job of a sweep costs that is done already, and jobs an hour by launcher.

usage: python scripts/sweeps.py [done launchers soak] [--jobs N] [--render FILE]

`launchers` runs the same jobs by each launcher that is installed, alone for the machine; `soak` draws the memory that
`make soak` has noted in results/soak.log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import page

from implicit_bench import machine
from implicit_bench.report import plots, tables

SHORT = ("recipe.max_steps=2", "logger=none", "gpu.threads=1")
JOB = ("model=skip_deq", "recipe.epochs=2", "logger=none")
LAUNCHERS = {"basic": [], "joblib": ["hydra.launcher.n_jobs=2"], "ray": ["hydra.launcher.ray.init.log_to_driver=false"]}
PLUGIN = {"joblib": "hydra_plugins.hydra_joblib_launcher", "ray": "hydra_plugins.hydra_ray_launcher"}
WATCH = """
import sys, time
from implicit_bench.cli import main
from implicit_bench.sweep import command
from omegaconf import OmegaConf
real, resolve, watched = command.train_task, OmegaConf.to_container, []
def train_task(cfg):
    watched.append([time.perf_counter(), 0.0, 0.0])
    try:
        return real(cfg)
    finally:
        watched[-1][2] = time.perf_counter()
def to_container(*args, **kwargs):  # the interpolations are a part of composing
    began = time.perf_counter()
    try:
        return resolve(*args, **kwargs)
    finally:
        if watched:
            watched[-1][1] += time.perf_counter() - began
command.train_task, OmegaConf.to_container = train_task, to_container
code = main(sys.argv[1:])
print("watched", *sum(watched, []))
sys.exit(code)
"""


def command(words: list[str], start: list[str]) -> tuple[str, float]:
    """Standard output and seconds."""
    began = time.perf_counter()
    whole = [sys.executable, *start, "train", "-m", *words]
    done = subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout, time.perf_counter() - began


def skipped(jobs: int) -> dict[str, Any]:
    """Milliseconds a job that is done already: ours, and Hydra's until the next begins; median over the jobs."""
    with tempfile.TemporaryDirectory() as name:
        words = ["model=explicit", f"seed=range({jobs})", *SHORT, f"paths.runs={name}"]
        command(words, ["-m", "implicit_bench"])
        out, _ = command(words, ["-c", WATCH])
    assert f"{jobs} skipped" in out, out[-500:]
    times = [float(word) for word in re.search(r"^watched (.*)$", out, re.M)[1].split()]  # type: ignore[index]
    jobs_of = list(zip(times[::3], times[1::3], times[2::3]))  # began, of it resolving, ended
    ours = sorted(end - start - resolving for start, resolving, end in jobs_of)
    theirs = sorted(after - end + resolving for (_, resolving, end), (after, *_) in pairwise(jobs_of))
    return {"jobs": jobs, "ours_ms": 1e3 * ours[len(ours) // 2], "hydra_ms": 1e3 * theirs[len(theirs) // 2]}


def launchers(jobs: int) -> dict[str, Any]:
    """Jobs an hour of one sweep, whole commands, their start among it."""
    found = {}
    for launcher, more in LAUNCHERS.items():
        if launcher in PLUGIN and importlib.util.find_spec(PLUGIN[launcher]) is None:
            continue
        with tempfile.TemporaryDirectory() as name:
            words = [*JOB, f"seed=range({jobs})", f"hydra/launcher={launcher}", *more, f"paths.runs={name}"]
            seconds = command(words, ["-m", "implicit_bench"])[1]
        found[launcher] = {"jobs": jobs, "seconds": seconds, "an_hour": 3600 * jobs / seconds}
        print(f"{launcher}: {jobs} jobs in {seconds:.0f} s", file=sys.stderr)
    return found


def curve(log: Path, picture: Path) -> None:
    """Memory after each run of one process."""
    values = [int(word) for word in re.search(r"^soak of .*: (.*)$", log.read_text(), re.M)[1].split()]  # type: ignore[index]
    series = {"a process, after each of its runs": [(range(1, len(values) + 1), values)],
              "5 % above the twentieth": [((20, len(values)), 2 * (1.05 * values[19],))]}  # fmt: skip
    plots.lines([picture], 6.75, series, "run", "MiB", f"{len(values)} runs in one process")


def render(text: str, found: dict[str, Any]) -> str:
    parts = {}
    where = found["machine"]["hardware"]
    if done := found.get("done"):
        parts["done"] = (f"A job that is done costs {done['ours_ms']:.1f} ms of ours beside the {done['hydra_ms']:.0f} "
                         f"ms that Hydra takes to compose it ({done['jobs']} jobs, medians; {where}).\n")  # fmt: skip
    if by := found.get("launchers"):
        base = by["basic"]["an_hour"]
        rows = [[name, f"{one['jobs']}", f"{one['seconds']:.0f} s", f"{one['an_hour']:.0f}",
                 f"{one['an_hour'] / base:.2f}×"] for name, one in by.items()]  # fmt: skip
        columns = ["launcher", "jobs", "whole command", "jobs an hour", "against basic"]
        parts["launchers"] = tables.markdown(columns, rows)
    return page.put(text, parts)


def main() -> None:
    found = page.parser(__doc__, "reliability", {"jobs": 24})
    args = page.asked(found, ("done", "launchers", "soak"), render)
    if args is None:
        return
    if "soak" in args.names:
        curve(args.results / "soak.log", args.page.with_name("soak.svg"))
    if args.names == ["soak"]:
        return
    file, where = page.kept(args.results, "sweeps.json")
    content = json.loads(file.read_text()) if file.exists() else {}
    alone = machine.Alone()
    if "done" in args.names:
        content["done"] = skipped(100)
    if "launchers" in args.names:
        content["launchers"] = launchers(args.jobs)
    content["machine"] = {**where, "cores": os.cpu_count(), "alone": alone.read()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    args.page.write_text(render(args.page.read_text(), content))
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
