"""implicit_bench.world: one run over several processes, which torchrun really starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import torch
from ranks import CASES

from implicit_bench import config, world
from implicit_bench.train import checkpoint

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TRAIN = ("model=skip_deq", "recipe.epochs=3", "recipe.batch=32", "progress.log_steps=10", "progress.save_s=0.2")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def ranks(top):
    """By case: what one process found, and each of two."""
    script = str(HERE / "ranks.py")
    for name, start in (("one", [sys.executable, script]), ("two", [*TORCHRUN, script])):
        done = subprocess.run(start, env={**environment(), "RANKS_OUT": str(top / name)}, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    files = [top / "one.0", top / "two.0", top / "two.1"]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return {of[0]["case"]: of for of in zip(*lines, strict=True)}


def test_the_gradient_over_two_processes_is_that_of_one(tmp_path):
    """Of the second step, on the same global batch, whose second half is harder: to 1e-10 in float64. Every process
    makes as many evaluations and VJPs as one does; where each image is solved by itself, as its own images need."""
    found, wrong = ranks(tmp_path), []
    assert [*found] == [*CASES]
    for case, (one, *two) in found.items():
        assert one["grads"]
        counts = [(each["nfe"], each["vjps"]) for each in two]
        if case == "per sample":
            assert counts[0] < counts[1] == (one["nfe"], one["vjps"])
        else:
            assert counts == [(one["nfe"], one["vjps"])] * 2, case
        for each in two:
            assert each["loss"] == pytest.approx(one["loss"], rel=1e-10), case
            assert each["grads"].keys() == one["grads"].keys()
            wrong += [(case, name) for name, grad in one["grads"].items()
                      if each["grads"][name] != pytest.approx(grad, rel=0, abs=1e-10 * max(1e-3, *map(abs, grad)))]
            wrong += [(case, name) for name, value in one["state"].items()
                      if each["state"][name] != pytest.approx(value, rel=1e-10)]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_statistics_of_two_like_processes_are_those_of_one(monkeypatch, dtype):
    """Both have the same rows, so that every sum is twice a process's own."""
    theirs, ours = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    world.synchronised(torch.nn.Sequential(ours))
    g = torch.randn(4, 3, 5, 5)
    found = []
    for norm in (theirs, ours):
        torch.manual_seed(0)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        if norm is ours:
            monkeypatch.setattr(world, "_world", world.World(0, 2))
            monkeypatch.setattr(world, "stacked", lambda a: torch.cat([a, a]))
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda a: a.mul_(2))
        y = norm((2 * x + 1).to(dtype))
        y.backward(g.to(y.dtype))
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean])
    near = 1e-5 if dtype == torch.float32 else 5e-2
    for one, two in zip(*found):
        assert one.dtype == two.dtype
        torch.testing.assert_close(two, one, rtol=near, atol=near)


def torchrun(top, *words, size=2):
    command = [*TORCHRUN[:-1], f"--nproc_per_node={size}", "-m", "implicit_bench", "train", *jobs.words(top, *words)]
    return subprocess.Popen([*command, "gpu=ddp", "gpu.threads=1"], env=environment(), text=True, cwd=top,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def only(top):
    (folder,) = (top / "runs").glob("*-s0-*")
    return folder, json.loads((folder / "record.json").read_text())


def test_a_run_over_two_processes_is_one_run(tmp_path):
    """One record, one table on the terminal, and the figures of one process, up to rounding; done once for all."""
    started = torchrun(tmp_path, *TRAIN)
    out, err = started.communicate(timeout=200)
    assert started.returncode == 0, err
    assert err.count(" epoch   loss") == 1
    assert out.count("accuracy") == 1
    assert "2 processes, 16 images of a batch each: each solved by itself" in err
    _, rec = only(tmp_path)
    assert rec["environment"]["world_size"] == 2
    one = jobs.run(tmp_path / "one", *TRAIN, "gpu.threads=2")
    assert one.record["run_id"] == rec["run_id"], "the same run, whoever computes it"
    assert rec["metrics"]["test_acc"] == pytest.approx(one.record["metrics"]["test_acc"], abs=0.02)
    assert rec["metrics"]["test_loss"] == pytest.approx(one.record["metrics"]["test_loss"], rel=0.02)
    assert rec["solve"]["test"]["nfe_sample"] == pytest.approx(one.record["solve"]["test"]["nfe_sample"], rel=0.02)
    assert rec["solve"]["test"]["status_counts"] == one.record["solve"]["test"]["status_counts"]
    again = torchrun(tmp_path, *TRAIN)
    assert again.wait(100) == 0
    assert "is done" in again.stdout.read()


def test_a_killed_process_stops_all_and_any_number_of_them_goes_on(tmp_path):
    words = [word for word in TRAIN if "epochs" not in word] + ["recipe.epochs=5"]
    started = torchrun(tmp_path, *words)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/*/last.pt")):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.1)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    second = [pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second[-1]), signal.SIGKILL)
    err = started.communicate(timeout=100)[1]
    assert started.returncode != 0
    folder, rec = only(tmp_path)
    assert "another of the 2 processes has ended" in err
    assert rec["status"] in ("failed", "interrupted")
    kept = checkpoint.load(folder, torch.device("cpu"), print)
    assert kept["step"] > 0
    assert len(kept["others"]) == 1
    alone = jobs.run(tmp_path, *words, "gpu.threads=2")
    assert alone.exit_code == 0
    assert alone.record["resumed_from"][0]["step"] == kept["step"]
    assert alone.record["environment"]["world_size"] == 1


def test_what_cannot_be_shared_is_one_sentence_before_any_work(tmp_path):
    started = torchrun(tmp_path, "recipe.batch=33")
    err = started.communicate(timeout=100)[1]
    (said,) = [line for line in err.splitlines() if line.startswith("implicit-bench:")]
    assert started.returncode != 0
    assert "recipe.batch=33 cannot be shared out evenly by 2 processes; make it a multiple" in said
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["model=neural_ode"], "adjoint=backsolve is steered by all images and parameters as one system"),
     (["model=neural_ode", "adjoint=unroll", "solver=torchdiffeq/dopri5"], "solver=TorchDiffeq steers by the images"),
     (["solver.variant=paper", "stop.per_sample=true"], "solver.variant=paper couples the images"),
     (["solver=homotopy", "network=mdeq_small"], "solver=Homotopy differentiates the cell forward, and the sums")],
)  # fmt: skip
def test_a_layer_that_processes_cannot_share_says_why(monkeypatch, words, sentence):
    parts = config.build(config.compose("train", ["model=deq", *words] if "model" not in words[0] else words).config)
    world.shareable(parts.model.layer, 32)  # one process may
    monkeypatch.setattr(world, "_world", world.World(0, 2))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        world.shareable(parts.model.layer, 32)
    parts = config.build(config.compose("train", ["model=deq", "network=mdeq_small"]).config)
    world.shareable(parts.model.layer, 32)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["train", "model=deq"], "torchrun has started 2 processes of one run; add gpu=ddp"),
     (["train", "-m", "model=deq,cdeq"], "torchrun's processes share one training alone"),
     (["bench", "model=deq,cdeq"], "torchrun's processes share one training alone")],
)  # fmt: skip
def test_torchrun_and_anything_else_do_not_go_together(tmp_path, words, sentence):
    env = {**environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-m", "implicit_bench", *words], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert sentence in done.stderr
