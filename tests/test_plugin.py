"""examples/plugin: a user's own network, solver and data set, outside the package, from wherever Python finds them."""

import json
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import forked
import pytest

from implicit_bench.cli import main

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"
MINE = ["allow_targets=[my_parts]", "network=contractive", "solver=aitken"]
ALL = [*MINE, "dataset=gratings"]
QUICK = ["logger=none", "gpu.threads=1", "recipe.max_steps=3", "recipe.eval_images=50"]
# What the console script does: the working directory is not on Python's path.
SCRIPT = "import sys; sys.path.remove(''); from implicit_bench.cli import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path):
    """A copy, which may be edited, and which nothing is left behind in."""
    shutil.copytree(PLUGIN, tmp_path / "plugin", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    return tmp_path / "plugin"


def call(where, *words, code=0, configs="configs", **environment):
    argv = [sys.executable, "-c", SCRIPT, words[0], "--config-dir", str(configs), *words[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = forked.run(argv, cwd=where, env=env, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here(folder, monkeypatch, capsys):
    """The same commands in this process, where a subprocess would prove nothing more: all that one said."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def run(*words, code=0):
        assert main([words[0], "--config-dir", "configs", *words[1:]]) == code
        said = capsys.readouterr()
        return said.out + said.err

    yield run
    sys.modules.pop("my_parts", None)


def finished(runs):
    """Seed -> the record of each finished run."""
    found = [json.loads(path.read_text()) for path in runs.glob("*/record.json")]
    assert all(rec["status"] == "done" for rec in found)
    return {rec["config"]["seed"]: rec for rec in found}


def test_check_passes(folder):
    out = call(folder, "check", *MINE)
    assert re.findall(r"^(\S+): (\d+) of (\d+) checks passed$", out, re.M) == [
        ("solver=aitken", "8", "8"),
        ("network=contractive", "7", "7"),
    ]


def test_training_from_its_own_directory(folder):
    call(folder, "train", *ALL, *QUICK)
    (rec,) = finished(folder / "runs").values()
    assert rec["config"]["solver"]["_target_"] == "my_parts.Aitken"
    assert rec["config"]["network"]["_target_"] == "my_parts.Contractive"
    assert rec["data"]["name"] == "Gratings"
    assert rec["steps"] == 3
    assert rec["solve"]["converged_fraction"] == 1.0
    assert list(rec["config"]["sources"]) == ["my_parts"]


@pytest.mark.parametrize("adjoint", ["unroll", "jfb"])
def test_it_goes_with_other_adjoints(folder, here, adjoint):
    here("train", *MINE, *QUICK, f"adjoint={adjoint}", "stop.tol=1e-6", "gpu.dtype=float64")
    (rec,) = finished(folder / "runs").values()
    assert rec["nonfinite_steps"] == 0
    assert rec["solve"]["converged_fraction"] == 1.0


def test_training_from_another_directory_by_pythonpath(folder, tmp_path):
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    call(tmp_path, "train", *MINE, *QUICK, configs=folder / "configs", PYTHONPATH=paths)
    assert list(finished(tmp_path / "runs")) == [0]
    refused = call(tmp_path, "train", *MINE, *QUICK, configs=folder / "configs", code=2)
    assert refused.endswith("_target_='my_parts.Contractive' cannot be imported: No module named 'my_parts'\n")


def test_a_multirun_and_an_edit(folder):
    words = ["train", "-m", *ALL, *QUICK, "seed=0,1"]
    call(folder, *words)
    before = finished(folder / "runs")
    assert sorted(before) == [0, 1]
    assert len(re.findall("is done", call(folder, *words))) == 2
    module = folder / "my_parts.py"
    module.write_text(module.read_text().replace("torch.tanh(nnf", "torch.relu(nnf"))
    call(folder, "train", *ALL, *QUICK, f"paths.runs={folder / 'edited'}")
    after = finished(folder / "edited")
    assert after[0]["run_id"] != before[0]["run_id"]
    assert after[0]["metrics"]["test_loss"] != before[0]["metrics"]["test_loss"]


@pytest.mark.skipif(
    not list(metadata.distributions(name="hydra-joblib-launcher")),
    reason="hydra-joblib-launcher is not installed: pip install 'implicit-bench[joblib]'",
)
def test_a_multirun_in_the_processes_of_a_launcher(folder):
    out = call(folder, "train", "-m", *ALL, *QUICK, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert sorted(finished(folder / "runs")) == [0, 1], out
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "README.md", "configs", "my_parts.py", "runs"]  # fmt: skip


def test_its_data_set_can_be_learned_looked_at_and_timed(folder, here, brisk):
    """Four orientations in noise: far from chance after 5 epochs, in train, eval, bench and data alike."""
    words = ["logger=none", "gpu.threads=1", "recipe.epochs=5"]
    here("train", *ALL, *words)
    (rec,) = finished(folder / "runs").values()
    assert rec["metrics"]["test_acc"] > 0.6
    assert (rec["data"]["n_train"], rec["data"]["n_val"], rec["data"]["n_test"]) == (900, 100, 400)
    refused = here("eval", "run=last", code=2)
    assert "to use your own package add 'allow_targets=[my_parts]'" in refused
    assert "accuracy" in here("eval", "run=last", MINE[0])
    here("bench", MINE[0], "dataset=gratings", "model=deq,explicit", "rounds=2", "memory=false", "logger=none")
    said = here("data", MINE[0], "dataset=gratings")
    assert said == "data    Gratings: 1,000 + 400 images of 1 x 12 x 12, 4 classes\n"
    assert "contrast=2" in here("train", *ALL, *words, "dataset.contrast=2", code=2)


def test_the_commands_of_its_readme_compose(monkeypatch):
    import shlex

    from implicit_bench import config

    monkeypatch.chdir(PLUGIN)
    monkeypatch.syspath_prepend(str(PLUGIN))
    commands = re.findall(r"^implicit-bench (check|train|bench) (.*)$", (PLUGIN / "README.md").read_text(), re.M)
    assert len(commands) == 3
    for command, words in commands:
        flag, search, *overrides = shlex.split(words)
        assert flag == "--config-dir"
        jobs = config.expand(overrides, [search])
        assert len(jobs) == (3 if command == "bench" else 1)
        for job in config.compose_all(command, jobs, [search]):
            config.build(job.config)
    monkeypatch.delitem(sys.modules, "my_parts")
