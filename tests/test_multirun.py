"""`train -m`: what becomes of every job, here and in a launcher's processes, and what the same command does again."""

import json
import os
import re
import signal
import time
from importlib import metadata

import jobs
import pytest

from implicit_bench.cli import main
from implicit_bench.lock import RunLock
from implicit_bench.machine import cores
from implicit_bench.sweep.board import STATES, share_of_cores

joblib = pytest.mark.skipif(not [*metadata.distributions(name="hydra-joblib-launcher")],
                            reason="no hydra-joblib-launcher: pip install 'implicit-bench[joblib]'")  # fmt: skip


def records(tmp_path):
    found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    return {(rec["config"]["model"]["name"], rec["config"]["seed"]): rec for rec in found if rec["command"] == "train"}


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs `train -m` in this process: exit code, closing table by job, last line, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, command=("train", "-m")):
        code = main([*command, *jobs.words(tmp_path, "recipe.max_steps=2", *words)])
        out, err = capsys.readouterr()
        table = re.split(r" *job +words +state .*\n", out)[-1]
        lines = re.findall(rf"^ *(\d+)  (.*?)  +({'|'.join(STATES)}) +(.*)$", table, re.M)
        rows = {int(number): (words.strip(), state, rest) for number, words, state, rest in lines}
        last = re.findall(r"^sweep   (\d+ jobs: .*) · [^·]*$", out, re.M)
        return code, rows, last[-1] if last else "", err

    return run


def test_every_job_is_told_of_and_the_same_command_does_what_is_missing(sweep, tmp_path):
    words = ["model=explicit,deq", "recipe.optimizer=sgd", "recipe.lr=0.001,1e30", "recipe.max_steps=5"]
    code, rows, last, err = sweep(*words)
    assert code == 3
    assert last == "4 jobs: 2 done, 2 failed"
    assert [(words, state) for words, state, _ in rows.values()] == [
        ("model=explicit recipe.lr=0.001", "done"), ("model=explicit recipe.lr=1e+30", "failed"),
        ("model=deq recipe.lr=0.001", "done"), ("model=deq recipe.lr=1e+30", "failed")]  # fmt: skip
    assert re.search(r"the loss .* was not finite at step \d", rows[2][2])
    assert re.search(r"explicit-digits-s0-\w+$", rows[1][2])
    assert re.search(r"^sweep   job 3 of 4 · 1 done, 1 failed · about .* left$", err, re.M)
    code, rows, last, _ = sweep(*words)  # a failure is not cached
    assert (code, last) == (3, "4 jobs: 2 skipped, 2 failed")
    code, _, last, _ = sweep("model=explicit,deq", "recipe.optimizer=sgd", "recipe.lr=1e-3,1e-4", "recipe.max_steps=5")
    assert (code, last) == (0, "4 jobs: 2 done, 2 skipped")
    assert not list((tmp_path / "runs/.sweeps").iterdir())


def test_a_job_that_another_process_is_at_is_left_to_it(sweep, tmp_path):
    sweep("model=explicit", "seed=0,1")
    (folder,) = (tmp_path / "runs").glob("explicit-digits-s0-*")
    with RunLock(folder):
        code, rows, last, _ = sweep("model=explicit", "seed=0,1", "force=true")
    assert (code, last) == (0, "2 jobs: 1 done, 1 elsewhere")
    assert rows[1][1] == "elsewhere"


TABLE = """
words: [dataset=digits]
rows:
  explicit: {words: [model=explicit]}
  deq anderson: {words: [model=deq, solver=anderson, "penalty=[jacobian]"]}
columns: [params, test_acc]
seeds: {sound: [0, 1]}
"""


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / "conf" / "table"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(TABLE)
    return ["--config-dir", str(tmp_path / "conf"), "table=mine"]


def test_a_tables_rows_are_paired_axes(sweep, table, tmp_path):
    code, rows, last, _ = sweep(*table, "seed=1,0")
    assert (code, last) == (0, "4 jobs: 4 done")
    assert [rows[k][0].split()[0] for k in (1, 2, 3, 4)] == ["model=explicit", "model=deq"] * 2
    found = records(tmp_path)
    assert sorted(found) == [("deq", 0), ("deq", 1), ("explicit", 0), ("explicit", 1)]
    assert found["deq", 0]["config"]["solver"]["_target_"].endswith("Anderson")
    assert "jacobian" in found["deq", 1]["config"]["penalty"]
    code, _, last, _ = sweep(*table, "rows=explicit", "seed=1,0")
    assert (code, last) == (0, "2 jobs: 2 skipped")
    code, _, _, err = sweep(*table, "model=deq,explicit")
    assert code == 2
    assert "table=mine says model=explicit for its row explicit" in err


def test_a_tables_missing_runs_by_a_launcher(sweep, table, tmp_path, capsys):
    code, _, last, _ = sweep(*table, "run_missing=true", "rows=explicit", command=("table", "-m"))
    assert (code, last) == (0, "2 jobs: 2 done")
    assert sorted(records(tmp_path)) == [("explicit", 0), ("explicit", 1)]
    code, _, last, _ = sweep(*table, "run_missing=true", command=("table", "-m"))
    assert (code, last) == (0, "2 jobs: 2 done")  # the others' rows
    assert len(records(tmp_path)) == 4
    for words, said in [(["run_missing=true", "time=1m"], "no time="), ([], "wants run_missing=true")]:
        code, _, _, err = sweep(*table, *words, command=("table", "-m"))
        assert code == 2
        assert said in err


@pytest.mark.parametrize(
    ("launcher", "threads"),
    [({"_target_": "basic"}, None), ({"n_jobs": 2}, max(1, cores() // 2)), ({"n_jobs": -1}, 1),
     ({"n_jobs": 10_000}, 1), ({"cpus_per_task": 1}, 1), ({"cpus_per_task": 10_000}, cores()),
     ({"ray": {"remote": {"num_cpus": 3}}}, 3), ({"ray": {"init": {}}}, 1)],
)  # fmt: skip
def test_jobs_that_run_side_by_side_share_the_cores(launcher, threads):
    assert share_of_cores(launcher) == threads


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@joblib
def test_joblib_shares_the_cores_and_no_run_counts_as_alone(tmp_path):
    process = jobs.sweep(tmp_path, "model=explicit", "seed=0,1,2,3", "recipe.epochs=2", *JOBLIB)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "4 jobs: 4 done" in out
    for rec in records(tmp_path).values():
        assert rec["config"]["gpu"]["threads"] == rec["environment"]["threads"] == max(1, cores() // 2)
        assert rec["environment"]["alone"] is not True


@joblib
def test_a_killed_worker_loses_its_job_and_the_same_command_goes_on(tmp_path):
    words = ["model=explicit", "seed=0,1", "recipe.epochs=15", "progress.save_s=0.1", *JOBLIB]
    process = jobs.sweep(tmp_path, *words)
    deadline = time.monotonic() + 120
    while len(saved := list(tmp_path.glob("runs/explicit-*/last.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    folder = saved[0].parent
    os.kill(json.loads((folder / "run.lock").read_text())["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert "the launcher joblib gave up: " in err
    assert re.search(r"2 jobs: .*lost", out)
    again = jobs.sweep(tmp_path, *words)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    rec = json.loads((folder / "record.json").read_text())
    assert (rec["status"], len(rec["resumed_from"])) == ("done", 1)


@joblib
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_told_to_end_lets_the_jobs_of_joblib_save(tmp_path, signum):
    words = ["model=explicit", "seed=0,1,2", "recipe.epochs=400", "progress.save_s=0.1", *JOBLIB]
    process = jobs.sweep(tmp_path, *words)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/explicit-*/last.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)  # the workers hear of it from the sweep alone
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert re.search(r"3 jobs: 2 interrupted, 1 not begun", out), out + err
    assert {rec["status"] for rec in records(tmp_path).values()} == {"interrupted"}
    assert not list(tmp_path.glob("runs/*/run.lock"))


def test_what_lies_in_a_folder_that_a_user_names_is_neither_read_nor_removed(sweep, tmp_path):
    here = tmp_path / "it's mine"
    here.mkdir()
    (here / "stop").touch()
    for name in ("7", "precious"):
        (here / f"{name}.json").write_text('{"state": "failed"}')
    where = str(here).replace("'", "\\'")
    assert sweep("model=explicit", "seed=0,1", f"hydra.sweep.dir='{where}'")[2] == "2 jobs: 2 done"
    assert {path.name for path in here.iterdir()} == {"stop", "7.json", "precious.json"}


def test_a_sweep_below_a_folder_with_an_apostrophe(sweep, tmp_path, monkeypatch):
    (tmp_path / "it's").mkdir()
    monkeypatch.chdir(tmp_path / "it's")
    assert sweep("model=explicit", "seed=0,1", "paths.runs=runs")[2] == "2 jobs: 2 done"


def test_a_plan_has_the_run_that_a_launcher_makes(sweep, tmp_path, capsys):
    words = ["model=explicit", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "gpu.threads=null"]
    planned = jobs.words(tmp_path, "recipe.max_steps=2", *words, "plan=true")
    assert main(["train", "-m", *planned, "format=json"]) == 0
    names = [row["job"] for row in json.loads(capsys.readouterr().out)]
    assert sweep(*words)[2] == "2 jobs: 2 done"
    assert sorted(names) == sorted(path.parent.name for path in tmp_path.glob("runs/*/record.json"))


def test_two_sweeps_at_once_do_no_job_twice(tmp_path):
    words = ["model=explicit", "seed=range(6)", "recipe.epochs=2", "gpu.threads=1"]
    both = [jobs.sweep(tmp_path, *words) for _ in range(2)]
    found = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    did = [re.search(r"6 jobs: (?:(\d+) done)?", out)[1] for out, _ in found]
    assert sum(int(n or 0) for n in did) == 6
    for rec in records(tmp_path).values():
        assert (rec["status"], rec["attempt"], rec["resumed_from"]) == ("done", 1, [])


def test_a_process_that_dies_leaves_a_sweep_that_goes_on(tmp_path):
    words = ["model=explicit", "seed=0,1,2", "recipe.epochs=8", "progress.save_s=0.1", "gpu.threads=1"]
    process = jobs.sweep(tmp_path, *words)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/explicit-digits-s1-*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    left = {seed: rec["status"] for (_, seed), rec in records(tmp_path).items()}
    assert left[0] == "done"
    assert left.get(1) != "done"
    again = jobs.sweep(tmp_path, *words)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "3 jobs: 2 done, 1 skipped" in out
    resumed = records(tmp_path)["explicit", 1]
    assert resumed["status"] == "done"
    assert resumed["resumed_from"]
