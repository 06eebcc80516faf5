"""SLURM by submitit: its local executor for real, the end of a job's time, and a fake sbatch."""

import json
import os
import re
import time
from importlib import metadata

import jobs
import pytest

pytestmark = pytest.mark.skipif(not [*metadata.distributions(name="hydra-submitit-launcher")],
                                reason="hydra-submitit-launcher is not installed")  # fmt: skip

LOCAL = ["hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1"]


def test_a_sweep_by_the_local_executor(tmp_path):
    out, err = jobs.sweep(tmp_path, "model=explicit", "seed=0,1", "recipe.max_steps=2", *LOCAL).communicate(timeout=240)
    assert "2 jobs: 2 done" in out, err
    assert {seed: rec["environment"]["threads"] for seed, rec in jobs.by_seed(tmp_path).items()} == {0: 1, 1: 1}


def test_at_the_end_of_its_time_a_run_saves_and_goes_back_into_the_queue(tmp_path):
    """submitit's job gets the signal that SLURM would send, and is submitted again by its handler."""
    run = ["model=deq", "recipe.epochs=10", "progress.save_s=0.2"]
    undisturbed = jobs.run(tmp_path / "undisturbed", *run)
    words = [*run, "seed=0", "gpu.threads=1", *LOCAL]
    sweep = jobs.sweep(tmp_path, *words)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/deq-*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (lock,) = tmp_path.glob("runs/deq-*/run.lock")
    os.kill(json.loads(lock.read_text())["pid"], 12)  # SIGUSR2
    out, err = sweep.communicate(timeout=240)
    (rec,) = jobs.by_seed(tmp_path).values()
    assert rec["status"] == "done", err
    assert len(rec["resumed_from"]) == 1
    (folder,) = tmp_path.glob("runs/deq-*")
    assert jobs.same_weights(folder, undisturbed.folder)
    assert "1 jobs: 1 done" in out


SBATCH = """#!/bin/sh
# takes the script, writes down what it asks for, and says that it is job 4711
for last; do :; done
cp "$last" {folder}/script
echo "$@" >> {folder}/asked
echo "Submitted batch job 4711"
"""


def test_the_slurm_preset_asks_for_what_it_says(tmp_path):
    """A queue that never begins: what would be submitted is what the preset has."""
    for name, text in {"sbatch": SBATCH.format(folder=tmp_path), "sacct": "#!/bin/sh\nexit 0\n",
                       "scontrol": "#!/bin/sh\nexit 0\n", "srun": "#!/bin/sh\nexit 0\n"}.items():  # fmt: skip
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    sweep = jobs.sweep(tmp_path, "model=explicit", "seed=0,1,2", "recipe.max_steps=2", "hydra/launcher=slurm",
                  "hydra.launcher.partition=long", "hydra.launcher.array_parallelism=2",
                  PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "script").exists() and time.monotonic() < deadline and sweep.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    sweep.kill()
    _, err = sweep.communicate()
    assert (tmp_path / "script").exists(), err
    script = (tmp_path / "script").read_text()
    for line in ("--time=240", "--cpus-per-task=8", "--gpus-per-node=1", "--partition=long", "--array=0-2%2",
                 "--signal=USR2@120", "--open-mode=append", "--job-name=implicit-bench"):  # fmt: skip
        assert re.search(rf"^#SBATCH {re.escape(line)}$", script, re.M), (line, script)
