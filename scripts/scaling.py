"""The figures of docs/cluster.md: one run over one process and over two, a thread each, and what its sums cost.

usage: python scripts/scaling.py [--rounds N] [--render FILE]     (alone on the machine; a few minutes)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import page
import torch

from implicit_bench import config, machine, world
from implicit_bench.report import tables
from implicit_bench.train import Step

MDEQ = ["model=deq", "network=mdeq_small", "network.dropout=0", "stop.max_steps=12"]  # batch statistics
CASES = {  # each with a batch that two processes share out
    "deq, dense, each image of 256 by itself": ["model=deq", "network=dense", "network.hidden=512", "recipe.batch=256"],
    "deq, mdeq_small, batch of 8": [*MDEQ, "recipe.batch=8"],
    "deq, mdeq_small, batch of 32": [*MDEQ, "recipe.batch=32"],
}  # fmt: skip
WARM = 1
IMAGES = ["dataset=cifar10", "gpu=ddp", "gpu.threads=1"]


def one_case(words: list[str], rounds: int, size: int) -> dict[str, float]:
    job = config.compose("train", [*IMAGES, *words])
    device = config.make(job.config["gpu"], "gpu")
    device.begin()
    parts = config.build(job.config)
    model = device.place(parts.model)
    if size > 1:
        world.synchronised(model)
    step = Step(model, parts.penalties, parts.recipe, device, 1000)
    generator = torch.Generator().manual_seed(0)
    x = device.images(torch.randn(parts.recipe.batch, *parts.dataset.shape, generator=generator))
    x, y = world.mine(x, torch.arange(parts.recipe.batch) % parts.dataset.classes)
    seconds, solver_steps, waited, real = [], [], [0.0], torch.distributed.all_reduce

    def all_reduce(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        found = real(*args, **more)
        waited.append(time.perf_counter() - began)
        return found

    torch.distributed.all_reduce = all_reduce
    for _ in range(rounds + WARM):
        waited.clear()
        began = time.perf_counter()
        _, out = step(x, y)
        seconds.append(time.perf_counter() - began)
        solver_steps.append(float(out.layer.solution.stats.steps.max()))
    torch.distributed.all_reduce = real
    number, one = torch.zeros(1, 1), []
    for _ in range(300):
        began = time.perf_counter()
        world.summed(number)
        one.append(time.perf_counter() - began)
    return {"step_ms": 1e3 * statistics.median(seconds[WARM:]), "sums": len(waited), "sums_ms": 1e3 * sum(waited),
            "sum_us": 1e6 * statistics.median(one),
            "solver_steps": statistics.median(solver_steps[WARM:])}  # fmt: skip


def worker(rounds: int) -> None:
    """One of torchrun's processes: seconds of each step, its sums a step, and of one sum alone."""
    found: dict[str, Any] = {}
    with world.together(lambda: None, torch.device("cpu")) as here:
        for name, words in CASES.items():
            found[name] = one_case(words, rounds * (1 if "mdeq" in name else 10), here.size)
    if world.started().first:
        print("found", json.dumps(found), flush=True)


def measure(rounds: int) -> dict[str, Any]:
    """By number of processes; interleaved, the median of three."""
    each: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SCALING_ROUNDS": str(rounds)}
    for _ in range(3):
        for size, seen in each.items():
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
            whole = [sys.executable, *torchrun, __file__]
            out = subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
            seen.append(json.loads(next(line[6:] for line in out.splitlines() if line.startswith("found "))))
            print(size, seen[-1], file=sys.stderr)
    return {str(size): {name: {key: statistics.median(one[name][key] for one in seen) for key in seen[0][name]}
                        for name in CASES} for size, seen in each.items()}  # fmt: skip


def render(text: str, found: dict[str, Any]) -> str:
    rows = []
    for name, one in found["1"].items():
        two = found["2"][name]
        speed = one["step_ms"] / two["step_ms"]
        spent = two["sums_ms"] / two["step_ms"]
        rows.append([name, f"{one['step_ms']:.0f}", f"{two['step_ms']:.0f}", f"{speed:.2f}×", f"{speed / 2:.0%}",
                     f"{two['solver_steps']:.0f}", f"{two['sums']:.0f}", f"{two['sum_us']:.0f} µs", f"{spent:.1%}"])
    columns = ["one run", "1 process, ms a step", "2 processes", "faster", "efficiency", "solver steps", "sums a step",
               "one sum alone", "share of a step"]  # fmt: skip
    return page.put(text, {"scaling": tables.markdown(columns, rows)})


def main() -> None:
    if "RANK" in os.environ:
        worker(int(os.environ["SCALING_ROUNDS"]))
        return
    args = page.asked(page.parser(__doc__, "cluster", {"rounds": 3}), (), render)
    if args is None:
        return
    alone, (file, where) = machine.Alone(), page.kept(args.results, "scaling.json")
    content: dict[str, Any] = measure(args.rounds)
    content["machine"] = {**where, "alone": alone.read()}
    file.write_text(json.dumps(content, indent=1) + "\n")
    args.page.write_text(render(args.page.read_text(), content))


if __name__ == "__main__":
    main()
