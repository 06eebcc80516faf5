"""Downloads from a real server that cuts connections, forgets ranges or serves the wrong bytes."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from implicit_bench.data import DataCorrupt, DataError
from implicit_bench.data import download as module
from implicit_bench.data.download import download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def quiet(line):
    pass


@pytest.fixture
def get(server, tmp_path):
    server.files["a.bin"] = CONTENT
    return lambda report=quiet, md5=MD5: download([server.url("a.bin")], tmp_path / "parts", md5, report)


def ranges(server):
    return [wanted for _, wanted in server.requests]


def test_a_cut_connection_goes_on_where_it_stood(server, get, tmp_path):
    server.cut = [1_000_000, 500_000]
    assert get().read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000000-", "bytes=1500000-"]
    assert os.listdir(tmp_path / "parts") == ["a.bin"]


def test_what_came_before_is_taken_up_by_the_next_call(server, get, tmp_path):
    server.cut = [1_000_000, 0]
    with pytest.raises(DataError, match=r"^http.*: .*; 1 MB of it are kept, and the same command goes on from there$"):
        get()
    assert (tmp_path / "parts/a.bin.part").stat().st_size == 1_000_000
    lines = []
    assert get(lines.append).read_bytes() == CONTENT
    assert ranges(server)[-1] == "bytes=1000000-"
    assert lines == [f"fetching {server.url('a.bin')} from 1 MB on"]


def test_a_server_without_ranges_starts_again(server, get):
    server.cut, server.ranges = [1_000_000], False
    assert get().read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000000-"]


def test_a_whole_part_and_a_whole_file_are_only_checked(server, get, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.bin.part").write_bytes(CONTENT)
    assert get().read_bytes() == CONTENT  # answered by 416
    assert len(server.requests) == 1
    get()
    assert len(server.requests) == 1


def test_a_wrong_file_is_deleted_and_said(server, get, tmp_path):
    with pytest.raises(DataCorrupt, match=rf"a\.bin gave a wrong file \(md5 {MD5}, expected 0+\), which is deleted$"):
        get(md5="0" * 32)
    assert os.listdir(tmp_path / "parts") == []


def test_the_next_address_when_one_fails(server, tmp_path):
    server.files["a.bin"] = CONTENT
    path = download([server.url("b/a.bin"), server.url("a.bin")], tmp_path, MD5, quiet)
    assert path.read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"^http://\S+: Not Found; http://\S+: Not Found$"):
        download([server.url("c"), server.url("d")], tmp_path, MD5, quiet)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_too_little_room_is_said_before_anything_is_written(server, get, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5_000_000))
    with pytest.raises(DataError, match=r"parts has 5 MB free, but this needs 9 MB; make room or set paths\.data$"):
        get()
    assert os.listdir(tmp_path / "parts") == []


def test_two_processes_do_not_write_one_part(get, tmp_path):
    (tmp_path / "parts").mkdir()
    with (tmp_path / "parts/a.bin.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is fetching a\.bin"):
            get()


def test_a_silent_server_is_given_up(server, get, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(server.http, "finish_request", lambda *_: time.sleep(1))
    with pytest.raises(DataError, match=r"timed out$"):
        get()


def test_ctrl_c_keeps_what_has_come(server, tmp_path):
    """In a process of its own, killed by SIGINT in the middle of a read."""
    code = f"""
import sys
from implicit_bench.data.download import download
download([sys.argv[1]], __import__("pathlib").Path(sys.argv[2]), {MD5!r}, lambda line: print(line, flush=True))
"""
    server.files["a.bin"] = CONTENT
    sent, finish = CONTENT[:1_000_000], server.http.RequestHandlerClass.do_GET

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(sent)
        time.sleep(1)

    server.http.RequestHandlerClass.do_GET = slow
    parts = tmp_path / "parts"
    words = [sys.executable, "-c", code, server.url("a.bin"), str(parts)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20)
    kept = (parts / "a.bin.part").stat().st_size
    assert 0 < kept <= len(sent)
    server.http.RequestHandlerClass.do_GET = finish
    assert download([server.url("a.bin")], parts, MD5, quiet).read_bytes() == CONTENT
    assert ranges(server) == [f"bytes={kept}-"]
