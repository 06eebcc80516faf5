"""`doctor`: each thing amiss is found and has its remedy, on machines and installations that we make up."""

import importlib.metadata
import os
import subprocess
import sys
from email.message import Message
from types import SimpleNamespace

import pytest
import torch

from implicit_bench import doctor, limits, machine
from implicit_bench.doctor import GIB, Finding, cores, examine, show
from implicit_bench.machine import gflops


def look(check, tmp_path, **only):
    """What one check finds, by name."""
    found = list(doctor.CHECKS[check](tmp_path / "runs", tmp_path / "data"))
    return {f.name: f for f in found} if not only else [f for f in found if f.name == only["name"]]


def test_a_whole_examination_names_everything_and_a_remedy_for_all_that_is_amiss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "gflops", lambda work, flops: (work(), flops)[1])
    found = examine(tmp_path / "runs", tmp_path / "data")
    every = "python packages extras configs torch gpu torchvision cores threads memory allocator peak runs wandb load"
    assert {f.name for f in found} == {*every.split(), "data", "data set"}
    assert [f for f in found if f.state == "bad" and f.name != "packages"] == []
    assert all(f.remedy for f in found if f.state != "ok")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("doctor  ")
    show(found)
    shown = capsys.readouterr().out
    for finding in found:
        assert finding.text in shown
        assert finding.remedy in shown
    assert list(tmp_path.iterdir()) == []  # it only looks


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        yield Finding("first", "ok", "was fine")
        raise ImportError("no libcuda\nhere")

    wandb = doctor.CHECKS["wandb"]
    monkeypatch.setattr(doctor, "CHECKS", {"torch": broken, "wandb": wandb})
    found = {f.name: f for f in examine(tmp_path, tmp_path)}
    assert found["torch"].state == "bad"
    assert found["torch"].text == "cannot be examined (ImportError: no libcuda here)"
    assert "install" in found["torch"].remedy
    assert found["wandb"].state == "ok"


def test_without_torch_it_still_says_what_it_can(tmp_path):
    code = """
import sys
sys.modules["torch"] = None  # import raises
from pathlib import Path
from implicit_bench.doctor import examine
for f in examine(Path("runs"), Path("data")): print(f.name, f.state, f.text, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert found["torch"].startswith("bad|cannot be examined (ModuleNotFoundError")
    assert found["packages"].startswith("ok|")
    assert found["memory"].startswith("ok|")


# ------------------------------------------------------------------------------------------------- installation


def installed(monkeypatch, python=">=3.10", needs=(), extras=(), **versions):
    """An installation whose metadata say this."""
    given = Message()
    given["Version"], given["Requires-Python"] = "0.1", python
    for need in needs:
        given["Requires-Dist"] = need
    for extra in extras:
        given["Provides-Extra"] = extra

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: given)
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_versions_are_held_against_the_requirements(tmp_path, monkeypatch):
    installed(monkeypatch, needs=["torch>=2.6,<2.14", "rich>=13", "numpy>=1.26", "tomli>=2; python_version<'3'"],
              torch="2.15.0+cpu", rich="13.0")  # fmt: skip
    found = list(doctor.CHECKS["packages"](tmp_path, tmp_path))
    assert Finding("packages", "ok", "implicit-bench 0.1, rich 13.0") in found
    torch, numpy = [f for f in found if f.state == "bad"]
    assert (torch.text, torch.remedy) == ("torch 2.15.0+cpu is not <2.14,>=2.6", "pip install 'torch<2.14,>=2.6'")
    assert (numpy.text, numpy.remedy) == ("numpy is not installed", "pip install 'numpy>=1.26'")


def test_another_python_is_told(tmp_path, monkeypatch):
    installed(monkeypatch, python="<3.5")
    found = look("packages", tmp_path)["python"]
    assert found.state == "bad"
    assert found.text.endswith("and not <3.5")
    assert "Python <3.5" in found.remedy


def test_an_extra_is_no_problem_but_says_how_to_have_it(tmp_path, monkeypatch):
    needs = ["torchdeq==0.1.0; extra == 'peers'", "scipy>=1; extra == 'dev'", "implicit-bench[peers]; extra == 'dev'"]
    installed(monkeypatch, needs=needs, extras=["peers", "dev"], scipy="1.5")
    peers, dev = look("packages", tmp_path, name="extras")
    assert peers == ("extras", "ok", "[peers] torchdeq is not installed", "pip install 'implicit-bench[peers]' adds it")
    assert dev == ("extras", "ok", "[dev] installed", "")


def test_configs_and_torchvision_are_looked_for(tmp_path, monkeypatch):
    from implicit_bench import schema

    assert int(look("configs", tmp_path)["configs"].text.split()[0]) > 30
    assert look("torchvision", tmp_path)["torchvision"].state == "ok"

    def none():
        raise schema.UsageError("no configs beside it")

    monkeypatch.setattr(schema, "config_dir", none)
    monkeypatch.setattr(doctor, "CHECKS", {"configs": doctor.CHECKS["configs"]})
    assert "UsageError: no configs beside it" in examine(tmp_path, tmp_path)[0].text


# ------------------------------------------------------------------------------------------------------ torch, GPU


SMI = "NVIDIA H200, 570.1\n"


@pytest.mark.parametrize(
    ("cuda", "smi", "hidden", "state", "text", "remedy"),
    [
        (None, "", None, "ok", "none", ""),
        ("13.0", "", None, "warn", "torch could use one", "nvidia-smi"),
        ("13.0", SMI, None, "bad", "H200, 570.1, which torch does not see", "an older CUDA than 13.0"),
        ("13.0", SMI, "", "bad", "which torch does not see", "unset CUDA_VISIBLE_DEVICES, which is ''"),
        (None, SMI, None, "bad", "which a CPU build of torch cannot use", "install a CUDA build"),
    ],
)
def test_a_gpu_that_is_not_used_has_its_reason(tmp_path, monkeypatch, cuda, smi, hidden, state, text, remedy):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    def run(command, **_):
        if not smi:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(returncode=0, stdout=smi)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    found = look("torch", tmp_path)["gpu"]
    assert found.state == state
    assert text in found.text
    assert remedy in found.remedy
    assert bool(found.remedy) == (state != "ok")


@pytest.mark.parametrize(("free", "state"), [(100, "ok"), (20, "warn")])
def test_a_gpu_is_named_with_its_memory(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free * GIB, 140 * GIB))
    found = look("torch", tmp_path)["gpu"]
    assert (found.state, found.text) == (state, f"H200, {free}.0 of 140.0 GiB free")


def test_gflops_are_by_the_fastest_call_and_the_first_does_not_count(monkeypatch):
    took = iter([9.0, 4.0, 2.0, 3.0, 5.0])
    now = SimpleNamespace(s=0.0)

    def work():
        now.s += next(took, 100.0)

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now.s))
    assert gflops(work, 6e9, seconds=0) == 3.0


def test_the_peaks_count_two_a_multiply_add_and_restore_the_threads(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "gflops", lambda work, flops: asked.append((flops, work()[0])) or 1)
    monkeypatch.setattr(doctor, "cores", lambda: (3.0, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    assert "(3 threads)" in look("peak", tmp_path)["peak"].text
    assert torch.get_num_threads() == before
    (conv, y), (product, a) = asked
    assert conv == 2 * 9 * 64 * y.numel()
    assert product == 2 * a.numel() * a.shape[0]


# ------------------------------------------------------------------------------------------------------ machine


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of 8 cores with a /proc and a control group of ours; returns what writes their files."""
    monkeypatch.setattr(limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("-", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return write


def test_cores_by_affinity_and_by_quota(host, monkeypatch, tmp_path):
    assert cores() == (8, "")  # no /proc, no control groups
    host(**{"proc__self__cgroup": "0::/jobs/mine", "cgroup__jobs__cpu-max": "250000 100000",
            "cgroup__jobs__mine__cpu-max": "max 100000"})  # fmt: skip
    assert cores() == (2.5, "its control group")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert cores() == (1, "its affinity")


def test_too_many_threads_for_the_cores_have_a_remedy(host, tmp_path):
    assert look("cores", tmp_path)["cores"] == ("cores", "ok", "8 of 8", "")
    host(**{"cgroup__cpu-max": "250000 100000"})
    found = look("cores", tmp_path)["cores"]
    assert (found.state, found.text) == ("warn", "2.5 of 8, by its control group")
    assert found.remedy == "give commands gpu.threads=2, for they start 8 otherwise"


def test_few_cores_by_affinity_need_no_remedy(host, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2})
    assert look("cores", tmp_path)["cores"] == ("cores", "ok", "2 of 8, by its affinity", "")


@pytest.mark.parametrize(("value", "state"), [("2", "warn"), ("8", "ok"), ("many", "ok")])
def test_a_variable_that_holds_threads_back_is_named(host, tmp_path, monkeypatch, value, state):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    found = look("cores", tmp_path)["threads"]
    assert found.state == state
    assert ("OMP_NUM_THREADS=2" in found.text) == (state == "warn")
    assert found.remedy.startswith("unset OMP_NUM_THREADS") == (state == "warn")


@pytest.mark.parametrize(("others", "average", "state"), [(0.05, 9, "ok"), (1.5, 0, "warn"), (None, 3, "warn"),
                                                          (None, 0.1, "ok")])  # fmt: skip
def test_who_else_is_at_work(tmp_path, monkeypatch, others, average, state):
    monkeypatch.setattr(machine, "Alone", lambda: SimpleNamespace(others_cores=lambda: others))
    monkeypatch.setattr(os, "getloadavg", lambda: (average, 0, 0))
    monkeypatch.setattr(doctor.time, "sleep", lambda s: None)
    found = look("load", tmp_path)["load"]
    assert found.state == state
    assert str(average if others is None else "") in found.text
    assert ("wait for them" in found.remedy) == (state == "warn")


@pytest.mark.parametrize(
    ("files", "state", "text"),
    [
        ({}, "ok", "what is free cannot be told here"),
        ({"proc__meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB"}, "ok", "8.0 GiB free"),
        ({"proc__meminfo": f"MemAvailable: {2**19} kB"}, "warn", "0.5 GiB free"),
        ({"proc__meminfo": f"MemAvailable: {8 * 2**20} kB", "cgroup__memory-max": str(2 * GIB),
          "cgroup__memory-current": str(GIB + GIB // 2), "cgroup__memory-stat": "anon 3"}, "warn", "0.5 GiB free"),
        ({"cgroup__memory-max": str(2 * GIB), "cgroup__memory-current": str(2 * GIB),
          "cgroup__memory-stat": f"active_file {GIB}\ninactive_file {GIB // 2}"}, "ok", "1.5 GiB free"),
    ],
)  # fmt: skip
def test_memory_that_is_free(host, tmp_path, files, state, text):
    host(**files)
    found = look("memory", tmp_path)["memory"]
    assert (found.state, found.text) == (state, text)
    assert bool(found.remedy) == (state == "warn")


@pytest.mark.parametrize(("word", "state", "means"), [
    ("glibc-tuned", "ok", "freed memory stays in the process"),
    ("default: not glibc on Linux", "ok", "page faults are part"),
    ("default: another malloc is preloaded", "warn", "page faults are part"),
])  # fmt: skip
def test_the_allocators_word_is_explained(tmp_path, monkeypatch, word, state, means):
    monkeypatch.setattr(machine, "set_allocator_policy", lambda: word)
    found = look("allocator", tmp_path)["allocator"]
    assert found.state == state
    assert found.text.startswith(f"{word}; {means}")
    assert ("LD_PRELOAD" in found.remedy) == (state == "warn")


# ------------------------------------------------------------------------------------------------------- places


def test_a_full_disk_and_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert [f.state for f in look("places", tmp_path).values()] == ["ok", "ok"]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.9e9))
    found = look("places", tmp_path)
    assert [(f.state, f.text.split()[-3:]) for f in found.values()] == [("warn", ["1.9", "GB", "free"])] * 2
    assert "paths.runs=DIR" in found["runs"].remedy
    assert "paths.data=DIR" in found["data"].remedy

    def forbidden(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", forbidden)  # root may write anywhere
    found = look("places", tmp_path)
    assert (found["runs"].state, found["data"].state) == ("bad", "warn")
    assert "cannot be written (Permission denied)" in found["runs"].text
    assert "paths.runs=DIR" in found["runs"].remedy


def test_data_sets_that_are_there_and_how_to_fetch_the_others(tmp_path, capsys):
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"x")
    found = {f.text.split()[0]: f for f in look("data set", tmp_path, name="data set")}
    assert found["digits"] == ("data set", "ok", "digits present", "")
    assert found["mnist"].state == "warn"
    assert found["mnist"].text == "mnist incomplete"
    assert found["cifar10"].state == "ok"
    assert f"implicit-bench data dataset=cifar10 paths.data={tmp_path / 'data'}" in found["cifar10"].remedy
    doctor.show([found[name] for name in ("digits", "mnist", "cifar10")])
    marks = [line[1] for line in capsys.readouterr().out.splitlines() if "data set" in line]
    assert marks == ["✓", "!", "·"]  # there, amiss, and what is neither


KEY = "k" * 40


@pytest.mark.parametrize(
    ("environment", "netrc", "state", "text", "remedy"),
    [
        ({}, "", "ok", "offline (no key found): runs are kept in", "`wandb login`, then implicit-bench sync"),
        ({"WANDB_API_KEY": KEY}, "", "ok", "by WANDB_API_KEY (not tried): runs go to project implicit-bench", ""),
        ({"WANDB_API_KEY": KEY, "WANDB_PROJECT": "p"}, "", "ok", "runs go to project p", ""),
        ({}, "api.wandb.ai", "ok", "no-netrc (not tried)", ""),
        ({}, "github.com", "ok", "no key found", "wandb login"),
        ({"WANDB_BASE_URL": "https://ours:8443/x"}, "api.wandb.ai", "ok", "no key found", "wandb login"),
        ({"WANDB_BASE_URL": "https://ours:8443/x"}, "ours:8443", "ok", "no-netrc (not tried)", ""),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "ok", "offline (WANDB_MODE=offline)", "unset WANDB_MODE"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "", "warn", "switched off", "unset WANDB_MODE"),
    ],
)
def test_where_wandb_runs_would_go(tmp_path, monkeypatch, environment, netrc, state, text, remedy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "no-netrc").write_text(f"machine {netrc}\n login user\n password {KEY}\n")
    found = look("wandb", tmp_path)["wandb"]
    assert found.state == state
    assert text in found.text
    assert remedy in found.remedy
    assert KEY not in str(found)


def test_no_wandb(tmp_path, monkeypatch):
    installed(monkeypatch)
    assert look("wandb", tmp_path)["wandb"][1:3] == ("warn", "not installed")
