"""The wheel, installed elsewhere: it brings its configs and its data, and needs nothing of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from implicit_bench.record import read_record

ROOT = Path(__file__).parent.parent


def python(*words, cwd, **environment):
    done = subprocess.run([sys.executable, *words], cwd=cwd, env={**os.environ, **environment}, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (path,) = out.iterdir()
    return path


def test_it_holds_the_package_its_configs_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for top, kinds, under in (
        ("implicit_bench", ("*.py", "*.npz", "official.txt"), ""),
        ("configs", ("*.yaml",), "implicit_bench/"),
    ):
        files = [path for kind in kinds for path in (ROOT / top).rglob(kind)]
        assert files
        assert {under + path.relative_to(ROOT).as_posix() for path in files} <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/")) or "__pycache__" in name]
    (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
    assert b"implicit-bench = implicit_bench.cli:main" in zipfile.ZipFile(wheel).read(scripts)
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_installed_elsewhere_it_trains(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "work"
    cwd.mkdir()
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python(*pip, "--target", str(site), str(wheel), cwd=cwd)
    where = "import implicit_bench, implicit_bench.config as c; print(implicit_bench.__file__); print(c.config_dir())"
    package, configs = python("-c", where, cwd=cwd, PYTHONPATH=str(site)).split()
    assert Path(package) == site / "implicit_bench" / "__init__.py"
    assert Path(configs) == site / "implicit_bench" / "configs"
    words = ["train", "model=skip_deq", "length=smoke", "logger=none", "gpu.threads=1"]
    out = python("-W", "error", "-m", "implicit_bench", *words, cwd=cwd, PYTHONPATH=str(site))
    assert "\ntest    accuracy " in out
    (folder,) = (cwd / "runs").iterdir()
    rec = read_record(folder)
    assert (rec["status"], rec["steps"], rec["length"]) == ("done", 39, "smoke")
    assert [path.name for path in cwd.iterdir()] == ["runs"]
