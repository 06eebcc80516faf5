"""A user's mistakes: exit code 2, one sentence with the offending value and a remedy, no traceback, nothing begun.

The grammar of `train`'s overrides is in test_config.py (WRONG); here is everything else that can be got wrong.
"""

import json
import os
import re
import subprocess
import sys

import jobs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from implicit_bench import config
from implicit_bench.cli import COMMANDS, main
from implicit_bench.schema import GROUPS, PLAIN

FILES = {  # what a user may have in the working directory
    "afile": "",
    "mine/solver/broken.yaml": "a: [1\n b: }",
    "mine/solver/bare.yaml": "a: 1\n",
    "mine/table/listed.yaml": "rows: [deq, cdeq]\n",
    "mine/table/mapped.yaml": "rows: {deq: {words: [{model: deq}]}}\n",
    "mine/table/bare.yaml": "rows: {deq: {words: [model=deq], published: 5}}\n",
    "mine/table/odd.yaml": "rows: {'a, b': {words: [model=deq]}}\n",
    "mine/solver/other.yaml": "_target_: nomodule.X\n",
    "mine/solver/raises.yaml": "_target_: raises.Solver\n",
    "mine/model/wrong.yaml": "# @package _global_\ndefaults:\n  - override /solvr: picard\n",
    "raises.py": "1 / 0\n",
    "mine/solver/sparse.yaml": "_target_: sparse.Solver\ndamping: 0.5\n",
    "sparse.py": "class Solver:\n    def __init__(self, damping=0.5, momentum=0.1): ...\n",
    "broken_syntax.py": "def f(:\n",
}
MISTAKES = {
    # typos, wherever a word may stand
    "trian": "no command 'trian'; nearest: train",
    "list modls": "nothing called 'modls' to list; nearest: models",
    "list models --cfg": "no --cfg ''; there are: job, hydra, all",
    "list format=jsn": "no format 'jsn'; nearest: json",
    "train -multirun": "no flag '-multirun'; nearest: --multirun",
    "train experiment=cdeq_minst": "no experiment 'cdeq_minst'; nearest: cdeq_mnist",
    "train length=smok": "no length 'smok'; nearest: smoke",
    "train gpu=cuda:1": "no gpu 'cuda:1'; nearest: cuda",
    "train solver.rtol=1e-3": "no key 'solver.rtol'; solver has window, variant",
    "train network=dense network.channels=[1]": "no key 'network.channels'; network has hidden, untied",
    "train model=neural_ode stop.tol=1e-3":
        "no key 'stop.tol' of an ODE that ends at stop.t1; its tolerance is solver.rtol",
    "train table=cdeq_mnist":
        "table=cdeq_mnist is a training of each of the table's rows: write train -m table=cdeq_mnist",
    "train -m hydra/launcher=joblb": "no hydra/launcher 'joblb'; ",
    "train -m hydra/launcher=ray hydra.launcher.ray.init.adress=x":
        "no key 'hydra.launcher.ray.init.adress'; nearest: hydra.launcher.ray.init.address",
    "train plan=maybe": "plan='maybe' is not possible; there are: true, false",
    "bench model=deq,cdqe": "no model 'cdqe'; nearest: cdeq",
    "data dataset=cifar": "no dataset 'cifar'; nearest: cifar10",
    "check solver=andersen": "no solver 'andersen'; nearest: anderson",
    "eval eval.step=3": "no key 'eval.step'; nearest: eval.steps",
    "eval eval.split=tets": "eval.split='tets' is not possible; nearest: test",
    "runs status=don": "no status 'don'; there are: running, done, failed, interrupted, stopped, unreadable",
    "runs -f": "runs has no flag '-f'; nearest: -y",
    "completion tcsh": "no completion for 'tcsh'; there are: bash, zsh, fish",
    # pairs that cannot be
    "train model=neural_ode stop=residual": "stop=residual looks for f(z) = z, but field=ode has no equilibrium",
    "train solver=broyden stop=end_time": "solver=broyden finds roots and has no time; use stop=residual or",
    "train solver=torchdiffeq/rk4": "solver=torchdiffeq/rk4 integrates to an end time and cannot stop at a residual",
    "train adjoint=unroll solver=homotopy": "solver=homotopy differentiates the cell to make its steps",
    "train model=explicit solver=tsit5": "stop=fixed_steps counts applications of the cell, and solver=tsit5",
    "train network=mdeq_small stop.per_sample=true": "per-sample stopping needs independent samples",
    "train penalty=[jacobian] gpu.compile=true": "penalty=[jacobian] differentiates the cell twice, which",
    "train penalty=[local_error]": "penalty=[local_error] needs a solver that estimates its error, and solver=broyden",
    "train model=neural_ode penalty=[correction]": "penalty=[correction] is for iterates of a fixed point, which",
    "train model=cdeq stop=end_time solver=torchdiffeq/dopri5 penalty=[correction]":
        "penalty=[correction] needs the iterates of the solve, which solver=torchdiffeq/dopri5 keeps to itself; use",
    "train model=resnet penalty=[jacobian]": "penalty=[jacobian] evaluates the cell again, but",
    "bench model=deq": "bench compares two rows or more; list values, such as model=neural_ode,cdeq",
    "bench model=deq,cdeq seed=0,1": "rows of one bench must share seed, not 0 and 1; bench them apart",
    "bench model=deq,cdeq time=20s rounds=40": "time=20s and rounds=40 both say when to end; give one of them",
    "check dataset=mnist solver=anderson": "'dataset=mnist' sizes a network, and none is named",
    "check stop=residual": "check tries a solver, an adjoint and a network by themselves",
    "train format=csv": "train prints no table to format",
    "list models -m": "list takes no flag but --config-dir",
    "list models --config-dir nowhere": "no folder nowhere for --config-dir",
    "table --config-dir nowhere": "no folder nowhere for --config-dir",
    "train --resolve model=deq": "--resolve says how to show a configuration; add --cfg job",
    "train --package model model=deq": "--package says how to show a configuration; add --cfg job",
    "train hydra/launcher=slurm model=deq": "hydra/launcher=slurm is about a sweep; add -m, or leave it out",
    "table --config-dir mine table=listed": "rows: ['deq', 'cdeq'] has no labels; write rows: {deq: {words: [model=",
    "table --config-dir mine table=mapped": "row deq, words: {'model': 'deq'} is no word; write key=value",
    "table --config-dir mine table=bare": "row deq, published: 5 names no column; write {test_acc: 5}",
    "table --config-dir mine table=odd": "row a, b: a label with , in it cannot be asked for; leave it out",
    # several values where one belongs
    "train seed=0,1,2": "'seed=0,1,2' names several values: add -m for one run each, or quote a comma",
    "train penalty=skip,none": "'penalty=skip,none' names several values: penalty=[skip,none] is all of them together",
    "train seed=range(3)": "'seed=range(3)' names several values: add -m",
    "train -m seed=range(0,1,0)": "'seed=range(0,1,0)' cannot be read as values",
    "train -m model=glob(zz*)": "'model=glob(zz*)' names no value",
    "train recipe.milestones=5,10": "recipe.milestones is a list; write recipe.milestones=[5,10]",
    "train allow_targets=mine": "allow_targets='mine' is not possible; write allow_targets=[mine]",
    "train dataset=digits dataset.name=mnist": "would be another data set under this one's name; write dataset=mnist",
    "eval -m run=a,b": "eval takes no -m; it does one thing at a time",
    "eval nope": "no run 'nope' in runs; ",
    "train --config-dir seed=1": "--config-dir wants one folder, such as --config-dir my-configs",
    "train --config-dir mine solver=sparse solver.momentum=1 allow_targets=[sparse]": "write +solver.momentum=1",
    # types and ranges
    "train recipe.lr=inf": "recipe.lr=inf must be positive",
    "train recipe.lr=-1": "recipe.lr=-1 must be positive",
    "train recipe.batch=5000": "recipe.batch=5000 is more than the 1257 training images",
    "bench model=deq,cdeq recipe.batch=5000": "recipe.batch=5000 is more than the 1257 training images",
    "train recipe.epochs=99999999999999999999": "recipe.epochs=99999999999999999999 is too large",
    "train gpu.threads=1000000": "gpu.threads=1000000 is too many; null is one for each",
    "train dataset.val_size=100000": "dataset.val_size=100000, but digits has 1,437 training images",
    "train dataset.std=[0]": "dataset.std must be positive, not [0.0]",
    "train dataset.flip=2": "dataset.flip must be a probability, not 2",
    "train model=cdeq solver.rtol=-1": "solver.rtol=-1",
    "train model=neural_ode stop.t1=0": "stop.t1=0 must be positive and finite",
    "train adjoint.rtol=-1": "adjoint.rtol=-1",
    "train penalty=[jacobian] penalty.jacobian.weight=-1": "penalty.jacobian.weight=-1 must not be negative",
    "train penalty=[jacobian] penalty.jacobian.probability=0": "penalty.jacobian.probability=0 must lie in (0, 1]",
    "train penalty=[correction] penalty.correction.n=0": "penalty.correction.n=0 must be at least 1",
    "train penalty=[init_fit] penalty.init_fit.weight=-1": "penalty.init_fit.weight=-1 must not be negative",
    "train network.hidden=0": "network.hidden=0 must be at least 1",
    "train -m stop.tol=1e-2,-1e-2": "stop.tol=-0.01 must be positive",
    "train -m recipe.lr=1e-3,-1": "recipe.lr=-1 must be positive",
    "bench model=deq,cdeq rounds=0": "rounds=0 is not possible; write a whole number, 40 or more",
    "bench model=deq,cdeq time=10": "time=10 is not a time; write 20s, 5m or 1h",
    "eval eval.steps=x": "eval.steps=[\"x\"] is not possible; it wants a list in brackets, each a whole number",
    "eval eval.noise=-0.1": "eval.noise=-0.1 must not be negative",
    # files that are not there, or not what they should be
    "train paths.runs=afile/runs": "paths.runs=afile/runs cannot be used (Not a directory)",
    "train paths.runs=/proc/nope": "paths.runs=/proc/nope cannot be used",
    "bench model=deq,cdeq paths.runs=afile": "paths.runs=afile cannot be used (File exists)",
    "train dataset=mnist paths.data=afile": "afile",
    "eval run=nope": "no run 'nope' in runs; ",
    "eval": "no run 'last' in runs; there are none yet",
    "runs records=nowhere": "no folder nowhere to read records from",
    "runs diff a": "runs diff wants two runs, such as",
    "runs diff a b": "no run 'a' in runs; there are none yet",
    "runs rm": "runs rm wants the runs to remove",
    "train --config-dir nowhere": "no folder ",
    "train --config-dir mine solver=broken": "a file of --config-dir is no YAML: while parsing",
    "train --config-dir mine solver=bare": "solver has no _target_, the class to make it from",
    "train --config-dir mine solver=other": "to use your own package add 'allow_targets=[nomodule]'",
    "train --config-dir mine solver=other allow_targets=[nomodule]": "cannot be imported: No module named 'nomodule'",
    "train --config-dir mine solver=raises allow_targets=[raises]": "cannot be imported: division by zero",
    "train --config-dir mine model=wrong": "In 'model/wrong': Could not override 'solvr'",
    "train solver._target_=broken_syntax.X allow_targets=[broken_syntax]": "cannot be imported: ",
    "train solver._target_=implicit_bench.solvers.Andersen": "is not there; nearest: Anderson",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    yield tmp_path
    for module in ("raises", "broken_syntax", "sparse"):
        sys.modules.pop(module, None)


def refused(capsys, *argv):
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("implicit-bench: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.removeprefix("implicit-bench: ").rstrip("\n")


def test_the_catalogue_is_as_long_as_it_should_be():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(line, here, capsys):
    command, *words = line.split()
    quiet = ["logger=none", "recipe.max_steps=1"] if command in ("train", "bench") and "-" not in words[:1] else []
    if "recipe.max_steps=1" in quiet and command == "bench":
        quiet = ["logger=none"]
    sentence = refused(capsys, command, *words, *(quiet if command in COMMANDS else []))
    assert MISTAKES[line] in sentence
    assert not (here / "runs").exists() or not any((here / "runs").iterdir())  # nothing was begun


def test_in_a_process_of_its_own(here):
    """As the shell sees it: for a few of them, exit code, streams, no traceback, no warning."""
    for line in ("train model=skip_dq", "train -m stop.tol=1e-2,-1 gpu.threads=1", "eval run=nope"):
        words = [sys.executable, "-m", "implicit_bench", *line.split()]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"})
        assert (done.returncode, done.stdout) == (2, ""), line
        assert re.fullmatch(r"implicit-bench: [^\n]+\n", done.stderr), line


def test_a_checkpoint_of_another_network_when_a_run_goes_on(here, capsys):
    """The record stays as it was: what to do about it is for the user to say."""
    one = jobs.run(here, "network.hidden=32", "recipe.max_steps=2").folder
    other = jobs.run(here, "network.hidden=64", "recipe.max_steps=2").folder
    rec = json.loads((one / "record.json").read_text())
    (one / "record.json").write_text(json.dumps({**rec, "status": "interrupted", "steps": 1}))
    for name in ("last.pt", "previous.pt"):
        if (other / name).exists():
            (one / name).write_bytes((other / name).read_bytes())
    before = (one / "record.json").read_bytes()
    capsys.readouterr()
    assert main(["train", *jobs.words(here, "network.hidden=32", "recipe.max_steps=2")]) == 2
    err = capsys.readouterr().err
    assert f"the checkpoint in {one} is another network's (" in err
    assert "delete" in err
    assert (one / "record.json").read_bytes() == before


def test_a_truncated_checkpoint_and_a_broken_record(here, capsys):
    folder = jobs.run(here, "recipe.max_steps=2").folder
    capsys.readouterr()
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            (folder / name).write_bytes(b"PK not a checkpoint")
    assert "is damaged or truncated" in refused(capsys, "eval", f"run={folder.name}", f"paths.runs={here / 'runs'}")
    (folder / "record.json").write_text("{")
    sentence = refused(capsys, "eval", f"run={folder.name}", f"paths.runs={here / 'runs'}")
    assert "cannot be read (no valid JSON" in sentence


KEYS = st.sampled_from([*GROUPS, *PLAIN, "solver.window", "stop.tol", "stop.max_steps", "recipe.lr", "recipe.batch",
                        "network.hidden", "adjoint.rtol", "gpu.dtype", "dataset.mean", "hydra.run.dir",
                        "hydra/launcher", "penalty.skip.weight", "a.b.c", "_target_", "solver._target_", "", "..",
                        "format"])  # fmt: skip
ATOMS = st.one_of(
    st.sampled_from(["deq", "cdeq", "skip", "null", "true", "1", "-1", "1e-3", "nan", "inf", "", "''", "[]", "{}",
                     "[1,", "{a:1}", "${seed}", "${a.b}", "${", "range(3)", "glob(*)", "choice(1,2)", "1,2",
                     "interval(0,1)", "sort(1,2)", "tag(a,1)", "os.system", "implicit_bench.core.solve", "???", "a: b",
                     "'", '"', "\\", "0x10", "1_000", "😀", "@", "!!python/object:os.system"]),
    st.text(max_size=12), st.integers().map(str), st.floats().map(str),
)  # fmt: skip
LINES = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), st.one_of(KEYS, st.text(max_size=8)), ATOMS).map(
    lambda t: f"{t[0]}{t[1]}={t[2]}"
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(words=st.lists(st.one_of(LINES, LINES, st.text(max_size=10)), min_size=1, max_size=3))
def test_no_line_of_overrides_ever_shows_a_traceback(words):
    """Composed, checked, and every component made; only the training itself is left out."""
    import contextlib
    import io
    from unittest import mock

    from implicit_bench.train import command

    def build(job, words):
        config.make(job.config["gpu"], "gpu")
        config.build(job.config)
        return command.Outcome(0, None, {})

    out, err = io.StringIO(), io.StringIO()
    fine = [word for word in words if "\0" not in word and "help" not in word and not word.startswith("-")]
    with mock.patch.object(command, "train", build), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "logger=none", *fine])
    assert code in (0, 2), (fine, err.getvalue())
    said = err.getvalue()
    assert "Traceback" not in said
    assert said.count("\n") == (code == 2), (fine, said)
