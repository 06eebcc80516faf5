"""Peak memory of a training step and of a prediction, each row's in a process of its own: above what stood there before
it (weights, optimiser, data, libraries). `python -m implicit_bench.bench.memory` is that process's program.

On a CPU it is the resident set's high-water mark, under the allocator's policy without its padding; on CUDA torch's
own count, taken in the process that times. Read several times: on a CPU one step's reading may be a quarter more than
the next one's, by what the allocator had left where.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import config, machine
from ..terminal import Bar
from .rows import Row

READINGS = 3
Peak = dict[str, list[float]]  # of train and predict, MiB; empty where it is not known
NOTHING: Peak = {"train": [], "predict": []}


def peaks(rows: Sequence[Row], weights: Sequence[Path | None]) -> tuple[list[Peak], dict[str, str]]:
    """Of each row, with its weights from a file of bench/trained.py; and why those without one have none, by label."""
    if not rows:
        return [], {}
    if rows[0].device.torch.type == "cuda":
        return _told(rows, [_tried(row, _cuda, path) for row, path in zip(rows, weights)])
    asked = json.dumps([[row.job.config, path and str(path)] for row, path in zip(rows, weights)])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
           "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}  # its splinters would count  # fmt: skip
    found: list[Any] = []
    with (Bar(len(rows), "rows measured") as bar,
          subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                           env=env) as process):  # fmt: skip
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # it has ended before it read all: what it did not measure is told below
                process.stdin.write(asked)
                process.stdin.close()
            for line in process.stdout:
                if line.startswith("{"):
                    found.append(json.loads(line))
                    bar.at(len(found))
        except BaseException:
            process.kill()
            raise
    found += [{"error": "the process that measures memory ended early"}] * (len(rows) - len(found))
    return _told(rows, found)


def _told(rows: Sequence[Row], found: Sequence[Any]) -> tuple[list[Peak], dict[str, str]]:
    failed = {row.label: str(f["error"]) for row, f in zip(rows, found) if "error" in f}
    return [NOTHING if "error" in f else f for f in found], failed


def _tried(row: Row, measure: Callable[[Row, Callable[[], Any]], float | None], weights: Path | None) -> Any:
    try:
        with row.unchanged():
            if weights:
                row.put(torch.load(weights, map_location=row.device.torch, weights_only=True))
            return _peak(row, measure)
    except Exception as error:
        return {"error": machine.told(error)}


def _cuda(row: Row, work: Callable[[], Any]) -> float:
    before = torch.cuda.memory_allocated(row.device.torch)
    machine.reset_peak_memory(row.device.torch)
    work()
    return torch.cuda.max_memory_allocated(row.device.torch) / 2**20 - before / 2**20


def _resident(row: Row, work: Callable[[], Any]) -> float | None:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier step has left
    if not machine.reset_peak_memory():
        return None
    before = machine.peak_memory_mib()
    work()
    after = machine.peak_memory_mib()
    return None if before is None or after is None else after - before


def _peak(row: Row, measure: Callable[[Row, Callable[[], Any]], float | None]) -> Peak:
    """Of calls after the first, which makes the optimiser's moments and the libraries' own memory."""
    x, y = row.batch(0)

    def predict() -> None:
        with torch.no_grad(), row.device.autocast():
            row.model(x)

    row.step(x, y)
    steps = []
    for _ in range(READINGS):
        row.model.zero_grad(set_to_none=True)
        steps.append(measure(row, lambda: row.step(x, y)))
    row.model.zero_grad(set_to_none=True)
    row.model.eval()
    predict()
    predictions = [measure(row, predict) for _ in range(READINGS)]
    return {"train": [mib for mib in steps if mib is not None],
            "predict": [mib for mib in predictions if mib is not None]}  # fmt: skip


def main() -> None:
    """Standard input: a list of [resolved config, file of weights or null], of one data set. A line of JSON each."""
    asked: list[tuple[dict[str, Any], str | None]] = json.load(sys.stdin)
    torch.set_num_threads(1)  # a process whose threads have begun cannot fork
    first = asked[0][0]
    data = config.make(first["dataset"], "dataset").load(Path(first["paths"]["data"]), torch.device("cpu"))
    for cfg, weights in asked:
        pid = os.fork()
        if pid == 0:
            try:
                device = config.make(cfg["gpu"], "gpu")
                device.begin()
                if device.wants_policy:
                    machine.set_allocator_policy(top_pad=False)
                row = Row("", config.Composed(cfg, {}), data, device)
                print(json.dumps(_tried(row, _resident, Path(weights) if weights else None)), flush=True)
            except BaseException as error:
                print(json.dumps({"error": machine.told(error)}), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            batch = cfg["recipe"]["batch"]
            print(json.dumps({"error": f"out of memory at recipe.batch={batch}; lower it"}), flush=True)
        elif status:
            print(json.dumps({"error": f"the process that measures memory ended with {status}"}), flush=True)


if __name__ == "__main__":
    main()
