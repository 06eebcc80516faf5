"""What can go wrong, really done to a run: nothing is lost, the next command goes on, and the end is bit for bit that
of a run which nothing happened to. `make soak` does it at length and keeps a log."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import forked
import jobs
import pytest
import torch

from implicit_bench import record
from implicit_bench.cli import main
from implicit_bench.data import images
from implicit_bench.jsonl import read_jsonl
from implicit_bench.train import checkpoint, loop

LOG = os.environ.get("IMPLICIT_BENCH_SOAK")  # a file: do everything at length, and append what happened
RUN = ("model=skip_deq", "recipe.epochs=3", "dataset.flip=0.5", "dataset.pad=1", "progress.log_steps=10",
       "penalty=[skip,jacobian]", "penalty.jacobian.probability=0.5", "progress.save_s=0.05")  # fmt: skip


def log(line):
    print(line)
    if LOG:
        with open(LOG, "a") as file:
            file.write(line + "\n")


def rows(folder):
    found = list(read_jsonl(folder / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if not k.startswith("timing")} for row in found]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return jobs.run(tmp_path_factory.mktemp("undisturbed"), *RUN)


def finish(top, undisturbed):
    """The same command again ends as if nothing had happened."""
    again = jobs.run(top, *RUN)
    assert again.exit_code == 0
    assert jobs.same_weights(again.folder, undisturbed.folder)
    assert rows(again.folder) == rows(undisturbed.folder)
    assert again.record["metrics"] == undisturbed.record["metrics"]
    return again


def process(top, before="", words=RUN, **where):
    """The command in a process of its own, after some lines of Python."""
    code = f"import sys\n{before}\nfrom implicit_bench.cli import main\nsys.exit(main(sys.argv[1:]))"
    return forked.Popen([sys.executable, "-c", code, "train", *jobs.words(top, *words)], **where)


# ---------------------------------------------------------------------------------------------------------- SIGKILL

KILL = "import os, signal, threading, time\nkill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
IN_STEP = KILL + """
from implicit_bench.train import step
real = step.Step.__call__
def call(self, x, y):
    if self.taken == {step}:
        kill()
    return real(self, x, y)
step.Step.__call__ = call
"""
IN_WRITE = KILL + """
import torch
real, left = torch.save, {number}
def save(content, file):
    global left
    left -= 1
    real(content, file)
    if left == 0:
        file.flush()
        file.truncate(file.tell() // 2)
        kill()
torch.save = save
"""
AFTER = KILL + """
from implicit_bench.train import loop
real = loop.Fit.run
def run(self, *args):
    threading.Timer({seconds}, kill).start()
    return real(self, *args)
loop.Fit.run = run
"""


def kills(count, duration):
    """What to do before the run, and how it is called in the log: every third in a write, the first before any."""
    luck = random.Random()
    for k in range(count):
        if k % 3 == 0:
            at = luck.randrange(5) if k == 0 else luck.randrange(117)
            yield IN_STEP.format(step=at), f"in step {at + 1}"
        elif k % 3 == 1:
            number = luck.randrange(1, 4)
            yield IN_WRITE.format(number=number), f"while checkpoint {number} was written"
        else:
            seconds = luck.uniform(0, 0.8 * duration)
            yield AFTER.format(seconds=seconds), f"{seconds:.2f} s after the first step"


def test_a_kill_at_any_moment_then_the_same_command(tmp_path, undisturbed):
    epochs = [row["timing.epoch_s"] for row in read_jsonl(undisturbed.folder / "metrics.jsonl") if "epoch" in row]
    survived, many = 0, 20 if LOG else 3
    for k, (before, when) in enumerate(kills(many, sum(epochs))):
        top = tmp_path / str(k)
        killed = process(top, before)
        killed.communicate(timeout=120)
        assert killed.returncode == -signal.SIGKILL, when
        kept = checkpoint.load(top / "runs" / undisturbed.folder.name, torch.device("cpu"), print)
        again = finish(top, undisturbed)
        assert bool(again.record["resumed_from"]) == (kept is not None)
        survived += 1
        log(f"SIGKILL {when}: kept step {kept['step'] if kept else 0} of 117; ended bit for bit as undisturbed")
        shutil.rmtree(top)
    log(f"kills survived {survived} of {many}")


# ------------------------------------------------------------------------------------------------- nowhere to write


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """A run that was interrupted at step 50; returns its folder."""
    real = loop.Step.__call__

    def stopping(self, x, y):
        if self.taken == 49:
            signal.raise_signal(signal.SIGINT)
        return real(self, x, y)

    monkeypatch.setattr(loop.Step, "__call__", stopping)
    stopped = jobs.run(tmp_path, *RUN)
    assert stopped.exit_code == 130
    monkeypatch.setattr(loop.Step, "__call__", real)
    return stopped.folder


LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize("file", ["last.pt", "metrics.jsonl", "record.json"])
def test_a_file_that_cannot_grow(tmp_path, undisturbed, half_done, file):
    """Each in turn is the first that is too large: a checkpoint, the rows, the record."""
    size = {"last.pt": 200_000, "metrics.jsonl": (half_done / "metrics.jsonl").stat().st_size + 100, "record.json": 500}
    before = (half_done / "last.pt").read_bytes()
    full = process(tmp_path, LIMIT.format(size=size[file]))
    _, err = full.communicate(timeout=120)
    assert full.returncode == 1, err
    assert "Traceback" not in err
    assert "File too large" in err
    if file != "record.json":
        rec = record.read_record(half_done)
        assert rec["status"] in ("failed", "interrupted", "running")
    assert (half_done / "last.pt").read_bytes() == before
    finish(tmp_path, undisturbed)
    log(f"{file} may not grow: said so, the last checkpoint intact, the same command went on")


@contextmanager
def small_disk(folder, size):
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def mountable():
    if os.geteuid():
        return False
    with tempfile.TemporaryDirectory() as top:  # each of pytest's workers asks, at the same moment
        try:
            with small_disk(Path(top) / "disk", "64k"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


if mountable():  # elsewhere the limits on a file's size above are what can be had

    def test_a_disk_that_is_full(tmp_path, undisturbed):
        with small_disk(tmp_path / "runs", "1500k") as resize:
            full = process(tmp_path)
            _, err = full.communicate(timeout=120)
            assert full.returncode == 1, err
            assert "No space left on device" in err
            assert "Traceback" not in err
            resize("64m")
            finish(tmp_path, undisturbed)
        log("a full disk: said so, and with room again the same command went on")


def test_a_results_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "logger=none", "paths.runs=/proc/runs"]) == 2
    assert "paths.runs=/proc/runs cannot be used (" in capsys.readouterr().err
    assert main(["train", "-m", "seed=0,1", "logger=none", "paths.runs=/proc/runs"]) == 2
    assert "paths.runs=/proc/runs cannot be used (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_truncated_checkpoint_is_passed_over_aloud(tmp_path, undisturbed, half_done, capsys):
    whole = (half_done / "last.pt").read_bytes()
    (half_done / "last.pt").write_bytes(whole[: len(whole) // 3])
    finish(tmp_path, undisturbed)
    assert "last.pt is damaged or truncated" in capsys.readouterr().err
    log("a truncated checkpoint: the one before it, said aloud")


# -------------------------------------------------------------------------------------------- numbers that are none


def test_nan_in_the_weights(tmp_path, half_done, capsys):
    content = checkpoint.read(half_done / "last.pt", torch.device("cpu"))
    content["model"]["head.weight" if "head.weight" in content["model"] else [*content["model"]][-1]].fill_(torch.nan)
    checkpoint.write(half_done / "last.pt", content)
    assert jobs.run(tmp_path, *RUN).exit_code == 1
    assert "was not finite at step 51" in capsys.readouterr().err
    assert record.read_record(half_done)["status"] == "failed"


@pytest.mark.parametrize(("where", "model"), [("data", ["model=deq"]), ("mid-solve", ["model=deq"]),
                                              ("data", ["model=homo_ode", "network=homo_conv"])])  # fmt: skip
def test_nan_in_one_batch(tmp_path, monkeypatch, capsys, where, model):
    """In an image, or in what the cell makes of it in its second call, at step 7."""
    step = loop.Step.__call__

    def spoilt(self, x, y):
        if self.taken != 6:
            return step(self, x, y)
        if where == "data":
            return step(self, x.index_fill(0, torch.tensor(3), torch.nan), y)
        cell, calls = self.model.layer.cell, []
        forward = cell.forward

        def broken(z, *rest):
            calls.append(1)
            out = forward(z, *rest)
            return out.index_fill(0, torch.tensor(3), torch.nan) if len(calls) > 1 else out

        with monkeypatch.context() as patch:
            patch.setattr(cell, "forward", broken)
            return step(self, x, y)

    monkeypatch.setattr(loop.Step, "__call__", spoilt)
    words = [*model, "recipe.max_steps=20"]
    assert jobs.run(tmp_path, *words).exit_code == 1
    assert "was not finite at step 7; lower recipe.lr" in capsys.readouterr().err
    skipped = jobs.run(tmp_path, *words, "recipe.on_nonfinite=skip_step")
    assert skipped.exit_code == 0
    assert skipped.record["nonfinite_steps"] == 1
    assert skipped.record["metrics"]["test_loss"] > 0  # running statistics are as before that step, too
    log(f"NaN in {where}: the run fails in a sentence, or skips the step where it is told to")


# ------------------------------------------------------------------------------------------------- what else breaks


def test_data_that_cannot_be_read_any_more(tmp_path, monkeypatch, undisturbed, capsys):
    real = images.Data.batches

    def breaking(self, *args, **kwargs):
        for k, batch in enumerate(real(self, *args, **kwargs)):
            if k == 20:
                raise OSError(5, "Input/output error", "train-images")
            yield batch

    monkeypatch.setattr(images.Data, "batches", breaking)
    failed = jobs.run(tmp_path, *RUN)
    assert failed.exit_code == 1
    assert "Input/output error" in record.read_record(failed.folder)["error"]
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(images.Data, "batches", real)
    finish(tmp_path, undisturbed)
    log("data that cannot be read: recorded, and the same command went on")


def test_a_job_that_wants_more_memory_than_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = jobs.words(tmp_path, "model=explicit", "recipe.max_steps=2", "network.hidden=3000000,64")
    assert main(["train", "-m", *words]) == 3
    out, err = capsys.readouterr()
    assert "cannot make network: " in out
    assert "can't allocate memory" in out
    assert "2 jobs: 1 done, 1 failed" in out
    assert "Traceback" not in err
    log("a job without enough memory: failed with its remedy, the others went on")


def test_wandbs_process_killed(tmp_path):
    """The service that wandb runs beside us dies in the midst: the training does not care."""
    words = ["model=explicit", "recipe.epochs=20", "logger=wandb", "logger.mode=offline"]
    beside = process(tmp_path, words=[*words], cwd=tmp_path)
    deadline, found = time.monotonic() + 120, []
    while not found and beside.poll() is None and time.monotonic() < deadline:
        every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        found = [pid for pid in every if "wandb-core" in _command(pid) and str(beside.pid) in _command(pid).split("\0")]
        time.sleep(0.02)
    time.sleep(0.3)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    _, err = beside.communicate(timeout=240)
    assert found, err
    assert beside.returncode == 0, err
    (rec,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json"))
    assert (rec["status"], rec["epochs"]) == ("done", 20)
    assert "Traceback" not in err
    log("W&B's process killed: the run ended as it would have, with its record")


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_clock_set_back(tmp_path, undisturbed, half_done, monkeypatch, capsys):
    """The record and the files of an interrupted run are of tomorrow."""
    rec = record.read_record(half_done)
    rec["started_at"] = "2099-01-01T00:00:00.000+00:00"
    record.write_record(half_done, rec)
    for path in half_done.iterdir():
        os.utime(path, (4e9, 4e9))
    again = finish(tmp_path, undisturbed)
    assert 0 < again.record["timing"]["total_s"] < 3600
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "skip_deq" in capsys.readouterr().out


def test_a_thousand_finished_runs_are_not_all_read(tmp_path, monkeypatch, capsys):
    done = jobs.run(tmp_path, "model=explicit", "recipe.max_steps=2")
    text = (done.folder / "record.json").read_text()
    for k in range(1000):
        folder = done.folder.with_name(f"explicit-digits-s0-{k:010x}")
        folder.mkdir()
        (folder / "record.json").write_text(text)
    read, seen = record.read_record, []
    monkeypatch.setattr(record, "read_record", lambda path: seen.append(path) or read(path))
    assert jobs.run(tmp_path, "model=explicit", "recipe.max_steps=2").skipped
    assert len(seen) <= 3


# ----------------------------------------------------------------------------------------------------------- a soak

WATCH = """
import gc, json, os, threading
from implicit_bench.train import command
real = command.train
def train(*args):
    found = real(*args)
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    print("soak", json.dumps({"mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "threads": threading.active_count(),
                              "files": len(os.listdir("/proc/self/fd")), "children": len(children),
                              "peak": found.record["memory"]["peak_mib"]}), flush=True)
    return found
command.train = train
"""


def test_many_runs_in_one_process_leak_nothing(tmp_path):
    """Memory is that after the first runs, which fill caches, within 5 %; so are threads, open files and processes."""
    many, settled = (200, 20) if LOG else (20, 8)
    words = jobs.words(tmp_path, "model=skip_deq,explicit", f"seed=range({many // 2})", "recipe.max_steps=3")
    code = f"import sys\n{WATCH}\nfrom implicit_bench.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "train", "-m", *words], text=True, capture_output=True,
                          cwd=tmp_path, timeout=3000)  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line.removeprefix("soak ")) for line in done.stdout.splitlines() if line.startswith("soak ")]
    assert len(seen) == many
    base, last = seen[settled], seen[-1]
    log(f"soak of {many} runs, MiB after each: " + " ".join(f"{each['mib']:.0f}" for each in seen))
    log("then and at the end: " + ", ".join(f"{base[name]} and {last[name]} {name}" for name in (
        "threads", "files", "children")))  # fmt: skip
    assert max(each["mib"] for each in seen[settled:]) < 1.05 * base["mib"]
    assert (last["threads"], last["children"]) == (base["threads"], base["children"])
    assert last["files"] <= base["files"]
    assert max(each["peak"] for each in seen[settled:]) < 1.05 * seen[settled]["peak"]  # each run's own


# --------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_is_written_anywhere(tmp_path):
    """Planted in the environment, where wandb and others look for them; whatever a run leaves is searched."""
    planted = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_plantedplantedplanted",
               "AWS_SECRET_ACCESS_KEY": "planted-aws-secret"}  # fmt: skip
    words = ["model=explicit", "recipe.max_steps=3", "logger=wandb", "logger.mode=offline"]
    run = process(tmp_path, words=words, cwd=tmp_path, env={**os.environ, **planted})
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in left)
    assert any(path.name == "record.json" for path in left)
    for secret in planted.values():
        assert not [path for path in left if secret.encode() in path.read_bytes()]
        assert secret not in out + err


def test_what_a_checkpoint_runs_is_refused(tmp_path, half_done, capsys):
    """Both checkpoints of a run are replaced by pickles that would make a file."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for name in checkpoint.NAMES:
        torch.save({"model": Evil(), "step": 1}, half_done / name)
    words = jobs.words(tmp_path, *RUN)
    assert main(["train", *words]) == 2
    assert "damaged or truncated" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
