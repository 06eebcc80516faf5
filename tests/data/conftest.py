"""Small data sets in the official formats, known by their own sizes and hashes instead of the official ones."""

import hashlib
import io
import json
import pickle
import re
import struct
import subprocess
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from implicit_bench.data import files

N_TRAIN, N_TEST = 50, 10
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def tar_bytes(members, mode="w:gz"):
    """A tar archive of name -> content, or of TarInfo -> content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


class Tiny:
    """``x[split]``, ``y[split]`` and ``content[folder][file]`` of a small data set called ``name``."""

    def __init__(self, name, monkeypatch):
        self.name, rng, known = name, np.random.default_rng(len(name)), files.KNOWN[name]
        self.x = {s: rng.integers(0, 256, (n, *known.shape), np.uint8) for s, n in (("train", 50), ("test", 10))}
        self.y = {s: rng.integers(0, known.classes, len(x)).astype(np.uint8) for s, x in self.x.items()}
        make = getattr(self, f"_{name}", self._mnist)
        self.content = make(known)
        layouts = []
        for layout in known.layouts:
            table = {
                f: (layout.files[f][0] and len(c), hashlib.md5(c).hexdigest())
                for f, c in self.content[layout.folder].items()
            }
            layouts.append(replace(layout, files=table))
        self.known = replace(known, n_train=N_TRAIN, n_test=N_TEST, layouts=tuple(layouts))
        monkeypatch.setitem(files.KNOWN, name, self.known)

    def _mnist(self, known):
        parts = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            parts[f"{stem}-images-idx3-ubyte"] = idx_bytes(self.x[split][:, 0])
            parts[f"{stem}-labels-idx1-ubyte"] = idx_bytes(self.y[split])
        return {known.layouts[0].folder: parts}

    def batches(self):
        """(name, x (10, 3072), y (10,)) of the six batches."""
        for k, name in enumerate(BATCHES):
            split, part = ("test", slice(None)) if k == 5 else ("train", slice(10 * k, 10 * k + 10))
            yield name, self.x[split][part].reshape(10, 3072), self.y[split][part]

    def _cifar10(self, known):
        binary = {f"{name}.bin": np.concatenate([y[:, None], x], 1).tobytes() for name, x, y in self.batches()}
        pickles = {
            name: pickle.dumps({b"data": x.copy(), b"labels": y.tolist()}, protocol=2) for name, x, y in self.batches()
        }
        return {known.layouts[0].folder: binary, known.layouts[1].folder: pickles}

    def _cifar100(self, known):
        files = {
            split: pickle.dumps(
                {b"data": x.reshape(-1, 3072), b"fine_labels": self.y[split].tolist(), b"coarse_labels": [0] * len(x)},
                protocol=2,
            )
            for split, x in self.x.items()
        }
        return {known.layouts[0].folder: files}

    def _svhn(self, known):
        savemat, files = pytest.importorskip("scipy.io").savemat, {}
        for split, x in self.x.items():
            file, y = io.BytesIO(), self.y[split]
            savemat(file, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y, y, 10)[:, None]})
            files[f"{split}_32x32.mat"] = file.getvalue()
        return {known.layouts[0].folder: files}

    @property
    def folder(self):
        return self.known.layouts[0].folder

    def put(self, root, layout=0, skip=()):
        """Write the files of one layout under ``root`` and return their paths."""
        paths = []
        for file, content in self.content[self.known.layouts[layout].folder].items():
            path = Path(root) / self.known.layouts[layout].folder / file
            if file not in skip:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                paths.append(path)
        return paths

    def npm_package(self):
        """The archive, as npm's registry has it."""
        if self.name == "mnist":
            return tar_bytes({f"package/data/{f}": c for f, c in self.content[self.folder].items()})
        from PIL import Image

        members = {}
        for name, x, _ in self.batches():
            picture = io.BytesIO()
            Image.fromarray(x.reshape(10, 3, 1024).transpose(0, 2, 1)).save(picture, "png")
            members[f"package/{name}.png"] = picture.getvalue()
        for split in ("train", "test"):
            members[f"package/{split}_lables.json"] = json.dumps(self.y[split].tolist()).encode()
        return tar_bytes(members)


@pytest.fixture
def tiny(monkeypatch):
    """tiny("mnist") makes the small data set known under that name."""
    return lambda name: Tiny(name, monkeypatch)


class Clients:
    """Stands in for every package client. ``serve(package, file, content)`` makes one downloadable; ``calls`` tells."""

    def __init__(self, monkeypatch):
        self.calls, self.shelf, self.answers, self.monkeypatch = [], {}, {}, monkeypatch
        monkeypatch.setattr(subprocess, "run", self.run)

    def serve(self, package, file, content, sha256=None):
        self.shelf[package] = (file, content)
        digest = sha256 or hashlib.sha256(content).hexdigest()
        self.monkeypatch.setitem(files.OFFICIAL, package, (len(content), digest))

    def run(self, command, cwd, **_):
        self.calls.append(command)
        if command[0] in self.answers:
            return subprocess.CompletedProcess(command, 0, self.answers[command[0]], b"")
        if command[-1] not in self.shelf:
            return subprocess.CompletedProcess(command, 1, b"", b"WARNING: x\nERROR: no such package\nERROR: y")
        file, content = self.shelf[command[-1]]
        (cwd / file).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, b"", b"")


@pytest.fixture
def clients(monkeypatch):
    return Clients(monkeypatch)


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setattr("implicit_bench.data.sources.ensure_torchvision", lambda: False)


@pytest.fixture
def make_tar():
    return tar_bytes


class Server:
    """A real HTTP server of ``files`` (name -> content). ``cut``: bytes after which a connection breaks, one for each
    answer to come; ``ranges``: whether it honours Range; ``requests``: (path, Range) of each."""

    def __init__(self):
        self.files, self.cut, self.ranges, self.requests = {}, [], True, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers["Range"]
                outer.requests.append((self.path, wanted))
                content = outer.files.get(self.path[1:])
                if content is None:
                    self.send_error(404)
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and outer.ranges else 0
                if start and start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start : start + (outer.cut.pop(0) if outer.cut else len(content))])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, file):
        return f"http://127.0.0.1:{self.http.server_address[1]}/{file}"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
