"""Completion: what each position may hold, in the shells' own words, without torch or Hydra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from implicit_bench.cli import COMMANDS, main
from implicit_bench.complete import SCRIPTS, complete

CONFIGS = Path(__file__).parent.parent / "configs"


def candidates(line):
    return complete(f"implicit-bench {line}", COMMANDS)


def names(group):
    top = CONFIGS / group
    return sorted(path.relative_to(top).with_suffix("").as_posix() for path in top.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("deq-digits-s0-3fa9c1d20b", "cdeq-digits-s1-77c0e25f1a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    return tmp_path


def test_commands():
    assert set(candidates("")) == set(COMMANDS)
    assert candidates("tr") == ["train"]
    assert candidates("xyz") == []


def test_groups_keys_and_values():
    assert candidates("train mo") == ["model="]
    assert candidates("train model=") == [f"model={name}" for name in names("model")]
    assert candidates("train solver=torchdiffeq/d") == ["solver=torchdiffeq/dopri5", "solver=torchdiffeq/dopri8"]
    assert candidates("train -m model=deq,skip_d") == ["model=deq,skip_deq"]
    assert "solver=vcab3" not in candidates("train -m solver=vcab3,")
    assert candidates("train recipe.epo") == ["recipe.epochs=", "recipe.epoch_images="]
    assert candidates("train gpu.compile=") == ["gpu.compile=true", "gpu.compile=false"]
    assert candidates("bench rou") == ["rounds="]
    assert "rounds=" not in candidates("train r")
    assert candidates("train solver=anderson solver.w") == ["solver.window="]
    assert candidates("train solver=vcab3 solver.w") == []
    assert candidates("train -m tab") == ["table="]
    assert "format=tex" in candidates("table format=")
    assert candidates("table --con") == ["--config-dir"]
    assert candidates("train plan=") == ["plan=true", "plan=false"]
    assert "--config-dir" in candidates("train --")


def test_every_key_that_is_offered_composes():
    from implicit_bench import config

    for key in (k for k in candidates("train stop=residual stop.") if k != "stop."):
        assert key.removeprefix("stop.")[:-1] in config.compose("train", []).config["stop"], key


def test_ones_own_files_are_offered(here):
    (here / "mine" / "solver").mkdir(parents=True)
    (here / "mine" / "solver" / "chebyshev.yaml").write_text("_target_: a.B\ndegree: 3\n")
    assert candidates("train --config-dir mine solver=ch") == ["solver=chebyshev"]
    assert candidates("train --config-dir=mine solver=chebyshev solver.") == ["solver.degree="]
    (here / "mine" / "table").mkdir()
    (here / "mine" / "table" / "own.yaml").write_text("inherits: cdeq_mnist\n")
    assert candidates("table --config-dir=mine table=ow") == ["table=own"]


def test_runs_by_name_and_by_id():
    assert candidates("eval run=cd") == ["run=cdeq-digits-s1-77c0e25f1a"]
    assert candidates("eval run=77") == ["run=77c0e25f1a"]
    assert candidates("runs diff d") == ["deq-digits-s0-3fa9c1d20b"]
    assert candidates("runs rm 3f") == ["3fa9c1d20b"]
    assert candidates("runs status=st") == ["status=stopped"]
    assert candidates("list mod") == ["models"]
    assert candidates("completion f") == ["fish"]


def test_what_compare_takes():
    assert candidates("compare b") == ["base="]
    assert candidates("compare base=neural") == ["base=neural_ode"]
    assert candidates("compare base=deq against=cdeq,skip_reg_c") == ["against=cdeq,skip_reg_cdeq"]
    assert candidates("compare base=deq plan=t") == ["plan=true"]


def test_a_tab_imports_nothing_heavy():
    code = """import sys; from implicit_bench.cli import main
for words in (["train model="], ["train stop."], ["eval run="], [""]): main(["complete", "implicit-bench " + words[0]])
print([m for m in ("torch", "hydra", "omegaconf", "numpy", "rich", "wandb") if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "model=deq" in done.stdout


def test_bash_completes_a_value_after_its_equals_sign(here):
    """As bash does it: the words are cut at =, and only what follows is replaced."""
    script = SCRIPTS["bash"] + """
compopt() { :; }
for line in "implicit-bench tra" "implicit-bench train model=skip_d" "implicit-bench train mod"; do
    COMP_LINE=$line; COMP_POINT=${#line}; COMPREPLY=(); _implicit_bench; echo "${COMPREPLY[*]}"
done"""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, cwd=here)
    assert done.stdout.splitlines() == ["train", "skip_deq", "model="]
    assert done.stderr == ""


def test_the_script_of_each_shell(capsys):
    for shell in SCRIPTS:
        assert main(["completion", shell]) == 0
        assert "implicit-bench complete" in capsys.readouterr().out
    assert main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("implicit-bench: no completion for 'tcsh'; ")
    assert main(["completion"]) == 2
