import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time

import jobs
import pytest
import torch

from implicit_bench import config, log, machine, record
from implicit_bench.jsonl import read_jsonl
from implicit_bench.lock import RunLock, RunLocked
from implicit_bench.train import command, loop

RUN = ("model=skip_deq", "recipe.epochs=3", "dataset.flip=0.5", "dataset.pad=1", "progress.log_steps=10",
       "penalty=[skip,jacobian]", "penalty.jacobian.probability=0.5")  # fmt: skip


def rows(folder):
    """metrics.jsonl without times, which differ between any two runs."""
    found = list(read_jsonl(folder / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if not k.startswith("timing")} for row in found]


@contextlib.contextmanager
def ctrl_c(at):
    """A run within takes `at` steps: the last of them is finished, then the state saved."""
    real = loop.Step.__call__

    def stopping(self, x, y):
        if self.taken == at - 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Step, "__call__", stopping)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return jobs.run(tmp_path_factory.mktemp("undisturbed"), *RUN)


def test_the_record_is_complete(undisturbed):
    rec = record.read_record(undisturbed.folder)
    assert undisturbed.exit_code == 0
    assert undisturbed.folder.name == f"skip_deq-digits-s0-{rec['run_id']}"
    assert rec["status"] == "done"
    assert rec["run_id"] == record.run_id(rec["config"])
    assert rec["params"] == {"total": 58_890, "by_part": {"stem": 8_320, "cell": 32_768, "head": 1_290, "init": 16_512}}
    assert (rec["data"]["n_train"], rec["data"]["n_val"], rec["data"]["n_test"]) == (1257, 180, 360)
    assert (rec["steps"], rec["epochs"]) == (3 * 39, 3)
    assert 1 <= rec["best_epoch"] <= 3
    for key in ("train_loss", "val_acc", "val_loss", "test_acc", "test_loss", "start_acc"):
        assert rec["metrics"][key] >= 0, key
    assert set(rec["metrics"]["test_acc_within"]) == {"0", "1", "2", "4"}
    for key in ("step", "forward", "backward", "optimizer", "predict"):
        assert rec["timing"][f"{key}_ms"]["median"] > 0, key
    assert rec["timing"]["step_ms"]["median"] >= rec["timing"]["forward_ms"]["median"]
    assert rec["solve"]["converged_fraction"] == 1.0
    assert rec["solve"]["nfe_forward"] > 3
    assert rec["solve"]["nfe_backward"] == pytest.approx(rec["solve"]["linear_iterations"], rel=1)
    assert rec["flops"]["step"] > 1e6
    assert rec["memory"]["peak_mib"] > 10
    assert rec["environment"]["torch"]
    assert rec["resumed_from"] == []
    for name in ("config.yaml", "metrics.jsonl", "last.pt", "previous.pt"):
        assert (undisturbed.folder / name).exists(), name
    assert [r["epoch"] for r in rows(undisturbed.folder) if "epoch" in r] == [1, 2, 3]


def test_training_learns(tmp_path):
    done = jobs.run(tmp_path, "model=skip_deq", "recipe.epochs=3")
    epochs = [r for r in rows(done.folder) if "epoch" in r]
    assert epochs[-1]["metrics.train_loss"] < 0.3 * epochs[0]["metrics.train_loss"]
    assert done.record["metrics"]["test_acc"] > 0.85


@pytest.mark.parametrize(("words", "told"), [
    (("init=skip_net",), "the predictor never changes"),
    (("init=skip_net", "penalty=[init_fit]"), None),
    (("penalty=[init_fit]",), "no predictor to train with init=zero: it changes nothing"),
])  # fmt: skip
def test_a_start_and_its_penalty_belong_together(words, told):
    found = command.remarks(config.compose("train", ["model=deq", *words]))
    assert [told] == [remark[-len(told) :] for remark in found] if told else found == []


def test_the_test_split_is_touched_once_and_after_training(tmp_path, monkeypatch):
    seen = []
    real = command.evaluate
    monkeypatch.setattr(command, "evaluate", lambda *a: seen.append(("test", a[2] is a[1].test)) or real(*a))
    monkeypatch.setattr(loop, "evaluate", lambda *a: seen.append(("val", a[2] is a[1].val)) or real(*a))
    jobs.run(tmp_path, *RUN)
    assert seen == [("val", True)] * 3 + [("test", True)]


def watched(accuracies):
    """In the loop's place of `evaluate`: what it says of validation, and made-up accuracies of the test split."""
    real = loop.evaluate
    return lambda *a: {"acc": next(accuracies)} if a[2] is a[1].test else real(*a)


def test_watching_the_test_split_keeps_its_best_epoch_and_changes_nothing_else(tmp_path, monkeypatch, undisturbed):
    assert undisturbed.record["metrics"]["test_acc_best_paper_style"] is None
    seen = []
    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: seen.append((a[2] is a[1].test, real(*a))) or seen[-1][1])
    done = jobs.run(tmp_path, *RUN, "recipe.watch_test=true")
    assert [test for test, _ in seen] == [False, True] * 3
    accuracies = [found["acc"] for test, found in seen if test]
    assert jobs.same_weights(done.folder, undisturbed.folder)
    assert done.record["metrics"] == undisturbed.record["metrics"] | {"test_acc_best_paper_style": max(accuracies)}
    assert done.record["metrics"]["test_acc"] == accuracies[-1]


@pytest.mark.parametrize("at", [39, 50, 78])
def test_the_best_test_accuracy_outlives_an_interruption(tmp_path, monkeypatch, undisturbed, at):
    monkeypatch.setattr(loop, "evaluate", watched(iter([0.25, 0.75, 0.5])))
    with ctrl_c(at):
        assert jobs.run(tmp_path, *RUN, "recipe.watch_test=true").exit_code == 130
    done = jobs.run(tmp_path, *RUN, "recipe.watch_test=true")
    best = [r["metrics.test_acc_best_paper_style"] for r in rows(done.folder) if "epoch" in r]
    assert best == [0.25, 0.75, 0.75]
    assert done.record["metrics"]["test_acc_best_paper_style"] == 0.75
    assert done.record["metrics"]["test_acc"] == undisturbed.record["metrics"]["test_acc"]  # measured, at the end


def test_an_epoch_of_fewer_images_sees_others_each_time(tmp_path, monkeypatch):
    real, seen = loop.Step.__call__, []

    def noting(self, x, y):
        seen.extend(x.flatten(1).tolist())
        return real(self, x, y)

    monkeypatch.setattr(loop.Step, "__call__", noting)
    done = jobs.run(tmp_path, "recipe.epochs=2", "recipe.epoch_images=200", "recipe.batch=50")
    assert (done.record["steps"], done.record["epochs"], len(seen)) == (8, 2, 400)
    first, second = ({tuple(x) for x in part} for part in (seen[:200], seen[200:]))
    assert len(first) > 195  # digits has a few images twice
    assert len(first & second) < 60  # of 1,257: a sixth of 200 by chance


@pytest.mark.parametrize("at", [5, 39, 50, 117])  # the last is the run's last
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(tmp_path, undisturbed, at):
    with ctrl_c(at):
        first = jobs.run(tmp_path, *RUN)
    assert first.exit_code == 130
    assert record.read_record(first.folder)["status"] == "interrupted"
    assert record.read_record(first.folder)["steps"] == at
    assert jobs.same_weights(first.folder, undisturbed.folder) == (at == 117)
    second = jobs.run(tmp_path, *RUN)
    assert second.exit_code == 0
    assert second.folder == first.folder
    assert [r["step"] for r in second.record["resumed_from"]] == [at]
    assert jobs.same_weights(second.folder, undisturbed.folder)
    assert rows(second.folder) == rows(undisturbed.folder)
    assert second.record["metrics"] == undisturbed.record["metrics"]


@pytest.mark.parametrize(("reads", "alone"), [([False, True], False), ([True, True], True), ([None, True], None)])
def test_a_resumed_run_was_alone_if_all_of_its_sessions_were(tmp_path, monkeypatch, reads, alone):
    answers = iter(reads)
    monkeypatch.setattr(machine.Alone, "read", lambda self: next(answers))
    words = ("model=deq", "recipe.max_steps=20")
    with ctrl_c(5):
        jobs.run(tmp_path, *words)
    assert jobs.run(tmp_path, *words).record["environment"]["alone"] is alone


@pytest.mark.parametrize("at", [12, 30])
def test_a_run_that_went_on_elsewhere_has_the_times_of_its_last_machine(tmp_path, at):
    words = ("model=deq", "recipe.max_steps=30")
    with ctrl_c(at):
        first = jobs.run(tmp_path, *words)
    rec = record.read_record(first.folder)
    rec["environment"]["hardware"] = "another"
    record.write_record(first.folder, rec)
    again = jobs.run(tmp_path, *words).record
    assert again["environment"]["alone"] is not True  # None, or False on a busy machine
    spread = again["timing"]["step_ms"]
    assert (spread and spread["n"], again["status"]) == (18 if at == 12 else None, "done")


def test_figures_are_of_the_steps_that_solve(tmp_path):
    rec = jobs.run(tmp_path, "model=deq", "recipe.pretrain_steps=24", "recipe.max_steps=30").record
    assert rec["timing"]["step_ms"]["n"] == 6
    assert rec["solve"]["linear_iterations"] > 2  # not a fifth of it


def test_a_loss_is_not_rounded_as_the_network_is(tmp_path):
    loss = jobs.run(tmp_path, "recipe.max_steps=2", "gpu.dtype=bfloat16").record["metrics"]["test_loss"]
    assert loss != float(torch.tensor(loss).bfloat16())


def test_a_second_ctrl_c_says_what_is_saved(tmp_path, monkeypatch, capsys):
    def impatient(*_):
        raise KeyboardInterrupt

    for what in (loop.Step, command.Step):
        with monkeypatch.context() as patch:
            patch.setattr(what, "__call__" if what is loop.Step else "__init__", impatient)
            assert jobs.run(tmp_path, "model=deq").exit_code == 130
        assert "interrupted before anything was saved; the same command begins anew" in capsys.readouterr().err
    with ctrl_c(5):
        jobs.run(tmp_path, "model=deq")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Fit, "resume", impatient)
        assert jobs.run(tmp_path, "model=deq").exit_code == 130
    assert "interrupted at step 5 and saved; the same command continues it" in capsys.readouterr().err


def test_sigkill_mid_run_then_the_same_command(tmp_path, undisturbed):
    words = jobs.words(tmp_path, *RUN, "progress.save_s=0")
    process = subprocess.Popen([sys.executable, "-m", "implicit_bench", "train", *words], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    folder = tmp_path / "runs" / undisturbed.folder.name
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # several checkpoints, and somewhere inside an epoch
        if (folder / "metrics.jsonl").exists() and len(rows(folder)) >= 3:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert record.read_record(folder)["status"] == "running"
    again = jobs.run(tmp_path, *RUN, "progress.save_s=0")
    assert again.exit_code == 0
    assert again.record["resumed_from"][0]["step"] > 0
    assert jobs.same_weights(folder, undisturbed.folder)
    assert rows(folder) == rows(undisturbed.folder)


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    first = jobs.run(tmp_path, "length=smoke")
    stamp = (first.folder / "record.json").stat().st_mtime_ns
    again = jobs.run(tmp_path, "length=smoke")
    assert "is done: test accuracy" in capsys.readouterr().out
    assert again.exit_code == 0
    assert (first.folder / "record.json").stat().st_mtime_ns == stamp
    forced = jobs.run(tmp_path, "length=smoke", "force=true")
    assert forced.record["attempt"] == 2
    assert json.loads((first.folder / "attempt-1.record.json").read_text())["attempt"] == 1
    assert jobs.same_weights(first.folder, forced.folder)


def test_a_second_process_on_one_run_stops_and_says_so(tmp_path):
    first = jobs.run(tmp_path, "length=smoke")
    (first.folder / "record.json").unlink()
    with RunLock(first.folder), pytest.raises(RunLocked, match="is being written by pid"):
        jobs.run(tmp_path, "length=smoke")


def test_a_nonfinite_run_is_recorded_as_failed_and_not_as_done(tmp_path, capsys):
    failed = jobs.run(tmp_path, "length=smoke", "recipe.lr=1e30", "recipe.optimizer=sgd")
    assert failed.exit_code == 1
    rec = record.read_record(failed.folder)
    assert rec["status"] == "failed"
    assert "not finite at step" in rec["error"]
    assert "lower recipe.lr" in capsys.readouterr().err
    assert jobs.run(tmp_path, "length=smoke", "recipe.lr=1e30", "recipe.optimizer=sgd").exit_code == 1


def test_a_corrupt_record_is_named_and_kept(tmp_path):
    first = jobs.run(tmp_path, "length=smoke")
    (first.folder / "record.json").write_text('{"schema_version": 1, "ru')
    with pytest.raises(record.RecordError, match=r"record.json cannot be read .*; delete it and run again"):
        jobs.run(tmp_path, "length=smoke")
    assert (first.folder / "record.json").read_text().endswith('"ru')


def test_the_epoch_that_ends_with_the_steps_is_timed_and_one_in_two_parts_is_not(tmp_path):
    words = "recipe.epochs=2", "recipe.batch=100", "recipe.max_steps=17"  # epochs of 12 steps
    folder = jobs.run(tmp_path, *words).folder
    whole = [row["timing.epoch_s"] for row in read_jsonl(folder / "metrics.jsonl") if "epoch" in row]
    assert len(whole) == 2
    assert all(seconds > 0 for seconds in whole)
    with ctrl_c(15):
        assert jobs.run(tmp_path, *words, "seed=1").exit_code == 130
    folder = jobs.run(tmp_path, *words, "seed=1").folder
    first, second = (row["timing.epoch_s"] for row in read_jsonl(folder / "metrics.jsonl") if "epoch" in row)
    assert first > 0
    assert second is None


def test_an_hour_is_announced_after_ten_steps_of_a_run(tmp_path, capsys, monkeypatch):
    jobs.run(tmp_path, "recipe.epochs=1", "recipe.max_steps=11")
    assert "length=short" not in capsys.readouterr().err
    monkeypatch.setattr(loop.Fit, "_warn_if_long", lambda self, step_s, say: say("HOURS"))
    jobs.run(tmp_path, "recipe.epochs=2", "seed=1")
    assert capsys.readouterr().err.count("HOURS") == 1  # not with each epoch
    monkeypatch.undo()
    fit = loop.Fit.__new__(loop.Fit)
    fit.end, fit.steps_an_epoch, fit.step = 100_000, 1000, type("S", (), {"taken": 10})
    fit.recipe = type("R", (), {"batch": 64})
    said = []
    fit._warn_if_long(1.0, said.append)
    assert "about 27.8 h on this machine" in said[0]
    assert "length=short trains 3 epochs in 50 min, length=smoke 100 steps of 32 images in 50 s" in said[0]


def test_dtype_float64_trains_in_float64(tmp_path):
    done = jobs.run(tmp_path, "length=smoke", "gpu.dtype=float64", "stop.tol=1e-10", "adjoint.rtol=1e-10")
    assert all(w.dtype.is_floating_point and w.itemsize == 8 for w in jobs.weights(done.folder).values())
    assert done.record["solve"]["residual"] < 1e-10


def test_judging_on_the_first_images_only(tmp_path):
    whole = jobs.run(tmp_path, "length=smoke").record
    part = jobs.run(tmp_path, "length=smoke", "recipe.eval_images=40").record
    assert (whole["data"]["n_test"], part["data"]["n_test"]) == (200, 40)
    assert sum(part["solve"]["test"]["status_counts"].values()) == 40
    assert part["metrics"]["test_acc"] * 40 == pytest.approx(round(part["metrics"]["test_acc"] * 40))
    assert part["metrics"]["train_loss"] == whole["metrics"]["train_loss"]  # training is the same
    with pytest.raises(config.UsageError, match=r"recipe\.eval_images=0 must be positive"):
        jobs.run(tmp_path, "recipe.eval_images=0")


def test_solves_that_did_not_converge_are_told_with_a_remedy(tmp_path, capsys):
    done = jobs.run(tmp_path, "length=smoke", "recipe.eval_images=40", "stop.max_steps=2")
    assert done.record["solve"]["test"]["converged_fraction"] < 0.5
    (line,) = [said for said in capsys.readouterr().err.splitlines() if "did not converge" in said]
    assert "most of them MAX_STEPS: cap before tolerance: raise stop.max_steps, loosen stop.tol (float32" in line


def test_bfloat16_autocast_trains(tmp_path):
    done = jobs.run(tmp_path, "recipe.epochs=3", "gpu.dtype=bfloat16", "stop.tol=3e-2", "adjoint.rtol=3e-2")
    assert done.record["metrics"]["test_acc"] > 0.8
    assert done.record["solve"]["converged_fraction"] > 0.95


def test_a_mistake_leaves_nothing_behind(tmp_path):
    for words, sentence in (
        (["recipe.batch=5000"], "recipe.batch=5000 is more than the 1257 training images"),
        (["stop=end_time"], "finds roots and has no time"),
        (["recipe.lr=-1"], "recipe.lr=-1"),
    ):
        with pytest.raises(config.UsageError, match=sentence):
            jobs.run(tmp_path, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_final_test_is_recorded_and_the_run_continues(tmp_path, monkeypatch, number):
    real = command._test

    def stopping(*args):
        signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(command, "_test", stopping)
    first = jobs.run(tmp_path, "length=smoke")
    assert first.exit_code == 130
    assert record.read_record(first.folder)["status"] == "interrupted"
    monkeypatch.setattr(command, "_test", real)
    again = jobs.run(tmp_path, "length=smoke")
    assert again.exit_code == 0
    assert again.record["metrics"]["test_acc"] > 0.5
    assert again.record["metrics"]["train_loss"] > 0


def test_a_failing_run_keeps_its_traceback_and_says_where(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("the disk sang\nand more")

    monkeypatch.setattr(command, "_test", broken)
    failed = jobs.run(tmp_path, "length=smoke")
    assert failed.exit_code == 1
    assert failed.record["error"] == "RuntimeError: the disk sang"
    assert "Traceback" in (failed.folder / "error.txt").read_text()
    said = capsys.readouterr().err
    assert "RuntimeError: the disk sang (details in" in said
    assert "Traceback" not in said


def test_the_table_begins_with_the_first_epochs_end_and_the_sink_knows(tmp_path, capsys, monkeypatch):
    """What a sink says while the first epoch runs stands above the table, and nothing within it."""
    monkeypatch.setattr(log.NoSink, "log", lambda self, row, step: print("row", file=sys.stderr))
    monkeypatch.setattr(log.NoSink, "hold", lambda self: print("hold", file=sys.stderr))
    jobs.run(tmp_path, "recipe.epochs=2", "progress.log_steps=39", "length=full")
    said = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["row", "row", "hold", "epoch", "1", "row", "row", "2"]


def test_the_peak_of_memory_is_the_runs_own(tmp_path):
    """And not of what the process did before, such as a sweep's larger jobs."""
    with mmap.mmap(-1, 2**30) as ballast:
        for at in range(0, 2**30, 4096):
            ballast[at] = 1
        before = machine.peak_memory_mib()
    assert jobs.run(tmp_path, "recipe.max_steps=2").record["memory"]["peak_mib"] < before - 500
