"""`plan=true`: jobs, what of them is done, how long the rest takes, and nothing run."""

import json

import jobs
import pytest
import torch

from implicit_bench import plan
from implicit_bench.cli import main
from implicit_bench.record import read_record, write_record


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(capsys, *words):
    assert main([*words, "plan=true", "format=json"]) == 0
    return {row[next(iter(row))]: row for row in json.loads(capsys.readouterr().out)}


def test_a_sweep_in_every_state(here, capsys, monkeypatch):
    words = jobs.words(here, "recipe.max_steps=30")
    done = jobs.run(here, "recipe.max_steps=30").folder
    half = jobs.run(here, "recipe.max_steps=30", "seed=1").folder
    rec, saved = read_record(half), torch.load(half / "last.pt", weights_only=True)
    write_record(half, {**rec, "status": "running", "steps": 0})  # killed: only the checkpoint knows how far it came
    torch.save({**saved, "step": 12}, half / "last.pt")
    capsys.readouterr()
    monkeypatch.setattr(plan, "_measure", lambda *_: pytest.fail("known from the runs that are there"))
    before = sorted(path for path in here.rglob("*"))
    rows = planned(capsys, "train", "-m", "model=deq", "seed=0,1,2", *words)
    assert sorted(path for path in here.rglob("*")) == before
    assert [row["state"] for row in rows.values()] == ["done", "begun", "to do"]
    assert [row["steps left"] for row in rows.values()] == [0, 18, 30]
    assert list(rows)[:2] == [done.name, half.name]
    ms = [read_record(folder)["timing"]["step_ms"]["median"] for folder in (done, half)]
    last = list(rows.values())[2]
    assert last["ms/step"] in ms
    assert last["time"] == pytest.approx(30 * last["ms/step"] / 1e3)
    assert main(["train", "-m", "plan=true", "seed=0,1,2", *words]) == 0
    assert "3 jobs, 1 done, 2 to do: about " in capsys.readouterr().out
    assert planned(capsys, "train", "force=true", *words)[done.name]["state"] == "done"
    assert planned(capsys, "train", "force=true", *words)[done.name]["steps left"] == 30


def test_the_rows_of_a_table_are_jobs_of_a_sweep(here, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_measure", lambda cfg, device: 10.0)
    (here / "own/table").mkdir(parents=True)
    (here / "own/table/two.yaml").write_text("rows:\n  root: {words: [model=deq]}\n  flow: {words: [model=cdeq]}\n")
    words = ["train", "-m", "table=two", "seed=0,1", "--config-dir=own", *jobs.words(here)]
    assert [name.split("-s")[0] for name in planned(capsys, *words)] == ["deq-digits", "cdeq-digits"] * 2
    assert len(planned(capsys, *words, "rows=flow")) == 2


def test_what_was_never_run_is_tried(here, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_measure", lambda cfg, device: {"deq": 10.0, "cdeq": 20.0}[cfg["model"]["name"]])
    rows = planned(capsys, "train", "model=deq,cdeq", "recipe.epochs=2", *jobs.words(here))
    steps = 2 * ((1437 - 180) // 32)
    assert [row["steps left"] for row in rows.values()] == [steps, steps]
    assert [row["time"] for row in rows.values()] == [steps * 0.01, steps * 0.02]
    rows = planned(capsys, "bench", "model=deq,cdeq", "rounds=50", *jobs.words(here))
    assert list(rows) == ["deq", "cdeq"]
    assert rows["cdeq"]["time"] == pytest.approx(2 * rows["deq"]["time"])
    assert not (here / "runs").exists()
    for words, said in (("model=deq", "two rows or more"), ("model=deq,cdeq rounds=many", "rounds='many' is not"),
                        ("model=deq,cdeq rounds=9 time=5s", "both say when to end")):  # fmt: skip
        assert main(["bench", "plan=true", *words.split(), *jobs.words(here)]) == 2
        assert said in capsys.readouterr().err


def test_data_that_are_not_here_are_told(here, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_measure", lambda cfg, device: 10.0)
    assert main(["train", "-m", "dataset=digits,mnist,imagenet", "plan=true", "paths.data=nowhere"]) == 0
    said = capsys.readouterr().out
    assert "\ndata    mnist is not here yet: implicit-bench data dataset=mnist paths.data=nowhere, 12 MB\n" in said
    assert "\ndata    imagenet is not here yet: register at image-net.org" in said
    assert "digits is not here" not in said
    assert "3 to do: about " in said
    assert "of training here, one after the other; of 1 not known before the data are here; nothing was run" in said


def test_the_trial_is_a_real_step(here):
    from implicit_bench import config

    job = config.compose("train", jobs.words(here))
    ms = plan._measure(job.config, config.make(job.config["gpu"], "gpu"))
    assert 0.3 < ms < 3000


def test_the_other_commands_list_their_jobs(here, capsys):
    assert len(planned(capsys, "check", "solver=anderson")) == 1
    rows = planned(capsys, "data", "dataset=digits,mnist")
    assert [(row["state"], row["to fetch, MB"]) for row in rows.values()] == [("present", 0), ("absent", 11.594722)]
    assert main(["train", "plan=maybe"]) == 2
    assert capsys.readouterr().err == "implicit-bench: plan='maybe' is not possible; there are: true, false\n"
    assert main(["train", "plan=true", "model=dq"]) == 2
    assert main(["train", "plan=true", "recipe.batch=5000"]) == 2
    assert "recipe.batch=5000 is more than the 1257 training images" in capsys.readouterr().err
