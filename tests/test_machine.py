"""implicit_bench.machine: allocator, fingerprint, who else is at work, memory; against a /proc that we write."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from implicit_bench import machine
from implicit_bench.machine import Alone

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")


def test_fingerprint_is_plain_and_follows_the_thread_count():
    found = machine.fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert (found["torch"], found["cuda"]) == (torch.__version__, torch.version.cuda)
    assert found["cpu"]
    assert found["cores"] >= 1
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A /proc in jiffies: `proc(busy, {pid: (parent, own)}, seconds)`."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: now.s))
    hz = os.sysconf("SC_CLK_TCK")

    def write(busy_s, processes, passed_s=0.0, waiting_s=0.0):
        now.s += passed_s
        user, system, steal = busy_s * hz / 2, busy_s * hz / 4, busy_s * hz / 4
        idle = round((now.s * 2 + waiting_s) * hz)
        line = f"cpu  {user:.0f} 0 {system:.0f} {idle} {waiting_s * hz:.0f} 0 0 {steal:.0f} 77 0"
        (tmp_path / "stat").write_text(f"{line}\ncpu0 1 2\n")
        for pid, (parent, own_s) in processes.items():
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            quarter = round(own_s * hz / 4)
            fields = [parent, *[5] * 9, *[quarter] * 4, 20]
            (tmp_path / str(pid) / "stat").write_text(f"{pid} (a b) R) S {' '.join(map(str, fields))}\n")
        return tmp_path

    return write


ME = os.getpid()


@pytest.mark.parametrize(("others_s", "alone"), [(0, True), (0.4, True), (0.6, False), (9, False)])
def test_alone_counts_what_others_use_against_one_core(proc, others_s, alone):
    """We, our child and its child are busy throughout, and the disk; process 7 is somebody else's."""
    started = Alone(proc(100, {ME: (1, 20), 50001: (ME, 8), 50002: (50001, 4), 7: (1, 400)}))
    proc(130 + others_s, {ME: (1, 36), 50001: (ME, 16), 50002: (50001, 10), 7: (1, 900)}, passed_s=5, waiting_s=3)
    assert started.others_cores() == pytest.approx(others_s / 5, abs=0.01)
    assert started.read() is alone


def test_alone_does_not_guess(proc, tmp_path):
    started = Alone(proc(100, {ME: (1, 20)}))
    proc(100, {ME: (1, 20)}, passed_s=0.5)
    assert started.read() is None  # too short for the kernel's ticks
    proc(100, {ME: (1, 60)}, passed_s=5)
    assert started.read() is None  # a /proc/stat that does not count what we used
    assert Alone(tmp_path / "none").read() is None


@LINUX
def test_alone_reads_the_real_proc():
    assert Alone()._others_s() is not None


def python(code, **env):
    """What `code` prints, as JSON, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", "import json, torch\nfrom implicit_bench import machine\n" + code],
        capture_output=True, text=True, check=True, env={**os.environ, **env},
    )  # fmt: skip
    return json.loads(done.stdout)


@LINUX
def test_the_allocator_policy_ends_page_faults_and_pads_the_heap():
    code = """
import resource
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def heap_mib(): return next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith("VmData"))
word = [machine.set_allocator_policy(**KWARGS) for _ in range(2)] if TUNED else []
before = heap_mib()
keep = torch.ones(2**20)
grown = heap_mib() - before
def work(): torch.ones(2**23)
for _ in range(20): work()  # the first few must fill glibc's cache of splinters
start = faults()
for _ in range(10): work()
print(json.dumps([word, faults() - start, grown]))
"""
    default = python(code.replace("TUNED", "False"))
    tuned = python(code.replace("TUNED", "True").replace("KWARGS", "{}"))
    unpadded = python(code.replace("TUNED", "True").replace("KWARGS", "{'top_pad': False}"))
    if tuned[0][0] == "default: not glibc on Linux":
        pytest.skip("not glibc")
    assert tuned[0] == ["glibc-tuned"] * 2
    assert unpadded[0] == ["glibc-tuned, no top pad"] * 2
    assert max(tuned[1], unpadded[1]) < default[1] / 10
    assert tuned[2] > 200 > 100 > unpadded[2]


def test_the_allocator_policy_never_raises_and_names_its_reason(monkeypatch):
    class Libc:
        gnu_get_libc_version = None

        def mallopt(self, option, value):
            return int(option != -1)

    monkeypatch.setattr(machine.sys, "platform", "linux")
    for libc, word in (
        (lambda _: Libc(), "default: mallopt(-1, 2147483647) refused"),
        (lambda _: object(), "default: not glibc on Linux"),
        (lambda _: [][0], "default: IndexError"),
    ):
        monkeypatch.setattr(machine.ctypes, "CDLL", libc)
        assert machine.set_allocator_policy() == word
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: Libc())
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert machine.set_allocator_policy() == "default: another malloc is preloaded"


@LINUX
def test_too_little_memory_is_told_with_its_remedy_and_any_other_error_by_its_first_line():
    with pytest.raises(RuntimeError) as caught:  # what torch itself says
        torch.empty(2**50)
    remedy = "out of memory; lower recipe.batch, or recipe.eval_batch where it is the evaluation"
    assert machine.told(caught.value) == machine.told(MemoryError()) == remedy
    assert machine.told(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")) == remedy
    assert machine.told(ValueError("one\ntwo")) == "ValueError: one"


@LINUX
def test_what_is_more_than_the_memory_that_is_free_is_refused_at_once_and_anew_each_time():
    fits, refused, later = python("""
from implicit_bench import limits
limits.free_memory = lambda: 2**28
limits.limit_memory()
fits = torch.ones(2**25).numel()  # 128 MiB
try:
    torch.ones(2**27)
except RuntimeError as error:
    refused = machine.told(error)
limits.free_memory = lambda: 2**30
limits.limit_memory()
print(json.dumps([fits, refused, torch.ones(2**27).numel()]))
""")
    assert (fits, later) == (2**25, 2**27)
    assert refused.startswith("out of memory; lower recipe.batch")


def test_peak_memory_sees_a_tensor_that_is_gone_until_reset():
    base, high, reset, low = python("""
base = machine.peak_memory_mib()
torch.ones(2**26)
high = machine.peak_memory_mib()
print(json.dumps([base, high, machine.reset_peak_memory(), machine.peak_memory_mib()]))
""")
    assert 250 < high - base < 300
    assert not reset or low < high - 200


def test_peak_memory_on_cuda_is_torchs(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    assert machine.reset_peak_memory("cuda:1")
    assert machine.peak_memory_mib("cuda:1") == 3
    assert asked == ["cuda:1", "cuda:1"]


HOLD = """
import sys, time
from pathlib import Path
from implicit_bench.machine import claim
print(claim(["a", "b"], Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


@LINUX
def test_processes_share_out_the_devices_and_a_killed_one_gives_its_back(tmp_path):
    def process():
        started = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        return started, started.stdout.readline().strip()

    every = [process() for _ in range(3)]
    try:
        assert [found for _, found in every] == ["0", "1", "None"]
        every[0][0].kill()
        every[0][0].wait()
        every.append(process())
        assert every[-1][1] == "0"
    finally:
        for started, _ in every:
            started.kill()
            started.communicate()


def test_a_run_takes_one_free_gpu_once_and_where_none_is_free_the_first_and_is_not_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu{i}"))
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    found = []
    for _ in range(3):  # three runs, as far as the locks can tell
        monkeypatch.setattr(machine, "_gpu", None)
        monkeypatch.setattr(machine, "_shares_gpu", False)
        found.append((machine.take_gpu(), machine.take_gpu(), machine._shares_gpu, Alone().read()))
    assert [each[:3] for each in found] == [(0, 0, False), (1, 1, False), (0, 0, True)]
    assert found[2][3] is False
    assert chosen == [0, 1, 0]
