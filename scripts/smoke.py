"""Does every experiment learn? length=smoke of each on real images; the mean loss of the last fifth of the steps must
be less than nine tenths of the first fifth's.

usage: python scripts/smoke.py [experiment ...] [--seeds 3] [--runs DIR] [--data DIR] [key=value ...]

Without names: those whose data can be fetched everywhere and whose steps a CPU can afford. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from implicit_bench import config
from implicit_bench.jsonl import read_jsonl
from implicit_bench.report import tables
from implicit_bench.terminal import duration, number, say
from implicit_bench.train.command import train

EXPERIMENTS = ["cdeq_mnist", "homo_mnist", "homo_cifar10", "mdeq_fashion", "cdeq_cifar10_small"]
FALLEN = 0.9


def fifths(folder: Path) -> tuple[float, float]:
    """Mean loss of the first and the last fifth, of rows that are means since the epoch began."""
    means = {row["step"]: row["metrics.train_loss"] for row in read_jsonl(folder / "metrics.jsonl")}
    last = max(means)
    fifth = last // 5
    return means[fifth], (last * means[last] - (last - fifth) * means[last - fifth]) / fifth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--data", default="data")
    args = parser.parse_intermixed_args()
    common = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word] or EXPERIMENTS
    rows = []
    for name in names:
        for seed in range(args.seeds):
            words = [f"experiment={name}", f"seed={seed}", "length=smoke", "logger=none", "progress.log_steps=10",
                     f"paths.runs={args.runs}", f"paths.data={args.data}", *common]  # fmt: skip
            done = train(config.compose("train", words), words)
            if done.exit_code:
                return done.exit_code
            first, last = fifths(done.folder)
            step, total = (done.record["timing"][key] for key in ("step_ms", "total_s"))
            rows.append([name, seed, number(first), number(last), number(last / first), number(step["median"]),
                         duration(total)])  # fmt: skip
            say("smoke", f"{name} seed {seed}: loss {first:.3f} to {last:.3f}, {last / first:.2f} of it")
    tables.show(["experiment", "seed", "first fifth", "last fifth", "ratio", "ms/step", "time"], rows)
    return int(any(float(row[4]) >= FALLEN for row in rows))


if __name__ == "__main__":
    sys.exit(main())
