"""`implicit-bench check`: a user's own components from the working directory, the card, the exit code."""

import json
import os
import re
import shutil
import sys

import broken
import forked
import pytest
import yaml
from test_cli import Terminal

from implicit_bench.cli import main
from implicit_bench.terminal import card

MINE = {"solver": ["WrongOrder", "Uncounted", "TwoCalls", "Lying", "Leaking"], "adjoint": ["Detached"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's working directory: a module, and a folder of YAML files for it."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(broken.__file__, folder / "my_parts.py")
    for group, names in MINE.items():
        (folder / "conf" / group).mkdir(parents=True)
        for name in names:
            (folder / "conf" / group / f"{name}.yaml").write_text(f"# mine\n_target_: my_parts.{name}\n")
    (folder / "conf" / "solver" / "half.yaml").write_text("_target_: my_parts.Picard\ndamping: 0.5\n")
    return folder


def check(folder, *words):
    argv = [sys.executable, "-m", "implicit_bench", "check", "--config-dir", "conf", "allow_targets=[my_parts]", *words]
    env = {**os.environ, "PYTHONWARNINGS": "error,ignore::ResourceWarning", "OMP_NUM_THREADS": "1"}
    done = forked.run(argv, cwd=folder, env=env, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout


def cards(out):
    """name=choice -> the lines of its card, and its last line."""
    return {head: (body.splitlines(), last) for head, body, last in
            re.findall(r"^check   (\w+=\S+) .*\n((?:  .*\n)+)(\w+=\S+: .*)\n", out, re.M)}  # fmt: skip


FAULTS = {
    "WrongOrder": r"  ✗ order +\d\.\d on the whirl, 5 promised: error \de-\d+ in \d+ steps, \de-\d+ in \d+",
    "Uncounted": r"  ✗ nfe +stats.calls is (\d+), but the map was called (\d+) times",
    "TwoCalls": r"  ✗ nfe +one_call promises \d+ calls in \d+ steps, but there were \d+",
    "Lying": r"  ✗ status +.*: CONVERGED at a residual of \S+, tolerance \S+",
    "Leaking": r"  ✗ nan row +NaN leaks: .*",
    "Detached": r"  ✗ gradient +fixed point: the gradient of the parameters is zero: the output is detached",
}


def test_broken_components_are_told_what_is_wrong_with_them(folder):
    code, out = check(folder, f"solver={','.join(MINE['solver'])}")
    assert code == 1
    found = cards(out)
    assert [*found] == [f"solver={name}" for name in MINE["solver"]]
    for name in MINE["solver"]:
        lines, last = found[f"solver={name}"]
        assert any(re.fullmatch(FAULTS[name], line) for line in lines), (name, lines)
        wrong = sum(line.startswith("  ✗ ") for line in lines)
        assert last == f"solver={name}: {len(lines) - wrong} of {len(lines)} checks passed"
        assert 0 < wrong <= (3 if name == "Lying" else 1)


def test_one_sound_component_beside_a_broken_one(folder):
    code, out = check(folder, "solver=half", "adjoint=Detached", "solver.damping=0.25")
    assert code == 1
    assert out.startswith("check   solver=half · my_parts.Picard · damping=0.25\n  ✓ fixed point  ")
    found = cards(out)
    assert found["solver=half"][1] == "solver=half: 8 of 8 checks passed"
    lines, last = found["adjoint=Detached"]
    assert last == "adjoint=Detached: 4 of 5 checks passed"
    assert [line for line in lines if re.fullmatch(FAULTS["Detached"], line)] == [li for li in lines if "✗" in li]
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["conf", "my_parts.py"]


# ------------------------------------------------------------------------------------------------------ in this process


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        ([], ["solver=anderson", "adjoint=ift", "network=dense"]),
        (["solver=picard"], ["solver=picard"]),
        (["adjoint.rtol=1e-3", "network.hidden=8", "dataset=mnist"], ["adjoint=ift", "network=dense"]),
        (["model=explicit", "solver=picard,anderson"], ["solver=picard", "solver=anderson"]),
        (["solver=torchdiffeq/dopri5"], ["solver=torchdiffeq/dopri5"]),  # alone: no default stops it
    ],
)
def test_what_is_named_is_checked_or_all_three(words, heads, capsys):
    assert main(["check", *words]) == 0
    out = capsys.readouterr().out
    assert [*cards(out)] == heads or words == []
    assert [head.partition("=")[0] for head in cards(out)] == [head.partition("=")[0] for head in heads]
    assert "✗" not in out
    assert ("1 x 28 x 28 images, 8 numbers of state a sample" in out) == ("dataset=mnist" in words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["solver=picrd"], "no solver 'picrd'; nearest: picard (implicit-bench list solvers)"),
        (["solver.damping=2", "solver=picard"], "solver.damping=2 must lie in (0, 1]"),
        (["solver=picard", "stop.tol=3"],
         "check tries a solver, an adjoint and a network by themselves, so that 'stop.tol=3' would change nothing; "
         "leave it out"),
        (["rounds=3"], "no key 'rounds'; nearest: paths.runs"),
        (["solver=picard", "solver._target_=my_parts.Lying"],
         "solver._target_='my_parts.Lying' is not one of implicit-bench's; to use your own package add "
         "'allow_targets=[my_parts]'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert main(["check", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"implicit-bench: {sentence}\n")


def test_cfg_prints_what_train_would_compose(capsys):
    def shown(command):
        assert main([command, "--cfg", "job", "solver=tsit5", "seed=3"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    assert shown("check") == shown("train")


def test_a_card_is_wrapped_and_coloured_on_a_terminal_only(monkeypatch):
    rows = [(True, "nfe", "5 calls"), (False, "order", "[red] " + "word " * 30)]

    def told(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        card(rows)
        return stream.getvalue()

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")

    class Pipe(Terminal):
        def isatty(self):
            return False

    plain = told(Pipe())
    assert plain == "  ✓ nfe    5 calls\n  ✗ order  " + rows[1][2] + "\n"
    coloured = told(Terminal())
    assert "\033[32m" in coloured
    assert "\033[1;31m" in coloured
    lines = re.sub(r"\033\[[\d;]*m", "", coloured).splitlines()
    assert lines[0].rstrip() == "  ✓ nfe    5 calls"
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60
    assert lines[1].startswith("  ✗ order  [red] word")
    assert all(line.startswith(" " * 11 + "word") for line in lines[2:])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[32m" not in told(Terminal())


def test_one_table_of_all_components_for_a_program(capsys):
    main(["check", "solver=picard", "adjoint=jfb", "format=json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["component"] for row in rows} == {"solver=picard", "adjoint=jfb"}
