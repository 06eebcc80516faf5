"""What each of torchrun's processes does in test_world.py: `ranks.py CASE ...` prints a line of JSON for each."""

import json
import os
import sys
from unittest import mock

import torch

from implicit_bench import config
from implicit_bench.device import Device
from implicit_bench.train import Step
from implicit_bench.world import gathered, mine, shareable, started, synchronised, together, world

DENSE = ["dataset=digits", "network=dense", "network.hidden=12"]
CONV = ["dataset=digits", "network=mdeq_small", "network.channels=[6,6]",  "network.head=[2,4]", "network.features=8",
        "network.expand=2", "network.dropout=0"]  # fmt: skip
GROUP, WHOLE, TIGHT = ["network.norm=group"], ["stop.per_sample=false"], ["stop.tol=1e-6"]
CASES = {
    "per sample": [*DENSE, *TIGHT, "model=deq"],
    "broyden": [*DENSE, *TIGHT, *WHOLE, "model=deq"],
    "broyden as the paper's code": [*DENSE, *TIGHT, *WHOLE, "model=deq", "solver.variant=paper"],
    "anderson": [*DENSE, *TIGHT, *WHOLE, "model=skip_deq", "solver=anderson"],
    "anderson unrolled": [*DENSE, *TIGHT, *WHOLE, "model=deq", "solver=anderson", "adjoint=unroll", "stop.max_steps=6"],
    "vcab3": [*DENSE, *TIGHT, *WHOLE, "model=cdeq", "penalty=[local_error]"],
    "tsit5 unrolled": [*DENSE, *WHOLE, "model=neural_ode", "solver=tsit5", "adjoint=unroll"],
    "given up": [*DENSE, *TIGHT, *WHOLE, "model=deq", "stop.patience=3", "stop.protect=0.001"],
    "homotopy": [*DENSE, *TIGHT, *WHOLE, "model=deq", "solver=homotopy"],
    "linear by anderson": [*DENSE, *TIGHT, *WHOLE, "model=deq", "adjoint.linear=anderson"],
    "jacobian": [*DENSE, *TIGHT, *WHOLE, "model=deq", "penalty=[jacobian]", "penalty.jacobian.probability=0.5"],
    "data mean": [*DENSE, *TIGHT, *WHOLE, "model=deq", "init=data_mean"],
    "batch statistics": [*CONV, "stop.max_steps=8", "model=deq"],
    "batch statistics, one jacobian": [*CONV, "stop.max_steps=8", "model=cdeq", "penalty=[jacobian]"],
    "batch statistics, skip": [*CONV, "stop.max_steps=8", "model=skip_deq"],
    "batch statistics unrolled": [*CONV, "model=explicit", "stop.steps=4"],
    "groups": [*CONV, "stop.max_steps=8", *GROUP, *WHOLE, "model=skip_reg_cdeq"],
}
B = 8


def gradients(words):
    """Two steps' worth: of the second are the gradients, so that what a first step leaves behind is in them."""
    job = config.compose("train", [*words, "gpu=ddp", "gpu.dtype=float64", "gpu.threads=1", "recipe.optimizer=sgd"])
    parts = config.build(job.config)
    shareable(parts.model.layer, B)
    device: Device = config.make(job.config["gpu"], "gpu")
    model = device.place(parts.model)
    if world().size > 1:
        synchronised(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, *parts.dataset.shape, generator=generator, dtype=torch.float64)
    x[B // 2 :] *= 8  # the second half is harder
    y = torch.arange(B) % 10
    step = Step(model, parts.penalties, parts.recipe, device, 10)
    eps = torch.randn(B, model.layer.cell.size, generator=generator, dtype=torch.float64)
    with mock.patch.object(torch, "randn_like", return_value=mine(eps)[0]):
        for _ in range(2):
            loss, out = step(*mine(x, y))
    state = {name: value.tolist() for name, value in model.state_dict().items() if "running" in name or "mean" in name}
    grads = {name: p.grad.flatten().tolist() for name, p in model.named_parameters() if p.grad is not None}
    return {"rank": world().rank, "nfe": out.layer.solution.stats.calls, "vjps": out.layer.backward.vjps,
            "loss": float(sum(gathered(float(loss)))) / world().size, "state": state, "grads": grads}  # fmt: skip


def main(names):
    for name in names:
        torch.manual_seed(0)
        print(json.dumps({"case": name, **gradients(CASES[name])}), flush=True)


if __name__ == "__main__":
    out = open(os.environ["RANKS_OUT"] + f".{started().rank}", "w")  # noqa: SIM115
    with together(lambda: torch.set_num_threads(1), torch.device("cpu")):
        sys.stdout = out
        main(sys.argv[1:] or CASES)
