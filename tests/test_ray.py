"""hydra/launcher=ray on a real cluster of two nodes, each with one core: two raylets of this machine."""

import json
import os
import re
import signal
import time
from importlib import metadata
from pathlib import Path

import jobs
import pytest

from implicit_bench import config, lock, mistakes
from implicit_bench.schema import UsageError
from implicit_bench.sweep import cluster, command

pytestmark = pytest.mark.skipif(not [*metadata.distributions(name="hydra-ray-launcher")],
                                reason="no hydra-ray-launcher: pip install 'implicit-bench[ray]'")  # fmt: skip
RAY = "hydra/launcher=ray"


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": cluster.STORE})
    nodes.add_node(num_cpus=1, object_store_memory=cluster.STORE)
    yield nodes.address
    nodes.shutdown()


def test_a_sweep_on_a_cluster_outlives_a_worker_that_is_killed(tmp_path, address):
    """Its job is tried again elsewhere and goes on from its checkpoint; one that fails by itself is not tried again."""
    words = ["model=explicit", "recipe.optimizer=sgd", "recipe.epochs=12", "progress.save_s=0.1"]
    at = f"hydra.launcher.ray.init.address={address}"
    sweep = jobs.sweep(tmp_path, RAY, at, *words, "seed=0,1", "recipe.lr=1e-3,1e30")
    deadline = time.monotonic() + 200
    while not (saved := list(tmp_path.glob("runs/explicit-*/last.pt"))) and time.monotonic() < deadline:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.02)
    killed = saved[0].parent
    os.kill(json.loads((killed / "run.lock").read_text())["pid"], signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 3, err
    assert "4 jobs: 2 done, 2 failed" in out, err
    assert "Traceback" not in err + out
    rec = json.loads((killed / "record.json").read_text())
    assert (rec["status"], len(rec["resumed_from"]), rec["attempt"]) == ("done", 1, 1)
    assert rec["environment"]["threads"] == 1
    assert len(re.findall(r"^.*failed  .*the loss .* was not finite", err, re.M)) == 2, "each is said once"
    seed = f"seed={rec['config']['seed']}"
    undisturbed = jobs.run(tmp_path / "alone", *words, "recipe.lr=1e-3", seed, "gpu.threads=1")
    assert jobs.same_weights(killed, undisturbed.folder)


def test_ctrl_c_lets_the_jobs_of_the_cluster_save(tmp_path, address):
    words = ["model=explicit", "seed=0,1,2", "recipe.epochs=400", f"hydra.launcher.ray.init.address={address}"]
    sweep = jobs.sweep(tmp_path, RAY, *words, "progress.save_s=0.1")
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("runs/explicit-*/last.pt"))) < 2 and time.monotonic() < deadline:
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 130, err
    assert re.search(r"3 jobs: 2 interrupted, 1 not begun", out), err
    assert {seed: rec["status"] for seed, rec in jobs.by_seed(tmp_path).items()} == {0: "interrupted", 1: "interrupted"}
    assert not list(tmp_path.glob("runs/*/run.lock"))
    assert not list(tmp_path.glob("runs/.sweeps/*"))


def test_without_an_address_the_cores_of_this_machine_are_the_cluster(tmp_path):
    out, err = jobs.sweep(tmp_path, RAY, "model=explicit", "seed=0,1", "recipe.max_steps=2").communicate(timeout=300)
    assert "2 jobs: 2 done" in out, err
    assert {rec["status"] for rec in jobs.by_seed(tmp_path).values()} == {"done"}


def test_no_cluster_at_the_address_is_one_sentence_before_any_work(tmp_path):
    sweep = jobs.sweep(tmp_path, RAY, "model=deq", "seed=0,1", "hydra.launcher.ray.init.address=127.0.0.1:1")
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 2
    (said,) = [line for line in err.splitlines() if line.startswith("implicit-bench:")]
    assert "no Ray cluster at 127.0.0.1:1" in said
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*"))


def connect(address, runs, *overrides):
    words = ["hydra/launcher=ray", f"hydra.launcher.ray.init.address={address}", *overrides]
    with cluster.connected(words, [], runs) as needs:
        return needs


def test_a_cluster_that_cannot_do_the_sweep_is_one_sentence(tmp_path, address, monkeypatch):
    assert connect(address, tmp_path) == ["++hydra.launcher.ray.remote.num_gpus=0"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"a job asks for 2 CPU and 0 GPU, and no node .* largest has 1 CPU"):
        connect(address, tmp_path, "hydra.launcher.ray.remote.num_cpus=2")
    with pytest.raises(UsageError, match="a job asks for 1 CPU and 1 GPU"):
        connect(address, tmp_path, "gpu=cuda,cpu")
    with monkeypatch.context() as other:
        other.setattr(cluster, "__version__", "0.0.7")
        with pytest.raises(UsageError, match=r"the node .* has implicit-bench .* and this one 0\.0\.7; install"):
            connect(address, tmp_path)
    monkeypatch.setattr(Path, "touch", lambda self: None)  # a folder that the nodes do not have
    with pytest.raises(UsageError, match=f"the node .* does not see {tmp_path}; give the command"):
        connect(address, tmp_path)


NODES = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("remote", "nodes", "words", "gpus"),
    [({"num_cpus": 1, "num_gpus": None}, NODES, [], 1), ({"num_cpus": 1, "num_gpus": None}, NODES, ["gpu=cpu"], 0),
     ({"num_cpus": 8, "num_gpus": None}, NODES, ["gpu=cpu,cuda"], 1), ({"num_cpus": 1, "num_gpus": 0}, NODES, [], 0),
     ({"num_cpus": 4, "num_gpus": None}, NODES[:1], ["gpu=auto"], 0)],
)  # fmt: skip
def test_a_job_asks_for_a_gpu_where_there_is_one(remote, nodes, words, gpus):
    assert cluster._needs(remote, nodes, words) == [f"++hydra.launcher.ray.remote.num_gpus={gpus}"]


def test_without_the_extra_it_is_one_sentence(monkeypatch):
    real = mistakes._options
    monkeypatch.setattr(mistakes, "_options", lambda group: [name for name in real(group) if name != "ray_aws"])
    with pytest.raises(UsageError, match=r"hydra/launcher=ray needs an extra: pip install 'implicit-bench\[ray\]'"):
        config.compose("train", ["hydra/launcher=ray"])
    with pytest.raises(UsageError, match=r"no hydra/launcher '.ray.'"):
        config.compose("train", ["hydra/launcher=[ray]"])


@pytest.mark.parametrize("again", [True, False])
def test_a_job_that_is_tried_again_waits_for_the_lock_of_the_machine_that_died(tmp_path, monkeypatch, capsys, again):
    """One that is tried for the first time leaves the run to its owner."""
    from implicit_bench.cli import main

    words = jobs.words(tmp_path, "model=explicit", "recipe.max_steps=2")
    name = jobs.run(tmp_path / "before", *words[3:]).folder.name
    monkeypatch.setattr(lock, "SILENCE_S", 2.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    taken = json.dumps({"token": "x", "host": "elsewhere", "place": "another", "pid": 1, "process_start": 0,
                        "since": "2026-01-01T00:00:00+00:00"})  # fmt: skip
    real = command.Sweep.announce

    def announce(self, number, job):
        folder = tmp_path / "runs" / name
        folder.mkdir()
        (folder / "run.lock").write_text(taken)
        real(self, number, job)

    monkeypatch.setattr(command.Sweep, "announce", announce)
    begin = command.Sweep.begin

    def begun(self, jobs, paired):
        begin(self, jobs, paired)
        if again:
            self.tell(0, words, "running")

    monkeypatch.setattr(command.Sweep, "begin", begun)
    assert main(["train", "-m", *words]) == 0
    assert f"1 jobs: 1 {'done' if again else 'elsewhere'}" in capsys.readouterr().out
