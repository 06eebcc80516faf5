"""One writer a run folder: refusal, death, other hosts, thieves."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from implicit_bench import lock
from implicit_bench.lock import RunLock, RunLocked, owner

PACKAGE = Path(lock.__file__).parent  # lock.py stands alone: its subprocesses need not import the package
HOLD = f"""
import sys, time
sys.path.insert(0, {str(PACKAGE)!r})
import lock
held = lock.RunLock(sys.argv[1]).__enter__()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deq-digits-s0-3fa9c1d20b"


@pytest.fixture
def holder(folder):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write_lock(folder, *, silent_s=0.0, **changes):
    """A lock as some owner left it; by default one on this machine, this very process."""
    path = folder / "run.lock"
    path.unlink(missing_ok=True)
    with RunLock(folder):
        content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    os.utime(path, (time.time() - silent_s, time.time() - silent_s))
    return path


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_taken_named_and_given_back(folder):
    with RunLock(folder) as held:
        found = owner(folder)
        assert found is not None
        assert found["pid"] == os.getpid()
        assert held.held()
    assert not held.held()
    assert owner(folder) is None
    assert list(folder.iterdir()) == []


def test_given_back_when_the_run_fails(folder):
    with pytest.raises(KeyError), RunLock(folder):
        raise KeyError
    with RunLock(folder):
        pass


def test_a_second_one_in_the_same_process_is_refused(folder):
    with RunLock(folder), pytest.raises(RunLocked), RunLock(folder):
        pass


def test_another_process_is_refused_in_a_sentence_that_names_it(folder, holder):
    with pytest.raises(RunLocked) as caught, RunLock(folder):
        pass
    sentence = rf"run 3fa9c1d20b is being written by pid {holder.pid} on \S+ since \d\d:\d\d; wait for it or stop it"
    assert re.fullmatch(sentence, str(caught.value))
    assert owner(folder)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_frees_the_run_at_once(folder, holder, reaped):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:  # a zombie still has its number
        while lock._process(holder.pid)[0] != "Z":
            time.sleep(0.01)
    assert (folder / "run.lock").exists()
    began = time.monotonic()
    with RunLock(folder) as mine:
        assert time.monotonic() - began < 1
        assert mine.held()
        assert [path.name for path in folder.iterdir()] == ["run.lock"]  # no litter of the removal


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times are read from /proc")
def test_a_number_that_now_belongs_to_another_process_is_a_dead_owner(folder):
    start = lock._process(os.getpid())[1]
    write_lock(folder, process_start=start)
    with pytest.raises(RunLocked), RunLock(folder):
        pass
    write_lock(folder, process_start=start - 1)
    with RunLock(folder) as mine:
        assert mine.held()


def test_start_time_is_field_22_of_stat(holder):
    """Ticks since boot, against the kernel's uptime: a process started a moment ago."""
    state, started = lock._process(holder.pid)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert state in ("S", "R")
    assert 0 <= uptime - started / os.sysconf("SC_CLK_TCK") < 30
    assert lock._process(dead_pid()) == (None, None)


@pytest.mark.parametrize("place", ["elsewhere boot pid:[1]", None])
def test_an_owner_elsewhere_is_judged_by_its_silence(folder, place):
    """Its process number says nothing here, be it a live process's or none's."""
    for pid in (os.getpid(), dead_pid()):
        elsewhere = {"host": "node7", "place": place, "pid": pid}
        write_lock(folder, **elsewhere, silent_s=lock.SILENCE_S - 5)
        with pytest.raises(RunLocked, match=f"pid {pid} on node7"), RunLock(folder):
            pass
        write_lock(folder, **elsewhere, silent_s=lock.SILENCE_S + 1)
        with RunLock(folder) as mine:
            assert mine.held()


def test_silence_is_by_the_file_systems_clock(folder, monkeypatch):
    """This machine's clock may be an hour off without any effect."""
    write_lock(folder, place="elsewhere", silent_s=30)
    now = time.time
    for off in (-3600, 3600):
        monkeypatch.setattr(time, "time", lambda off=off: now() + off)
        with pytest.raises(RunLocked), RunLock(folder):
            pass


def test_a_live_owner_here_may_be_silent(folder):
    """Its process is what counts: a stopped or swapped-out run is not a dead one."""
    write_lock(folder, silent_s=lock.SILENCE_S * 100)
    with pytest.raises(RunLocked), RunLock(folder):
        pass


NOBODY = ["", "{", "[]", '{"pid": "x"}', '{"pid": 0, "token": "t", "host": "h", "since": "s"}']


@pytest.mark.parametrize("content", NOBODY)
def test_a_lock_that_names_nobody_holds_for_a_minute(folder, content, monkeypatch):
    """Its owner died between making it and writing it, or is about to write it."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    folder.mkdir()
    path = folder / "run.lock"
    path.write_text(content)
    with pytest.raises(RunLocked, match=r"run.lock names no owner; .* delete it or wait a minute"), RunLock(folder):
        pass
    os.utime(path, (time.time() - lock.SILENCE_S - 1,) * 2)
    with RunLock(folder) as mine:
        assert mine.held()


def test_the_heartbeat_beats_until_release_and_its_thread_ends(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    before = threading.active_count()
    with RunLock(folder) as held:
        assert threading.active_count() == before + 1
        assert held._thread.daemon  # it keeps no process alive
        os.utime(held.path, (0, 0))
        deadline = time.monotonic() + 5
        while held.path.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)
    assert threading.active_count() == before
    assert not held._thread.is_alive()


def test_an_owner_that_was_replaced_notices_and_leaves_the_other_alone(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    slept = RunLock(folder).__enter__()
    held = json.loads(slept.path.read_text())
    other = json.dumps({**held, "token": "another", "pid": 1})
    slept.path.unlink()
    slept.path.write_text(other)
    os.utime(slept.path, (0, 0))
    slept._thread.join(5)
    assert not slept._thread.is_alive()
    assert slept.path.stat().st_mtime == 0  # nor beats for the other
    assert not slept.held()
    slept.release()
    assert slept.path.read_text() == other


def test_release_twice_is_nothing(folder):
    held = RunLock(folder)
    held.release()
    held.__enter__()
    held.release()
    with RunLock(folder) as other:
        held.release()
        assert other.held()


def test_a_forked_child_gives_nothing_back(folder):
    """A data worker that is forked inherits the object, not the lock."""
    code = f"""
import os, sys
sys.path.insert(0, {str(PACKAGE)!r})
import lock
with lock.RunLock({str(folder)!r}) as held:
    if (child := os.fork()) == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    print(held.held())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_a_full_disk_leaves_no_lock(folder, monkeypatch):
    def full(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(lock.json, "dumps", full)
        with pytest.raises(OSError, match="disk full"), RunLock(folder):
            pass
    with RunLock(folder):
        pass


def stale(folder):
    write_lock(folder, process_start=-1)


@pytest.mark.parametrize("repeat", range(50))
def test_of_many_thieves_one_wins(folder, repeat):
    """Threads, which a barrier starts within microseconds of each other."""
    stale(folder)
    thieves = 4
    barrier, won, refused = threading.Barrier(thieves), [], []

    def steal():
        held = RunLock(folder)
        barrier.wait()
        try:
            won.append(held.__enter__())
        except RunLocked as error:
            refused.append(error)

    threads = [threading.Thread(target=steal) for _ in range(thieves)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, thieves - 1)
    assert won[0].held()
    won[0].release()
    assert list(folder.iterdir()) == []


STEAL = f"""
import sys, time
sys.path.insert(0, {str(PACKAGE)!r})
import lock
top, start, rounds = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
held = []
for i in range(rounds):
    while time.time() < start + 0.02 * i:
        pass
    try:
        held.append(lock.RunLock(f"{{top}}/{{i}}").__enter__())
        print(i)
    except lock.RunLocked:
        pass
print("end", flush=True)
sys.stdin.read()  # holds what it won until all are done
"""


def test_of_three_thieving_processes_one_wins_each_time(tmp_path):
    rounds = 50
    for i in range(rounds):
        stale(tmp_path / str(i))
    start = time.time() + 0.3
    arguments = [sys.executable, "-c", STEAL, str(tmp_path), str(start), str(rounds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(arguments, **pipes) for _ in range(3)]
    wins = [int(line) for process in processes for line in iter(process.stdout.readline, "end\n")]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert sorted(wins) == list(range(rounds))


def test_a_thief_that_comes_late_leaves_the_new_owner_alone(folder, monkeypatch):
    """It judged the old lock dead, then slept; meanwhile another removed that lock and took its own."""
    stale(folder)
    remove, first = lock._remove, []

    def late(path, token):
        if not first:
            first.append(RunLock(folder))  # before the recursion below
            first[0].__enter__()
        remove(path, token)

    monkeypatch.setattr(lock, "_remove", late)
    with pytest.raises(RunLocked), RunLock(folder):
        pass
    assert first[0].held()
    first[0].release()


def test_a_thief_that_died_at_work_is_stolen_from_too(folder):
    stale(folder)
    token = json.loads((folder / "run.lock").read_text())["token"]
    claim = folder / f"run.lock.{token}"
    claim.write_text(json.dumps({**json.loads((folder / "run.lock").read_text()), "token": "thief", "pid": dead_pid()}))
    with RunLock(folder) as mine:
        assert mine.held()
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
