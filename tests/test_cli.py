"""The command line: help that is true, exit codes, sweeps, signals, what goes to stdout, what is left on disk."""

import csv
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import forked
import jobs
import pytest
import yaml
from test_log import inspect

from implicit_bench import __version__, cli, config, machine, schema
from implicit_bench.cli import COMMANDS, HELP, USAGE, main
from implicit_bench.log import slashed
from implicit_bench.record import METRICS, read_record
from implicit_bench.terminal import say

CONFIGS = Path(__file__).parent.parent / "configs"


def command(*words, cwd, **environment):
    """implicit-bench in a process of its own, warnings as errors."""
    env = {**os.environ, "PYTHONWARNINGS": "error,ignore::ResourceWarning", **environment}
    return forked.Popen([sys.executable, "-m", "implicit_bench", *words], cwd=cwd, env=env)


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own():
    """Hydra's --info leaves a handler on the root logger, which writes to this test's stdout."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def records(top):
    return {path.parent.name: read_record(path) for path in sorted(top.rglob("record.json"))}


def stamps(top):
    return {path: path.stat().st_mtime_ns for path in top.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- help


def test_help_and_list_load_neither_torch_nor_hydra(tmp_path):
    argvs = [[], ["--help"], ["--version"], ["trian"], ["list"], ["list", "models"], *([c, "--help"] for c in COMMANDS)]
    code = f"""import sys; from implicit_bench.cli import main; codes = [main(a) for a in {argvs}]
print(codes, [m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'wandb', 'rich') if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == f"{[0, 0, 0, 2] + [0] * (len(argvs) - 4)} []"


def test_the_module_and_the_console_script_are_the_same_command(tmp_path):
    script = Path(sys.executable).with_name("implicit-bench")
    assert subprocess.run([script], capture_output=True, text=True, cwd=tmp_path, check=True).stdout == USAGE
    out, err = command(cwd=tmp_path).communicate()
    assert (out, err) == (USAGE, "")
    wrong = command("trian", cwd=tmp_path)
    assert wrong.communicate() == ("", "implicit-bench: no command 'trian'; nearest: train\n")
    assert wrong.returncode == 2


def test_version(capsys):
    assert main(["--version"]) == main(["train", "--version"]) == 0
    assert capsys.readouterr().out == f"implicit-bench {__version__}\n" * 2


def test_help_of_every_command(capsys):
    assert set(HELP) == set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", USAGE, re.M), name
        for words in ([name, "--help"], [name, "model=deq", "-h"]):
            assert main(words) == 0
            assert capsys.readouterr().out == HELP[name]
        assert HELP[name].startswith(f"implicit-bench {name}: ")
    for word in ("--help", "-h", "help"):
        assert main([word]) == 0
        assert capsys.readouterr().out == USAGE


def examples(text):
    """The command lines of a help text, without what is said beside them."""
    return [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.startswith("  implicit-bench ")]


PLAIN_WORDS = ("list", "runs", "compare", "report", "sync", "doctor", "completion")  # compose nothing
SHOWING = (" run_missing=true", " time=30m", " format=tex > cifar10.tex", " format=md")
EXAMPLES = [line for text in (USAGE, *HELP.values()) for line in examples(text)]


def test_five_examples_and_at_least_two_for_a_command_that_composes():
    assert len(examples(USAGE)) == 5
    assert all(len(examples(HELP[name])) >= 2 for name in set(COMMANDS) - {"list"})


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_compose_and_build(line):
    prog, name, *args = shlex.split(line)
    assert prog == "implicit-bench"
    assert name in COMMANDS
    if name in PLAIN_WORDS:
        return
    if name == "table":  # shows what there are records of
        for word in SHOWING:
            line = line.replace(word, "")
        assert main(shlex.split(line)[1:]) == 0
        return
    words = cli.split([a for a in args if not a.startswith("format=")])
    rows = [*cli._rows(name, words)[1].values()]
    assert (len(rows) > 1) == (words.multirun or name == "bench")
    for job in config.compose_all(name, rows):
        if name not in ("data", "eval"):
            config.build(job.config)
    if beside := re.search(rf"{re.escape(line)}.*\b(\w+) runs;", USAGE):
        assert beside[1] == {9: "nine"}[len(rows)]


@pytest.mark.parametrize(("name", "text"), [("train", USAGE), ("train", HELP["train"]), ("bench", HELP["bench"])])
def test_keys_and_defaults_in_the_help_are_true(name, text):
    keys = text[text.rindex("keys (default)") + len("keys (default)") :].partition("\nleaves")[0]
    told = re.findall(r"(\w+(?:\.\w+)?)(?:=([\w|]+))? \(([^),]+)[^)]*\)", keys)
    assert len(told) == {USAGE: 14, HELP["train"]: 15, HELP["bench"]: 5}[text]
    job = config.compose(name, ["model=cdeq"])  # has every key that is named
    for key, values, default in told:
        if key in job.choices:
            assert config.compose(name, []).choices[key] == default, key
            assert values == "NAME" or set(values.split("|")) == {path.stem for path in (CONFIGS / key).iterdir()}
            continue
        value = job.config
        for part in key.split("."):
            value = value[part]
        assert value == yaml.safe_load(default), key
        for other in values.split("|") if "|" in values else ():
            config.compose(name, [f"{key}={other}"])


def test_list_names_ones_own_files_too(tmp_path, capsys):
    (tmp_path / "solver").mkdir()
    (tmp_path / "solver" / "mine.yaml").write_text("# my own\n_target_: mine.Solver\n")
    assert main(["list", "solvers", "--config-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["mine", "my", "own"] in [line.split() for line in lines]
    assert len({line.index(line.split()[1], len(line.split()[0]) + 2) for line in lines}) == 1  # in one column
    assert any(line.startswith("  broyden ") for line in lines)


def test_list_names_every_file_and_what_it_says_of_itself(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for group in schema.GROUPS:
        assert main(["list", group]) == 0
        one = capsys.readouterr().out
        assert main(["list", schema.plural(group)]) == 0
        assert capsys.readouterr().out == one
        one = one.partition("\n\n")[0].rstrip("\n") + "\n"  # networks are counted, too
        assert f"{group}=\n{one}" in out
        for path in (CONFIGS / group).rglob("*.yaml"):
            about = next(line[2:] for line in path.read_text().splitlines() if re.match("# [^@]", line))
            name = path.relative_to(CONFIGS / group).with_suffix("").as_posix()
            assert re.search(rf"^  {name} +{re.escape(about)}$", one, re.M), path
    assert main(["list", "models", "stops"]) == 0
    assert re.findall(r"^(\w+)=$", capsys.readouterr().out, re.M) == ["model", "stop"]


# ---------------------------------------------------------------------------------------------- exit codes, sentences


def refused(capsys, *argv, code=2):
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("implicit-bench: ")
    assert err.count("\n") == 1
    return err.removeprefix("implicit-bench: ").rstrip()


def test_unknown_words(capsys):
    assert refused(capsys, "trian") == "no command 'trian'; nearest: train"
    assert refused(capsys, "xyz") == f"no command 'xyz'; there are: {', '.join(COMMANDS)}"
    assert refused(capsys, "list", "modls") == "nothing called 'modls' to list; nearest: models"
    assert refused(capsys, "list", "models", "--foo").startswith("no flag '--foo'; ")
    assert refused(capsys, "list", "models", "-m") == "list takes no flag but --config-dir"
    assert refused(capsys, "train", "--multi") == "no flag '--multi'; nearest: --multirun"
    assert refused(capsys, "bench", "model=deq").startswith("bench compares two rows or more; list values")
    assert refused(capsys, "bench", "model=deq,cdeq", "time=1y") == "time='1y' is not a time; write 20s, 5m or 1h"
    assert refused(capsys, "data", "dataset=cifar").startswith("no dataset 'cifar'; nearest: cifar10 ")


def test_what_the_machine_refuses_is_a_sentence_too(tmp_path, capsys):
    (tmp_path / "file").touch()
    for words in (["train"], ["train", "-m"], ["bench", "model=deq,cdeq"]):
        sentence = refused(capsys, *words, f"paths.runs={tmp_path}/file/runs", "logger=none")
        assert re.search(rf"{tmp_path}/file/runs\S*.*Not a directory", sentence)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "list", lambda args: [][0])
    with pytest.raises(IndexError):
        main(["list"])
    monkeypatch.setitem(COMMANDS, "list", lambda args: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["list"])


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    with command("list", cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_cfg_prints_the_composed_configuration_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        assert main(["train", *words, "model=skip_deq", "stop.tol=0.125", "seed=3"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert (shown["model"]["name"], shown["stop"]["tol"], shown["seed"]) == ("skip_deq", 0.125, 3)
        assert "hydra" not in shown
    for argv in (["train", "-m"], ["bench"]):
        assert main([*argv, "--cfg", "job", "--resolve", "model=deq,cdeq"]) == 0
        shown = list(yaml.safe_load_all(capsys.readouterr().out))
        assert [job["model"]["name"] for job in shown] == ["deq", "cdeq"]
        assert shown[0]["stop"]["tol"] == 0.01
    assert main(["data", "--cfg", "job"]) == 0
    assert set(yaml.safe_load(capsys.readouterr().out)) == {"allow_targets", "dataset", "paths"}
    assert main(["train", "--info", "searchpath", "--config-dir", str(CONFIGS / "model")]) == 0
    assert f"file://{CONFIGS / 'model'}" in capsys.readouterr().out
    assert main(["train", "--info", "defaults", "model=cdeq"]) == 0
    assert "| solver/vcab3 " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_data_verifies_each_set_that_is_named(capsys, tmp_path):
    assert main(["data", "dataset=digits", f"paths.data={tmp_path}"]) == 0
    assert re.match(r"data    digits: 1 files? in .*, every hash as it should be\n$", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_name_is_a_table_of_every_data_set(capsys, tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(bytes(2_000_000))
    assert main(["data", f"paths.data={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert not err
    head, *lines = out.splitlines()
    assert head.split() == ["data", "set", "state", "MB", "to", "fetch,", "MB", "folder", "how"]
    names = sorted(path.stem for path in (config.config_dir() / "dataset").glob("*.yaml"))
    assert [line.split()[0] for line in lines] == names
    rows = {line.split()[0]: line.split()[1:4] for line in lines}
    assert rows["mnist"] == ["incomplete", "2", "12"]
    assert rows["cifar100"] == ["absent", "–", "169"]
    assert rows["digits"][0] == "present"
    assert rows["imagenet"] == ["absent", "–", "?"]
    (words,) = [line.split()[4:] for line in lines if line.startswith(" svhn ")]
    assert words == [f"{tmp_path}/SVHN", "implicit-bench", "data", "dataset=svhn", f"paths.data={tmp_path}"]


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_runs_each_job_here_and_skips_finished_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.Alone, "read", lambda self: False)
    words = ["train", "-m", "model=deq,skip_deq", *jobs.words(tmp_path, "recipe.max_steps=2")]
    argv = list(sys.argv)
    assert main(words) == 0
    assert sys.argv == argv
    capsys.readouterr()
    found = records(tmp_path)
    assert [rec["status"] for rec in found.values()] == ["done", "done"]
    for (name, rec), model in zip(found.items(), ("deq", "skip_deq")):
        assert name == f"{model}-digits-s0-{rec['run_id']}"
        single = config.compose("train", ["recipe.max_steps=2", f"model={model}"]).config  # not another run in a sweep
        assert {k: v for k, v in rec["config"].items() if k not in ("gpu", "logger", "paths")} == {
            k: v for k, v in single.items() if k not in ("gpu", "logger", "paths")}  # fmt: skip
    before = {path: stamp for path, stamp in stamps(tmp_path).items() if path.name != "multirun.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert main(words) == 0
    out, err = capsys.readouterr()
    begun = r"sweep   job 1 of 2\nsweep   job 2 of 2 · 1 skipped\n"
    note = r"note    no comparison: deq-\S+, skip_deq-\S+ were not alone on .* force=true\n"
    assert re.fullmatch(begun + note, err)
    done = {name: f"{rec['metrics']['test_acc']:.3f}; force=true trains it again" for name, rec in found.items()}
    lines = out.splitlines()
    assert lines[:2] == [f"train   {name} is done: test accuracy {text}" for name, text in done.items()]
    assert [line.split()[:3] for line in lines[3:5]] == [
        ["1", "model=deq", "skipped"], ["2", "model=skip_deq", "skipped"]]  # fmt: skip
    assert re.fullmatch(r"sweep   2 jobs: 2 skipped · \S+ s", lines[5])
    assert {path: stamp for path, stamp in stamps(tmp_path).items() if path.name != "multirun.yaml"} == before


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("recipe.lr=1e30,1e-3", r"failed  deq-digits-s0-\w+: the loss .* was not finite at step \d; lower recipe.lr"),
        ("solver=torchdiffeq/dopri5,anderson", "implicit-bench: solver=torchdiffeq/dopri5 integrates to an end time"),
    ],
)
def test_a_job_that_fails_stops_no_other_and_the_exit_code_is_3(axis, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", axis, "recipe.optimizer=sgd", *jobs.words(tmp_path, "recipe.max_steps=5")]) == 3
    err = capsys.readouterr().err
    assert re.search(f"^{said}", err, re.M)
    assert err.endswith("some runs of the sweep failed; the same command runs those again and no other\n")
    assert "Traceback" not in err
    statuses = [rec["status"] for rec in records(tmp_path).values()]
    assert statuses.count("done") == 1
    assert statuses.count("failed") == ("lr" in axis)


def test_an_interrupt_stops_the_whole_sweep(tmp_path, monkeypatch, capsys):
    from implicit_bench.train import command as train_command

    monkeypatch.chdir(tmp_path)
    seen = []

    def interrupted(job, words):
        seen.append(job.config["seed"])
        return train_command.Outcome(130, tmp_path, {"error": None, "metrics": {"test_acc": None}})

    monkeypatch.setattr(train_command, "train", interrupted)
    assert main(["train", "-m", "seed=0,1,2"]) == 130
    assert seen == [0]
    assert "sweep   3 jobs: 1 interrupted, 2 not begun" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- one run: signals, repeats


def once_it_has_written(process, top):
    deadline = time.monotonic() + 100
    while not any(rows.stat().st_size for rows in top.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_stopped_shows_the_rounds_it_has(sign, tmp_path):
    words = ["bench", "model=deq,explicit", "rounds=100000", "memory=false", *jobs.words(tmp_path)]
    process = command(*words, cwd=tmp_path)
    once_it_has_written(process, tmp_path)
    for _ in range(20 if sign == signal.SIGTERM else 1):  # `timeout` tells a process, and then its group
        process.send_signal(sign)
        time.sleep(0.005)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    ((_, rec),) = records(tmp_path).items()
    assert rec["status"] == "interrupted"
    assert rec["rounds"] >= 1
    assert [row["label"] for row in rec["rows"]] == ["deq", "explicit ×10"]
    assert re.search(r"^ deq .*\n explicit ×10 ", out, re.M)
    assert "Traceback" not in err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(sign, tmp_path, capsys):
    words = ["train", "model=deq", *jobs.words(tmp_path, "recipe.max_steps=150", "progress.log_steps=1")]
    process = command(*words, cwd=tmp_path)
    once_it_has_written(process, tmp_path)
    process.send_signal(sign)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    ((name, rec),) = records(tmp_path).items()
    assert (rec["status"], rec["error"]) == ("interrupted", None)
    assert 0 < rec["steps"] < 150
    assert f"train   interrupted at step {rec['steps']:,} and saved; the same command continues it\n" in err
    assert "Traceback" not in err
    assert "\033" not in out + err
    assert main(words) == 0
    ((again, done),) = records(tmp_path).items()
    assert (again, done["status"], done["steps"]) == (name, "done", 150)
    assert [r["step"] for r in done["resumed_from"]] == [rec["steps"]]
    assert f"note    continuing at step {rec['steps']:,} of 150\n" in capsys.readouterr().err


def test_a_finished_run_is_left_alone_and_a_forced_one_is_another_attempt(tmp_path, capsys):
    words = ["train", *jobs.words(tmp_path, "recipe.max_steps=2")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    ((name, first),) = records(tmp_path).items()
    assert re.search(rf"^train   model=deq .*\brun {name}$", out, re.M)
    assert re.search(r"^test    accuracy 0\.\d{3} on 360 unseen images", out, re.M)
    assert re.search(rf"^wrote   {tmp_path}/runs/{name}/ ", out, re.M)
    assert " epoch   loss" in err
    assert " epoch   loss" not in out
    before = stamps(tmp_path)
    assert main([*words, "length=full", "logger=wandb"]) == 0  # however it is called
    out, err = capsys.readouterr()
    accuracy = f"{first['metrics']['test_acc']:.3f}"
    assert out == f"train   {name} is done: test accuracy {accuracy}; force=true trains it again\n"
    assert err == ""
    assert stamps(tmp_path) == before
    assert main([*words, "force=true"]) == 0
    folder = tmp_path / "runs" / name
    assert read_record(folder)["attempt"] == 2
    assert read_record(folder)["resumed_from"] == []
    assert read_record(folder / "attempt-1.record.json") == first
    for kept in ("last.pt", "metrics.jsonl"):
        assert (folder / f"attempt-1.{kept}").stat().st_mtime_ns == before[folder / kept]


# ------------------------------------------------------------------------------------------------------------- output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bold_only_on_a_terminal_that_wants_it(monkeypatch):
    def told(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        say("train", "one\ntwo")
        return stream.getvalue()

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    plain = "train   one\n        two\n"
    assert told(Terminal()) == plain.replace("train", "\033[1mtrain\033[0m")
    assert told(io.StringIO()) == plain
    monkeypatch.setenv("TERM", "dumb")
    assert told(Terminal()) == plain
    monkeypatch.delenv("TERM")
    monkeypatch.setenv("NO_COLOR", "1")
    assert told(Terminal()) == plain


def test_a_default_run_leaves_all_it_promises_and_wandb_can_be_read(tmp_path):
    process = command("train", "model=skip_deq", "recipe.epochs=2", "progress.log_steps=20", "gpu.threads=1",
                      cwd=tmp_path)  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\033" not in out + err
    ((name, rec),) = records(tmp_path).items()
    folder = tmp_path / "runs" / name
    promised = re.search(r"^leaves +runs/MODEL-DATASET-sSEED-ID/ +(.*)$", HELP["train"], re.M)[1]
    for each in promised.split(", "):
        assert (folder / each).exists(), each
    assert name == f"skip_deq-digits-s0-{rec['run_id']}"
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == ["train", "test", "wrote"]
    assert f"\nW&B offline (no key found); upload later with: implicit-bench sync runs/{name}\n" in f"\n{err}"
    assert re.search(r"^ epoch .*\n +1 .*\n +2 ", err, re.M), "a table of its own, with nothing said within"
    offline = folder / "wandb" / "latest-run"

    found = json.loads(inspect(offline, "--summary"))
    assert (found["run_id"], found["state"], found["exit_code"]) == (rec["run_id"], "finished", 0)
    assert found["config"] == {key: value for key, value in rec["config"].items() if value != {}}
    assert found["summary"]["metrics/test_acc"] == rec["metrics"]["test_acc"]
    assert found["summary"]["timing/step_ms"] == rec["timing"]["step_ms"]["median"]
    history = [json.loads(line)["history"]["item"] for line in inspect(offline).splitlines() if '"history"' in line]
    history = [row for row in history if "metrics/train_loss" in row]
    assert [row["step"] for row in history] == [20, 39, 40, 60, 78]
    known = {slashed(metric.key) for metric in METRICS} | {"step", "epoch", "lr"}
    assert not {key for row in history for key in row if not key.startswith("_")} - known
    assert history[-1]["metrics/val_acc"] == rec["metrics"]["val_acc"]


def test_bench_leaves_all_it_promises_and_keeps_every_attempt(tmp_path, capsys, brisk):
    words = ["bench", "model=explicit,skip_deq", *jobs.words(tmp_path, "rounds=3")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    ((name, first),) = records(tmp_path).items()
    folder = tmp_path / "runs" / name
    assert re.fullmatch(r"bench-digits-[0-9a-f]{10}", name)
    assert (first["command"], first["status"], first["attempt"], first["rounds"]) == ("bench", "done", 1, 3)
    labels = [row["label"] for row in first["rows"]]
    assert [label.split()[0] for label in labels] == ["explicit", "skip_deq"]
    (ratio,) = first["ratios"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    table = (folder / "table.md").read_text()
    assert all(f"| {label} |" in table for label in labels)
    ElementTree.parse(folder / "speedup.svg")
    assert out.startswith("bench   ")
    assert "plan    2 rows × 3 rounds" in err
    assert "too few rounds" in out
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main([*words, "memory=false"]) == 0  # how it is measured makes it no other bench
    assert read_record(folder)["attempt"] == 2
    promised = re.search(r"^leaves +runs/bench-DATASET-ID/ +(.*), wandb/ ;", HELP["bench"], re.M)[1].split(", ")
    for file in (*promised, "metrics.jsonl"):
        assert (folder / f"attempt-1.{file}").read_bytes() == kept[file]
        assert (folder / file).exists()


def test_the_figures_of_a_bench_in_every_format_and_width(tmp_path, capsys, monkeypatch, brisk):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "model=neural_ode,cdeq", *jobs.words(Path(), "rounds=2", "memory=false")]
    assert main([*words, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["rows"]] == ["neural_ode", "cdeq"]
    assert found["rows"][0]["timing"]["train_ms"]["n"] == 2
    assert found["ratios"][0]["id"] == "R1"
    assert main([*words, "format=csv", "-q"]) == 0
    out, err = capsys.readouterr()
    told = {(line["row"], line["over"], line["measure"]): line for line in csv.DictReader(io.StringIO(out))}
    train = {label: told[label, "", "timing.train_ms"] for label in ("neural_ode", "cdeq")}
    for row in found["rows"]:
        line = train[row["label"]]
        assert float(told[row["label"], "", "params"]["value"]) == row["params"]
        assert float(line["low"]) <= float(line["value"]) <= float(line["high"])
        assert line["n"] == "2"
    ratio = told["neural_ode", "cdeq", "train"]
    assert [ratio[key] for key in ("n", "verdict", "paper")] == ["2", "too few rounds", "2.14–4.10×"]
    assert 0 < float(ratio["value"]) < 1000
    assert err == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(words) == 0
        out = capsys.readouterr().out
        assert max(len(line) for line in out.splitlines()) <= width, out
        assert re.search(r"R1 +neural_ode / cdeq +train .*too few rounds", out)
        assert "2.14–4.10×" in out


def test_a_card_of_checks_as_a_table(capsys):
    assert main(["check", "adjoint=jfb", "format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["component"] for row in rows} == {"adjoint=jfb"}
    assert all(row["passed"] is True for row in rows)


def test_networks_are_counted_to_the_parameter(capsys):
    """The papers' counts; a multiply-add is two operations: relu(W z) + U x has 2 * 128 * 128 of them in f."""
    assert main(["list", "networks", "format=json"]) == 0
    rows = {(row["network"], row["data set"]): row for row in json.loads(capsys.readouterr().out)}
    counts = {key: (row["parameters"], row["with skip net"]) for key, row in rows.items()}
    assert counts.pop(("mdeq_mnist", "mnist"))[0] > 10_000  # no paper prints it
    assert counts == {
        ("dense", "mnist"): (134_538, 151_050), ("mdeq_small", "cifar10"): (163_546, 200_122),
        ("mdeq_large", "cifar10"): (10_631_958, 11_186_774), ("mdeq_imagenet", "imagenet"): (17_912_456, 18_467_272),
        ("homo_conv", "cifar10"): (132_938, None), ("homo_conv", "svhn"): (132_938, None),
        ("homo_conv", "cifar100"): (565_988, None), ("homo_conv", "tiny_imagenet"): (617_288, None),
        ("homo_conv", "mnist"): (131_786, None), ("node_conv inject=start", "cifar10"): (173_611, None),
        ("node_conv inject=state", "cifar10"): (172_452, None), ("node_conv inject=start", "mnist"): (85_316, None),
        ("node_conv inject=state", "mnist"): (85_462, None)}  # fmt: skip
    assert rows["dense", "mnist"]["FLOP of one f"] == 2 * 128 * 128
    assert rows["homo_conv", "cifar10"]["FLOP of one f"] == 2 * 2 * 9 * 64 * 64 * 16 * 16  # two convolutions
    assert rows["mdeq_small", "cifar10"]["state"] == 30_720
    assert main(["list", "networks"]) == 0
    assert re.search(r"^ mdeq_imagenet +imagenet +17,912,456 +18,467,272 ", capsys.readouterr().out, re.M)


def test_a_reader_that_goes_away_ends_no_work(tmp_path):
    words = [*jobs.words(tmp_path, "model=deq,explicit", "recipe.batch=16"), "rounds=2"]
    process = subprocess.Popen([sys.executable, "-m", "implicit_bench", "bench", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=240) == 0, err
    assert "Traceback" not in err
    [path] = tmp_path.glob("runs/bench-*/record.json")
    assert (read_record(path)["status"], read_record(path)["error"]) == ("done", None)
