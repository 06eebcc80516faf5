"""`runs`, `load_run`, `records`: what is found, shown, compared and removed; quick over a thousand."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import jobs
import pytest
import torch

import implicit_bench
from implicit_bench import record, terminal
from implicit_bench.cli import main
from implicit_bench.runs import age


def put(top, name="deq-digits", seed=0, status="done", hours=1.0, acc=0.9, **config):
    """A record, hours old, of a run that never ran."""
    config = {"model": {"name": name.split("-")[0]}, "seed": seed, "recipe": {"lr": 1e-3},
              "dataset": {"name": "digits"}, **config}  # fmt: skip
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 3600 * hours))
    rec = record.new_record("train", config, status=status, started_at=began, metrics={"test_acc": acc},
                            timing={"step_ms": {"median": 2.5, "p10": 2, "p90": 3, "n": 9}}, epochs=3)  # fmt: skip
    folder = top / "runs" / f"{name}-s{seed}-{rec['run_id']}"
    record.write_record(folder, rec)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(capsys, *words):
    assert main(["runs", *words, "format=json"]) == 0
    return [row["run"] for row in json.loads(capsys.readouterr().out or "[]")]


def test_the_latest_comes_last_and_filters_are_parts_of_names_or_settings(here, capsys):
    old, new = put(here, hours=5), put(here, "skip_deq-digits", seed=1, hours=0.1, recipe={"lr": 3e-4})
    failed = put(here, "cdeq-digits", status="failed", acc=None, hours=2)
    assert listed(capsys) == [old.name, failed.name, new.name]
    assert listed(capsys, "skip") == [new.name]
    assert listed(capsys, "status=failed") == [failed.name]
    assert listed(capsys, "model=deq") == [old.name]
    assert listed(capsys, "recipe.lr=0.0003") == listed(capsys, "seed=1") == [new.name]
    assert listed(capsys, "digits", "seed=0", "status=done") == [old.name]
    class_of = {"stop": "core.EndTime", "init": "models.FZero", "solver": "solvers.TorchDiffeq"}
    parts = {group: {"_target_": f"implicit_bench.{name}"} for group, name in class_of.items()}
    parts["solver"]["method"] = "dopri5"
    ode = put(here, "ode-digits", clip=None, plot=True, **parts)
    words = ("stop=end_time", "init=f_zero", "solver=torchdiffeq/dopri5", "clip=null", "plot=true")
    assert listed(capsys, *words) == [ode.name]
    folders = put(here, "deq-imagenet", dataset={"_target_": "implicit_bench.data.ImageFolder"})
    assert listed(capsys, "dataset=imagenet") == [folders.name]
    shutil.rmtree(folders)
    shutil.rmtree(ode)
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "run status test acc ms/step nfe f nfe b epochs length age"
    assert lines[1].split() == [old.name, "done", "0.900", "2.50", "–", "–", "3", "5", "h"]


def test_a_run_that_nobody_holds_is_stopped_and_one_that_cannot_be_read_hides_no_other(here, capsys):
    dead, broken = put(here, status="running"), put(here, seed=1)
    (broken / "record.json").write_text("{")
    assert main(["runs", "format=csv"]) == 0
    shown = dict(line.split(",")[:2] for line in capsys.readouterr().out.splitlines())
    assert (shown[dead.name], shown[broken.name]) == ("stopped", "unreadable")


def test_what_is_not_there_is_said_on_stderr(here, capsys):
    assert main(["runs"]) == 0
    assert capsys.readouterr() == ("", "no runs in runs yet; implicit-bench train makes one\n")
    put(here)
    assert main(["runs", "mnist"]) == 0
    assert capsys.readouterr() == ("", "none of the 1 runs in runs fits 'mnist'\n")
    assert main(["runs", "mnist", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["runs", "records=nowhere"]) == 2
    assert "no folder nowhere" in capsys.readouterr().err


def test_committed_records_are_found_too(here, capsys):
    folder = put(here)
    rec = record.read_record(folder)
    (here / "results" / "box").mkdir(parents=True)
    name = folder.name.replace("deq", "other")
    (here / "results" / "box" / f"{name}.record.json").write_text(json.dumps({**rec, "seed": 9}))
    assert set(listed(capsys, "records=runs,results")) == {folder.name, name}
    assert main(["runs", "diff", "last", name, "records=runs,results"]) == 0
    assert "agree in every setting" in capsys.readouterr().out


def test_diff_shows_what_differs_and_by_how_much(here, capsys):
    a, b = put(here, acc=0.8), put(here, acc=0.9, seed=1, recipe={"lr": 2e-3})
    assert main(["runs", "diff", a.name, b.name[-10:], "format=json"]) == 0
    rows = {row[""]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"seed", "recipe.lr", "metrics.test_acc"}
    assert (rows["recipe.lr"][a.name], rows["recipe.lr"][b.name]) == (1e-3, 2e-3)
    assert rows["metrics.test_acc"]["change"] == "+10.0 points"
    assert main(["runs", "diff", a.name]) == 2
    assert main(["runs", "diff", a.name, "zzz"]) == 2


def test_rm_asks_and_removes_only_what_is_named(here, capsys, monkeypatch):
    a, b = put(here), put(here, seed=1)
    assert main(["runs", "rm", a.name]) == 2  # nobody to ask
    assert "add -y" in capsys.readouterr().err
    for answer, left in (("n\n", {a, b}), ("\n", {a, b}), ("y\n", {b})):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["runs", "rm", a.name]) == 0
        assert set((here / "runs").iterdir()) == left
    assert main(["runs", "rm", b.name[-10:], "-y"]) == 0
    assert list((here / "runs").iterdir()) == []


def test_rm_takes_no_run_of_another_folder_for_one_that_is_not_clear(here, capsys):
    first, _ = put(here), put(here, seed=1)
    shutil.copytree(first, here / "other" / first.name)
    assert main(["runs", "rm", "deq-", "records=runs,other", "-y"]) == 2
    assert "fits 2 runs" in capsys.readouterr().err
    assert len([*here.glob("*/deq-*")]) == 3


def test_rm_counts_a_run_once_and_keeps_off_links_and_committed_records(here, capsys):
    a, b = put(here), put(here, seed=1)
    (here / "results").mkdir()
    committed = here / "results" / "other-digits-s0-0123456789.record.json"
    committed.write_text((a / "record.json").read_text())
    (here / "runs" / "linked").symlink_to(b)
    assert main(["runs", "rm", a.name, "other", "-y", "records=runs,results"]) == 2
    assert "a record without a run's folder" in capsys.readouterr().err
    assert main(["runs", "rm", "linked", "-y"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert a.exists()
    assert b.exists()
    assert committed.exists()
    assert main(["runs", "rm", a.name, f"runs/{a.name}", str(a), "-y"]) == 0
    assert capsys.readouterr().out.startswith("removed 1 run, ")
    assert not a.exists()


def test_diff_of_benches_and_of_a_run_and_its_copy(here, capsys):
    for seed, value in ((0, 2.0), (1, 3.0)):
        ratios = [{"measure": "train", "numerator": "neural_ode", "denominator": "cdeq", "value": value}]
        rec = record.new_record("bench", {"rounds": 60 + seed}, status="done")
        record.write_record(here / "runs" / f"bench-digits-{rec['run_id']}", {**rec, "ratios": ratios})
    names = listed(capsys)
    assert main(["runs", "diff", *names, "format=json"]) == 0
    rows = {row[""]: row for row in json.loads(capsys.readouterr().out)}
    assert {rows["ratio.train neural_ode / cdeq"][name] for name in names} == {2.0, 3.0}
    run = put(here)
    copy = here / "results" / f"{run.name}.record.json"
    copy.parent.mkdir()
    copy.write_text(json.dumps({**record.read_record(run), "nonfinite_steps": 1}))
    assert main(["runs", "diff", f"runs/{run.name}", run.name, "records=results", "format=json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert sorted(row.values(), key=str) == ["", 0, 1, "nonfinite_steps"]


def test_rm_keeps_off_a_run_that_is_being_written(here, capsys):
    from implicit_bench.lock import RunLock

    folder = put(here)
    with RunLock(folder):
        assert main(["runs", "rm", folder.name, "-y"]) == 2
        assert "is being written by process" in capsys.readouterr().err
    assert folder.exists()


def test_ages():
    assert [age(s) for s in (-3, 5, 61, 130, 7200, 3 * 86400)] == ["0 s", "5 s", "1 min", "2 min", "2 h", "3 d"]


def test_a_thousand_records_take_no_longer_than_a_coffee_sip(here):
    """Under 2 s on an idle machine (docs/timing.md); held here to the processor time, with room for a busy one."""
    full = record.read_record(put(here))
    for k in range(1000):
        record_folder = here / "runs" / f"deq-digits-s{k}-{k:010x}"
        record_folder.mkdir()
        (record_folder / "record.json").write_text(json.dumps({**full, "run_id": f"{k:010x}"}))
    before = os.times()
    words = [sys.executable, "-m", "implicit_bench", "runs", "format=csv"]
    done = subprocess.run(words, capture_output=True, text=True)
    used = os.times()
    assert len(done.stdout.splitlines()) == 1002
    assert used.children_user + used.children_system - before.children_user - before.children_system < 4


def test_load_run_and_records_give_what_trained(here):
    outcome = jobs.run(here, "model=skip_deq", "recipe.max_steps=30", "progress.log_steps=10")
    run = implicit_bench.load_run("last")
    assert run.folder == outcome.folder.relative_to(here)
    assert run.config == outcome.record["config"]
    assert list(run.metrics["step"][:2]) == [10, 20]
    trained = jobs.weights(outcome.folder)
    assert all(torch.equal(value, trained[key]) for key, value in run.model.state_dict().items())
    assert run.model is run.model
    assert not run.model.training
    jobs.run(here, "model=deq", "recipe.max_steps=2", "seed=3")
    frame = implicit_bench.records("runs").set_index("config.seed")
    assert frame.loc[0, "metrics.test_acc"] == outcome.record["metrics"]["test_acc"]
    assert frame.loc[0, "timing.step_ms"] == outcome.record["timing"]["step_ms"]["median"]
    assert frame.loc[3, "config.model.name"] == "deq"
    with pytest.raises(record.RecordError, match="no run 'zz'"):
        implicit_bench.load_run("zz")


def test_a_narrow_terminal_loses_columns_and_is_told(here, capsys, monkeypatch):
    put(here)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["runs"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width
        assert ("no room" in out) == (width == 80)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "\n (length, epochs, nfe b" in out


def test_quiet_and_formats_are_of_one_command(here, capsys):
    assert main(["list", "models", "format=xml"]) == 2
    assert "no format 'xml'" in capsys.readouterr().err
    assert main(["train", "format=csv"]) == 2
    assert "train prints no table" in capsys.readouterr().err
    assert main(["list", "models", "format=md"]) == 0
    assert capsys.readouterr().out.startswith("| group | name | about |\n")
    assert terminal.format == "text"
    assert terminal.QUIET not in os.environ
    outcome_words = jobs.words(here, "recipe.max_steps=2")
    assert main(["train", "-q", *outcome_words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "accuracy" in out
    assert terminal.QUIET not in os.environ
