"""Weights along training: the ones that `train` comes by, made once, gone on with, and still while they are timed."""

import re
import signal

import jobs
import pytest
import torch

from implicit_bench import config, record
from implicit_bench.bench import memory, rows, trained
from implicit_bench.cli import main
from implicit_bench.device import Device
from implicit_bench.train import Interrupted, checkpoint
from implicit_bench.train.command import train


@pytest.fixture
def made(tmp_path):
    def make(model="skip_deq", *words):
        job = config.compose("bench", jobs.words(tmp_path, f"model={model}", *words))
        data = config.make(job.config["dataset"], "dataset").load(tmp_path)
        return rows.Row(model, job, data, Device("cpu", threads=1))

    return make


def weights(row, k):
    return torch.load(trained.where(row, k), weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_they_are_those_of_a_training_whatever_the_steps_asked_for(made, tmp_path):
    row, direct = made(), made("skip_deq", f"paths.runs={tmp_path / 'other'}")
    trained.trained(row, [0, 3, 45])  # the 1,257 images hold 39 batches: within the first epoch, and the second
    trained.trained(direct, [45])
    assert same(weights(row, 45), weights(direct, 45))
    assert not same(weights(row, 3), weights(row, 45))
    words = jobs.words(tmp_path, "model=skip_deq", "recipe.max_steps=45", "recipe.schedule=constant")
    outcome = train(config.compose("train", words), words)
    constant = made("skip_deq", "recipe.schedule=constant")
    trained.trained(constant, [45])
    assert same(weights(constant, 45), checkpoint.load(outcome.folder, torch.device("cpu"), print)["model"])


def test_a_recipes_pretraining_is_part_of_them_and_what_is_timed_solves(made, tmp_path):
    own = ("recipe.pretrain_steps=3", "recipe.pretrain_depth=2", "recipe.schedule=constant")
    row = made("skip_deq", *own)
    trained.trained(row, [3])
    words = jobs.words(tmp_path, "model=skip_deq", "recipe.max_steps=3", *own)
    outcome = train(config.compose("train", words), words)
    assert outcome.record["solve"]["nfe_forward"] == 2  # pretraining alone: the depth
    assert same(weights(row, 3), checkpoint.load(outcome.folder, torch.device("cpu"), print)["model"])
    trained.put(row, 3, row)
    row.measure(1)
    assert row.tally.means()["nfe_forward"] > 2


def test_threads_make_no_other_training_and_a_dtype_does(made):
    one, other, double = made(), made("skip_deq", "gpu.threads=2"), made("skip_deq", "gpu.dtype=float64")
    assert trained.where(one, 5) == trained.where(other, 5) != trained.where(double, 5)


def test_what_is_there_is_not_made_again_and_what_is_earlier_is(made):
    row = made()
    trained.trained(row, [4])
    before = trained.where(row, 4).stat().st_mtime_ns
    kept = weights(row, 4)
    trained.trained(row, [4])
    assert trained.where(row, 4).stat().st_mtime_ns == before
    trained.trained(row, [2, 4])
    other = made("skip_deq", "seed=1")
    assert trained.where(other, 2) != trained.where(row, 2)
    trained.where(row, 4).unlink()
    trained.trained(row, [4])  # went on from step 2
    assert same(weights(row, 4), kept)


def test_at_the_end_of_the_recipe_a_finished_training_is_taken(made, tmp_path):
    own = ("skip_deq", "recipe.max_steps=9")
    words = jobs.words(tmp_path, "model=skip_deq", own[1], "gpu.threads=2")
    folder = train(config.compose("train", words), words).folder
    row = made(*own)
    assert trained.lacks(row, [4, 9]) == [4]
    trained.put(row, 9, row)
    assert same(row.model.state_dict(), checkpoint.load(folder, torch.device("cpu"), print)["model"])
    for another in ("seed=1", "gpu.dtype=float64", "recipe.lr=2e-3", "stop.tol=0.1"):
        assert trained.lacks(made(*own, another), [9]) == [9]
    record.write_record(folder, {**record.read_record(folder), "status": "interrupted"})
    assert trained.lacks(made(*own), [9]) == [9]


def test_an_interrupted_training_goes_on(made, tmp_path, monkeypatch):
    row = made()
    real, taken = row.step.__class__.__call__, []

    def stopping(step, x, y):
        taken.append(step.taken)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(step, x, y)

    monkeypatch.setattr(row.step.__class__, "__call__", stopping)
    with pytest.raises(Interrupted):
        trained.trained(row, [5])
    monkeypatch.undo()
    again, whole = made(), made("skip_deq", f"paths.runs={tmp_path / 'whole'}")
    trained.trained(again, [5])
    assert again.step.taken == 0  # its own weights stay what they are
    trained.trained(whole, [5])
    assert same(weights(again, 5), weights(whole, 5))


def test_rows_stand_still_at_their_step(made):
    row = made()
    trained.trained(row, [6])
    trained.put(row, 6, row)
    assert 0 <= row.val_acc <= 1
    row.measure(2), row.measure(1)
    assert same(row.model.state_dict(), weights(row, 6))
    assert row.batches == 3  # other batches each
    trained.put(row, 0, row)
    assert same(row.model.state_dict(), made().model.state_dict())


def test_work_is_counted_at_the_weights_that_are_timed(made):
    row = made("deq", "init=zero")
    first = row.flops()
    row.put({**row.state(), "model": {name: 0 * tensor for name, tensor in row.initial["model"].items()}})
    row.measure(1)
    assert row.tally.means()["nfe_forward"] < 4  # f is constant
    assert row.flops() < first / 2


def test_the_accuracy_of_a_finished_run_is_of_the_images_that_it_was_validated_on(made, tmp_path, monkeypatch):
    words = "recipe.max_steps=3", "recipe.eval_images=40"
    given = jobs.words(tmp_path, "model=deq", *words)
    ran = train(config.compose("train", given), given)
    monkeypatch.setattr(trained, "where", lambda row, k: ran.folder / "last.pt")
    row = made("deq", *words)
    trained.put(row, None, row)
    assert row.val_acc == ran.record["metrics"]["val_acc"]


def test_finished_runs_are_timed_at_their_own_weights(tmp_path, capsys, brisk):
    words, folders = jobs.words(tmp_path, "recipe.max_steps=9", "recipe.batch=20"), []
    for own in (["model=deq", "stop.tol=0.02"], ["model=explicit"]):
        folders.append(train(config.compose("train", [*own, *words]), words).folder)
    given = [word for word in words if word.startswith(("paths.", "gpu.", "logger="))]
    before = {folder: (folder / "last.pt").read_bytes() for folder in folders}
    assert main(["bench", "runs=deq,explicit", "rounds=2", *given]) == 0
    out = capsys.readouterr().out
    assert re.search(r"–  deq / explicit ×\d+ +train", out), out
    [rec] = [record.read_record(path) for path in (tmp_path / "runs").glob("bench-digits-*/record.json")]
    ran = record.read_record(folders[0])
    assert rec["config"]["runs"] == [folder.name for folder in folders]
    assert rec["config"]["rows"][0]["stop"] == ran["config"]["stop"]
    assert rec["config"]["rows"][0]["recipe"]["batch"] == 20
    assert rec["rows"][0]["val_acc"] == ran["metrics"]["val_acc"]
    mib = rec["rows"][0]["memory"]
    assert len(mib["train_mib_readings"]) == len(mib["predict_mib_readings"]) == memory.READINGS
    assert mib["train_mib"] == sorted(mib["train_mib_readings"])[1]
    assert {folder: (folder / "last.pt").read_bytes() for folder in folders} == before
    for wrong, why in ((["runs=deq"], "two rows or more"), (["runs=deq,zzz"], "no run 'zzz'"),
                       (["runs=deq,12345e1234"], "no run '12345e1234'"),
                       (["runs=deq,explicit", "model=deq"], "leave model=deq out"),
                       (["runs=deq,explicit", "at=5"], "leave at=[5] out")):  # fmt: skip
        assert main(["bench", *wrong, *given]) == 2
        assert why in capsys.readouterr().err
    record.write_record(folders[0], {**ran, "status": "interrupted"})
    assert main(["bench", "runs=deq,explicit", *given]) == 2
    assert "runs=deq is interrupted; bench times finished trainings" in capsys.readouterr().err


def test_a_peak_is_of_the_step_itself(made):
    """Unrolling 40 applications of the cell keeps 40 states that JFB does not; both in a process of their own."""
    words = ["model=deq", "solver=picard", "stop=fixed_steps", "stop.steps=40", "recipe.batch=1000"]
    unrolled, jfb = made("deq", *words[1:], "adjoint=unroll"), made("deq", *words[1:], "adjoint=jfb")
    (a, b), failed = memory.peaks([unrolled, jfb], [None, None])
    assert failed == {}
    state = 1000 * unrolled.model.layer.cell.size * 4 / 2**20  # MiB
    assert min(a["train"]) - max(b["train"]) > 40 * state
    assert max(b["train"]) < 20 * state
    assert 0 <= min(a["predict"]) <= max(a["predict"]) < min(a["train"])


def test_a_row_whose_memory_cannot_be_measured_says_why(made):
    fine, broken = made(), made()
    broken.label = "broken"
    broken.job.config["network"] = {**broken.job.config["network"], "hidden": -1}
    found, failed = memory.peaks([fine, broken], [None, None])
    assert min(found[0]["train"]) > 0
    assert found[1] == memory.NOTHING
    assert "network.hidden=-1 must be at least 1" in failed["broken"]


def test_a_row_that_a_gpu_has_no_memory_for_costs_the_others_and_itself_nothing(made, monkeypatch, tmp_path):
    at, put = [], rows.Row.put

    def measure(row, work):
        if row.label == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return 5.0

    monkeypatch.setattr(rows.Row, "put", lambda row, state: (at.append(state["model"]), put(row, state)))

    fine, large = made(), made()
    large.label = "large"
    class Cuda(str):
        type = "cuda"

    kept = tmp_path / "kept.pt"
    torch.save(made("skip_deq", "seed=1").state(), kept)
    for row in (fine, large):
        row.device.torch = Cuda("cpu")
    monkeypatch.setattr(memory, "_cuda", measure)
    before = large.state()["model"]
    found, failed = memory.peaks([fine, large], [kept, None])
    assert found == [{"train": [5.0] * 3, "predict": [5.0] * 3}, memory.NOTHING]
    assert failed.keys() == {"large"}
    assert same(large.model.state_dict(), before)  # it took a step before the one that failed
    assert large.model.training
    assert large.step.taken == 0
    assert same(at[0], torch.load(kept, weights_only=True)["model"])  # not at those it begins with
