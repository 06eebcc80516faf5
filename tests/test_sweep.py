"""Under a sweep agent of W&B: the shipped sweep file, wandb's own agent up to the process that it starts, and that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_log import fake as fake
from test_log import finished, inspect, record

from implicit_bench import config, mirror
from implicit_bench.log import slashed
from implicit_bench.record import METRICS
from implicit_bench.sync import send

SWEEP = Path(__file__).parent.parent / "scripts" / "wandb_sweep.yaml"
AGENTS = {"WANDB_SWEEP_ID": "swp12345", "WANDB_RUN_ID": "agent678"}


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """wandb's agent, but for the process: what it would start for these parameters, and in which environment."""
    from wandb import wandb_agent
    from wandb.sdk.launch.sweeps import utils

    started = []

    class Process:
        def __init__(self, env, command, **_):
            started.append((command, env))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    for name in (*AGENTS, "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        monkeypatch.setenv(name, AGENTS.get(name, ""))
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH")
    monkeypatch.delenv("WANDB_DIR")
    shipped = utils.load_sweep_config(str(SWEEP))

    def start(parameters):
        one = wandb_agent.Agent(None, None, sweep_id=AGENTS["WANDB_SWEEP_ID"])
        one._sweep_command = shipped["command"]
        values = {name: {"value": value} for name, value in parameters.items()}
        one._command_run({"run_id": AGENTS["WANDB_RUN_ID"], "program": shipped["program"], "args": values})
        return started[-1]

    yield shipped, start
    for name in AGENTS:  # the agent writes into the environment itself
        os.environ.pop(name, None)


def samples(parameters):
    """Both ends of each range, and each value."""
    ends = {name: given.get("values") or [given["min"], given["max"]] for name, given in parameters.items()}
    longest = max(map(len, ends.values()))
    return [{name: values[i % len(values)] for name, values in ends.items()} for i in range(longest)]


def test_every_sample_of_the_sweep_file_becomes_a_command_that_composes(agent):
    shipped, start = agent
    drawn = samples(shipped["parameters"])
    assert len(drawn) == 4
    for sample in drawn:
        command, _ = start(sample)
        assert command[:2] == ["implicit-bench", "train"]
        job = config.compose("train", command[2:])
        assert job.config["recipe"]["lr"] == sample["recipe.lr"]
        assert job.config["stop"]["tol"] == sample["stop.tol"]
        assert job.config["model"]["name"] == sample["model"]
        assert job.config["dataset"]["name"] == "digits"


def test_the_sweep_file_judges_by_a_metric_that_runs_have(agent):
    shipped, _ = agent
    (metric,) = [m for m in METRICS if slashed(m.key) == shipped["metric"]["name"]]
    assert shipped["metric"]["goal"] == {"higher": "maximize", "lower": "minimize"}[metric.better]
    assert shipped["method"] == "bayes"
    assert shipped["program"] == shipped["command"][0]


def test_what_the_agent_starts_is_the_agents_run_also_when_ours_is_done_already(agent, tmp_path):
    shipped, start = agent
    command, environment = start(samples(shipped["parameters"])[1])
    words = [*command[1:], "recipe.max_steps=40", "gpu.threads=1"]
    found = []
    for id in (AGENTS["WANDB_RUN_ID"], "another9"):  # the sweep may draw the same values twice
        environment |= {"WANDB_MODE": "offline", "WANDB_RUN_ID": id}
        done = subprocess.run([sys.executable, "-m", "implicit_bench", *words], capture_output=True, text=True,
                              env=environment, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / "runs").iterdir()
        (place,) = (folder / "wandb").glob(f"offline-run-*-{id}")
        summary = json.loads(inspect(place, "--summary"))
        lines = [json.loads(line) for line in inspect(place).splitlines()]
        (begun,) = [line["run"] for line in lines if line["type"] == "run"]
        assert summary["run_id"] == id
        assert begun["sweep_id"] == AGENTS["WANDB_SWEEP_ID"]
        assert folder.name.endswith(summary["config"]["run_id"])
        found.append((summary["summary"]["metrics/val_acc"], summary["summary"]["metrics/test_acc"], done))
    assert found[0][:2] == found[1][:2]
    assert "W&B offline; upload later with: wandb sync runs/" in found[0][2].stderr  # which keeps it in its sweep
    assert "is done: test accuracy" in found[1][2].stdout
    assert mirror.marker(folder)["id"] == AGENTS["WANDB_RUN_ID"]


def test_the_agents_project_and_id_are_left_to_it(fake, tmp_path, monkeypatch):
    for name, value in AGENTS.items():
        monkeypatch.setenv(name, value)
    finished(wandb("p", "e"), tmp_path, resume=True)
    got = fake.runs[0].identity
    assert [got[key] for key in ("id", "project", "entity", "resume")] == [None] * 4
    assert got["config"]["run_id"] == record()["run_id"]


def test_sync_leaves_a_sweeps_run_to_the_sweep(fake, tmp_path, monkeypatch):
    from test_sync import stored

    folder, rec = stored(tmp_path)
    with monkeypatch.context() as patch:
        for name, value in AGENTS.items():
            patch.setenv(name, value)
        finished(wandb(), folder, record=rec)
        with pytest.raises(RuntimeError, match="WANDB_SWEEP_ID is set"):
            send(folder)
    label, text = send(folder)
    assert label == "skipped"
    assert text.startswith("it belongs to the W&B sweep swp12345: `wandb sync ")
    assert send(folder, force=True).label == "offline"
    assert fake.runs[-1].identity["id"] == rec["run_id"]


def wandb(project="p", entity=None):
    from implicit_bench.log import Wandb

    return Wandb(project=project, entity=entity)
