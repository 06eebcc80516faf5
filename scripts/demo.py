"""`make demo`: train a Skip DEQ on real images, then time it against its rivals. Under a minute on two cores."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from pathlib import Path

import torch

from implicit_bench import config
from implicit_bench.cli import main
from implicit_bench.device import Device
from implicit_bench.terminal import duration, say, share
from implicit_bench.train.command import Outcome, train

EVERYWHERE = ["gpu.threads=1", *[a for a in sys.argv[1:] if "=" in a]]  # here a second thread only adds noise


def run(*words: str) -> Outcome:
    return train(config.compose("train", [*words, *EVERYWHERE]), [*words, *EVERYWHERE])


def demo() -> int:
    began = time.perf_counter()
    device = Device()
    where = torch.cuda.get_device_name(0) if device.torch.type == "cuda" else "no GPU"
    say("setup", f"{os.cpu_count()} cores · torch {torch.__version__} · {where}")
    skip = run("model=skip_deq", "stop.tol=1e-3")
    if skip.exit_code:
        return skip.exit_code
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        explicit = run("model=explicit", "logger=none")
    metrics, solve = skip.record["metrics"], skip.record["solve"]
    steps = explicit.record["config"]["stop"]["steps"]
    say("beside", f"the head on z0 alone {share(metrics['start_acc'])} · explicit, {steps} tied cells and no solver, "
        f"{share(explicit.record['metrics']['test_acc'])}: on digits accuracy proves little")  # fmt: skip
    code = main(["bench", "model=neural_ode,cdeq,skip_cdeq,explicit", "rounds=40", *EVERYWHERE])
    if code:
        return code
    print("next    implicit-bench train -m model=neural_ode,cdeq,skip_cdeq seed=0,1,2\n"
          "        implicit-bench bench model=neural_ode,cdeq,skip_cdeq dataset=mnist time=2m\n"
          "        implicit-bench list models\n"
          f"        wandb leet {skip.folder}/wandb/latest-run    dashboard, no account needed")  # fmt: skip
    print(f"done in {duration(time.perf_counter() - began)}")
    wrong = [text for text, fine in (
        (f"test accuracy {share(metrics['test_acc'])} is under 0.95", metrics["test_acc"] >= 0.95),
        ("under 95 % of test samples reached residual 1e-3", solve["test"]["converged_fraction"] >= 0.95),
        ("the backward made no iteration", solve["linear_iterations"] > 0),
    ) if not fine]  # fmt: skip
    for text in wrong:
        say("failed", text, err=True)
    return 1 if wrong else 0


def rewrite_readme() -> int:
    """The demo's own words into README.md, between its two marks."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = demo()
    readme = Path(__file__).parent.parent / "README.md"
    head, _, rest = readme.read_text().partition("<!-- demo -->")
    tail = rest.partition("<!-- /demo -->")[2]
    readme.write_text(f"{head}<!-- demo -->\n```\n$ make demo\n{said.getvalue()}```\n<!-- /demo -->{tail}")
    return code


if __name__ == "__main__":
    sys.exit(rewrite_readme() if "--readme" in sys.argv else demo())
