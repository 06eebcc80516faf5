"""`compare`: hand-computed ratios and intervals, equal accuracy, pairs by seed, every refusal, what it leaves, sweeps.

Records are written here; only the sweeps train.
"""

import copy
import csv
import functools
import io
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from test_log import inspect

from implicit_bench import config, machine, papers, record
from implicit_bench.cli import main
from implicit_bench.compare import spelled
from implicit_bench.compare.command import _cut
from implicit_bench.compare.figures import Trained, line, ratio, t_quantile
from implicit_bench.compare.rows import Run
from implicit_bench.record import read_record
from implicit_bench.report import ratios as report_ratios

ENVIRONMENT = {"hardware": "box", "cpu": "AMD EPYC", "cores": 2, "gpu": None, "threads": 1, "torch": "2.13.0",
               "cuda": None, "python": "3.11.7", "platform": "Linux", "world_size": 1, "allocator": "glibc-tuned",
               "versions": {}, "git": "abc1234", "alone": True}  # fmt: skip
RISING = (0.5, 0.8, 0.9, 0.95)


@functools.cache
def _composed(*words):
    return config.compose("train", ["gpu.threads=1", *words])


def put(top, model, seed=0, *words, step_ms=10.0, epoch_s=4.0, accuracy=RISING, cold_s=1.0, environment=(),
        status="done", folder="runs", name=None, converged=1.0, **fields):  # fmt: skip
    """A finished training's folder, of a model that was never trained: epochs of `epoch_s` after a cold second."""
    job = copy.deepcopy(_composed(f"model={model}", *words))
    gpu = config.make(job.config["gpu"], "gpu").settings()
    cfg = {**job.config, "seed": seed, "gpu": gpu}
    labels = {key: job.choices[key] for key in ("experiment", "protocol", "length")}
    rec = record.new_record(
        "train", cfg, status=status, epochs=len(accuracy), **labels, environment={**ENVIRONMENT, **dict(environment)},
        data={"name": "digits", "sha256": "0" * 64}, metrics={"val_acc": accuracy[-1], "test_acc": 0.9},
        solve={"nfe_forward": 20.0, "nfe_backward": 5.0, "converged_fraction": converged},
        timing={"cold_s": cold_s, "step_ms": {"median": step_ms, "p10": 1, "p90": 20, "n": 9}})  # fmt: skip
    rec |= {"started_at": "2026-01-01T00:00:00+00:00", **fields}
    path = top / folder / (name or f"{model}-digits-s{seed}-{rec['run_id']}")
    record.write_record(path, rec)
    rows = [{"step": 10 * k, "epoch": k, "timing.epoch_s": epoch_s and epoch_s + (k == 1) * cold_s,
             "metrics.val_acc": acc}
            for k, acc in enumerate(accuracy, 1)]  # fmt: skip
    rows.insert(0, {"step": 5, "metrics.train_loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIR = ("compare", "base=neural_ode", "against=cdeq", "logger=none")


def found(capsys, *words):
    assert main([*(words or PAIR), "format=json"]) == 0
    out = json.loads(capsys.readouterr().out)
    return {(r["denominator"], r["measure"]): r for r in out["ratios"]}, {r["label"]: r for r in out["rows"]}


def refused(capsys, *words):
    assert main(list(words or PAIR)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.removeprefix("implicit-bench: ").rstrip("\n")


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_students_t_is_the_tables():
    assert [round(t_quantile(0.95, df), 3) for df in (1, 2, 3, 4, 9, 30)] == [12.706, 4.303, 3.182, 2.776, 2.262, 2.042]
    assert t_quantile(0.5, 1) == pytest.approx(1.0)


def test_a_ratio_is_the_geometric_mean_with_students_interval_of_its_logarithm():
    got = ratio([(8.0, 1.0), (2.0, 1.0), (4.0, 1.0)])  # logs 3, 1, 2 times ln 2: sd ln 2
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert got["value"] == pytest.approx(4.0)
    assert (got["low"], got["high"]) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-6)
    assert got["verdict"] == "no difference"
    assert ratio([(4.0, 2.0), (4.2, 2.1)])["verdict"] == "faster"
    assert ratio([(2.0, 4.0), (2.1, 4.2)])["verdict"] == "slower"
    assert ratio([(3.0, 2.0)]) == {"value": pytest.approx(1.5), "verdict": "one seed"}


def test_a_training_of_other_numerics_is_trained_again_first(here, capsys):
    put(here, "neural_ode")
    put(here, "cdeq", run_id="0123456789")
    said = refused(capsys)
    assert re.search(r"^cdeq-digits-s0-\w+ was trained by a version .* that of neural_ode-digits-s0-\w+;", said)
    assert said.endswith("train it again: implicit-bench train model=cdeq seed=0 gpu.threads=1")


def test_the_three_are_kept_apart(here, capsys):
    for seed, factor in ((0, 1.0), (1, 2.0)):
        put(here, "neural_ode", seed, step_ms=30 * factor, epoch_s=6.0)
        put(here, "cdeq", seed, step_ms=10.0, epoch_s=4.0, accuracy=(0.95, 0.95, 0.95, 0.95))
    ratios, rows = found(capsys)
    assert main([*PAIR, "format=csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    told = {(line["row"], line["over"], line["measure"]): line for line in lines}
    assert len(told) == len(lines)  # one line a figure
    assert float(told["neural_ode", "cdeq", "step"]["value"]) == ratios["cdeq", "step"]["value"]
    assert float(told["cdeq", "", "timing.step_ms"]["value"]) == rows["cdeq"]["timing"]["step_ms"]
    assert ratios["cdeq", "step"]["value"] == pytest.approx(3 * math.sqrt(2))
    assert ratios["cdeq", "step"]["seeds"] == pytest.approx({"0": 3.0, "1": 6.0})
    assert ratios["cdeq", "epochs"]["value"] == pytest.approx(24 / 16)  # less the cold second
    assert ratios["cdeq", "accuracy"]["value"] == pytest.approx(24 / 4)  # smoothed .5 .5 .8 .9: fourth epoch, first
    assert [r["id"] for r in ratios.values()] == ["R1"] * 3
    assert [r["paper"] for r in ratios.values()] == ["2.14–4.10×", "", ""]
    assert rows["neural_ode"]["timing"] == pytest.approx({"step_ms": 30 * math.sqrt(2), "train_s": 24, "target_s": 24})
    assert rows["cdeq"]["metrics"] == {"val_acc": 0.95, "test_acc": 0.9}


HOMO = ("experiment=homo_mnist", "length=smoke")


def test_the_second_papers_claims_of_accuracy_and_of_stability(here, capsys):
    for seed, (a, b) in enumerate([(0.9, 0.95), (0.8, 0.94), (0.6, 0.96)]):
        put(here, "anode", seed, *HOMO, "network=homo_conv", metrics={"val_acc": 0.9, "test_acc": a})
        put(here, "homo_ode", seed, *HOMO, metrics={"val_acc": 0.9, "test_acc": b})
    ratios, _ = found(capsys, "compare", "base=anode", "against=homo_ode", "logger=none")
    h1, h4 = ratios["homo_ode", "errors"], ratios["homo_ode", "spread"]
    assert (h1["id"], h4["id"]) == ("H1", "H4")
    assert h1["seeds"] == pytest.approx({"0": 2.0, "1": 0.2 / 0.06, "2": 10.0})
    assert h1["value"] == pytest.approx((2 * 0.2 / 0.06 * 10) ** (1 / 3))
    deviation = (0.1 - 0.7 / 3) ** 2 + (0.2 - 0.7 / 3) ** 2 + (0.4 - 0.7 / 3) ** 2
    assert h4["value"] == pytest.approx(math.sqrt(deviation / 2) / 0.01)  # errors of .05, .06, .04
    root = math.sqrt(39.0)  # 95 % of F(2, 2) lies in [1/39, 39]
    assert (h4["low"], h4["high"]) == pytest.approx((h4["value"] / root, h4["value"] * root), rel=1e-3)
    assert h4["verdict"] == "faster"
    assert "shows 15.28× [2.45, 95.39] less spread over seeds" in _sentence(h4)


def _sentence(found):
    return report_ratios.sentence(line(found))


def test_a_training_that_diverged_is_counted_and_compared_with_nothing(here, capsys):
    for seed in (0, 1):
        put(here, "neural_ode", seed)
        put(here, "cdeq", seed)
    put(here, "neural_ode", 2)
    put(here, "cdeq", 2, status="failed", nonfinite_steps=1)
    ratios, rows = found(capsys)
    assert rows["cdeq"]["seeds"] == [0, 1]
    assert rows["cdeq"]["diverged"] == [2]
    assert ratios["cdeq", "step"]["n"] == 2
    assert ratios["cdeq", "step"]["caveats"] == ["cdeq diverged with seed 2"]
    assert refused(capsys, *PAIR, "seed=2").startswith("every training of 'cdeq' diverged (seed 2)")


def of(tmp_path, accuracy, seconds=None):
    """What is known of a training with this validation accuracy by epoch."""
    seconds = seconds or [2.0] * len(accuracy)
    rows = [{"epoch": k, "timing.epoch_s": s, "metrics.val_acc": a} for k, (s, a) in enumerate(zip(seconds, accuracy))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Trained(Run("x", {"timing": {"cold_s": 0.5}, "config": {"seed": 0}}, "done", tmp_path))


def test_the_equal_accuracy_rule_one_lucky_epoch_is_no_arrival(tmp_path):
    lucky = of(tmp_path, [0.1, 0.99, 0.2, 0.3, 0.9, 0.9, 0.5])
    assert lucky.smoothed == [0.1, 0.1, 0.2, 0.3, 0.3, 0.9, 0.9]  # lower median of the last three
    assert lucky.reached(0.9) == 11.5  # six epochs of 2 s less the cold half second
    assert lucky.reached(0.1) == 1.5
    assert lucky.reached(0.901) is None  # never extrapolated


def test_a_model_that_never_gets_there_has_no_ratio_and_says_after_how_long(here, capsys):
    for seed in (0, 1):
        put(here, "neural_ode", seed)
        put(here, "cdeq", seed, accuracy=RISING if seed else (0.5, 0.5, 0.5, 0.891, 0.5))
        put(here, "skip_cdeq", seed, accuracy=(0.1, 0.2, 0.89, 0.89))
    ratios, rows = found(capsys, "compare", "base=neural_ode", "against=cdeq,skip_cdeq", "logger=none")
    got = ratios["cdeq", "accuracy"]
    assert (got["value"], got["low"], got["verdict"]) == (None, None, "not reached in 5 epochs by seed 0")
    assert ratios["skip_cdeq", "accuracy"]["verdict"] == "not reached in 4 epochs"
    assert rows["skip_cdeq"]["timing"]["target_s"] is None
    assert ratios["skip_cdeq", "epochs"]["value"] == pytest.approx(1.0)


def test_what_the_records_cannot_tell_is_said_and_not_guessed(here, capsys):
    paths = [put(here, model, accuracy=accuracy) for model, accuracy in
             (("neural_ode", RISING), ("cdeq", (None, None)), ("skip_cdeq", RISING), ("deq", RISING))]  # fmt: skip
    (paths[2] / "metrics.jsonl").unlink()
    path = paths[3] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"epoch": 2, "timing.epoch_s": 4.0', '"epoch": 2, "timing.epoch_s": null'))
    ratios, _ = found(capsys, "compare", "base=neural_ode", "against=cdeq,skip_cdeq,deq", "logger=none")
    said = {key: r["verdict"] for key, r in ratios.items()}
    assert said["cdeq", "accuracy"] == "no validation split"
    assert said["skip_cdeq", "epochs"] == said["skip_cdeq", "accuracy"] == "no metrics.jsonl beside the record"
    assert said["deq", "epochs"] == "epoch 2 of seed 0 was not timed whole"
    assert {said[row, "step"] for row in ("cdeq", "skip_cdeq", "deq")} == {"one seed"}


def test_pairs_are_by_seed_and_one_that_lacks_is_left_out_aloud(here, capsys):
    for seed, ms in ((0, 10.0), (1, 20.0), (2, 1e6)):
        put(here, "neural_ode", seed, step_ms=ms)
        if seed < 2:
            put(here, "cdeq", seed, step_ms=ms / 2)
    ratios, rows = found(capsys)
    assert ratios["cdeq", "step"]["value"] == pytest.approx(2.0)
    assert ratios["cdeq", "step"]["low"] == pytest.approx(2.0)  # paired: the seeds differ, their ratios do not
    assert ratios["cdeq", "step"]["n"] == 2
    assert rows["neural_ode"]["timing"]["step_ms"] == pytest.approx(math.sqrt(200))
    assert main([*PAIR]) == 0
    assert "left    seed 2 of neural_ode, which cdeq has not\n" in capsys.readouterr().out


def test_what_speaks_against_a_comparison_stands_beside_it(here, capsys):
    put(here, "neural_ode", 0)
    put(here, "cdeq", 0, "solver=tsit5", environment={"git": "def5678"}, converged=0.0, resumed_from=[{"step": 3}])
    ratios, _ = found(capsys)
    first = ["cdeq not converged", "different solvers or stepping tolerances", "of different commits"]
    assert [r["caveats"] for r in ratios.values()] == [first, [*first, "some resumed"], [*first, "some resumed"]]
    assert main([*PAIR]) == 0
    assert '"no headline: cdeq not converged"' in capsys.readouterr().out


def test_one_seed_that_did_not_converge_leaves_no_headline(here, capsys):
    for seed, converged in enumerate((1.0, 1.0, 0.9)):  # .967 of all
        put(here, "neural_ode", seed, converged=None)
        put(here, "cdeq", seed, converged=converged)
    assert main([*PAIR]) == 0
    assert '"no headline: cdeq not converged"' in capsys.readouterr().out


def test_a_headline_has_its_caveats_and_accuracies_in_the_order_of_its_rows(here, capsys):
    put(here, "neural_ode", 0, metrics={"val_acc": 0.9, "test_acc": 0.7})
    put(here, "cdeq", 0, environment={"git": "def5678"}, metrics={"val_acc": 0.9, "test_acc": 0.8})
    assert main([*PAIR]) == 0
    out = capsys.readouterr().out
    assert re.search(r"neural_ode / cdeq: one seed in \w+ here, .*of different commits\); test accuracy 0.700 against "
                     r"0.800", out)  # fmt: skip


GOLDEN = """\
compare cdeq against neural_ode: digits, trained alike and alone, by seed
machine AMD EPYC · 1 thread · torch 2.13.0 · allocator glibc-tuned · batch 32
 model       seeds  val acc  test acc  step ms    nfe f/b  epochs  train s  s to target
 neural_ode    0 1    0.950     0.900     30.0  20.0/5.00       4     24.0         24.0
 cdeq          0 1    0.950     0.900     10.0  20.0/5.00       4     16.0         16.0
        train s: whole epochs, without validation and the cold first step · target: 99% of neural_ode's last \
validation accuracy, lower medians of 3 epochs
     paired by seed, 95 %             here
 R1  neural_ode / cdeq     step      3.00×  [3.00, 3.00]  cdeq faster  paper 2.14–4.10×
 R1  neural_ode / cdeq     epochs    1.50×  [1.50, 1.50]  cdeq faster
 R1  neural_ode / cdeq     accuracy  1.50×  [1.50, 1.50]  cdeq faster
say     "cdeq reaches the same accuracy 1.50× [1.50, 1.50] faster than neural_ode here; test accuracy \
0.900 against 0.900"
wrote   runs/compare-digits-ID/   record.json · table.md · speedup.svg
"""


def test_the_table_the_lines_and_the_sentence(here, capsys):
    for seed in (0, 1):
        put(here, "neural_ode", seed, step_ms=30.0, epoch_s=6.0)
        put(here, "cdeq", seed)
    assert main([*PAIR]) == 0
    assert re.sub(r"[0-9a-f]{10}/", "ID/", capsys.readouterr().out) == GOLDEN
    assert main([*PAIR, "format=md"]) == 0
    rows, lines = capsys.readouterr().out.split("\n\n")
    assert "| neural_ode | 0 1 | 0.950 | 0.900 | 30.0 | 20.0/5.00 | 4 | 24.0 | 24.0 |" in rows
    assert lines.startswith("| id | pair | measure | ratio | 95 % | verdict | paper | caveat |\n")
    assert main([*PAIR, "plan=true", "paths.runs=other", "records=runs", "format=csv"]) == 0
    name = next(here.glob("runs/neural_ode-digits-s0-*")).name
    assert capsys.readouterr().out.splitlines()[:2] == ["row,seed,run", f"neural_ode,0,{name}"]
    assert not (here / "other").exists()


def test_it_leaves_a_record_once_and_keeps_every_attempt(here, capsys):
    for seed in (0, 1):
        put(here, "neural_ode", seed, step_ms=30.0)
        cdeq = put(here, "cdeq", seed)
    assert main([*PAIR]) == 0
    (folder,) = here.glob("runs/compare-digits-*")
    rec = read_record(folder)
    assert (rec["command"], rec["status"], rec["attempt"], rec["protocol"]) == ("compare", "done", 1, "sound")
    assert rec["config"]["rows"]["cdeq"]["1"] == cdeq.name[-10:] == rec["rows"][1]["runs"][1][-10:]
    assert [r["measure"] for r in rec["ratios"]] == ["step", "epochs", "accuracy"]
    assert "neural_ode / cdeq, accuracy" in (folder / "speedup.svg").read_text()
    assert "| R1 | neural_ode / cdeq | step | 3.00× | [3.00, 3.00] | cdeq faster |" in (folder / "table.md").read_text()
    assert main([*PAIR]) == 0
    assert f"kept    runs/{folder.name}/   which says the same\n" in capsys.readouterr().out
    assert read_record(folder) == rec
    put(here, "cdeq", 1, step_ms=20.0)  # force=true
    assert main([*PAIR]) == 0
    assert read_record(folder)["attempt"] == 2
    assert json.loads((folder / "attempt-1.record.json").read_text()) == rec
    assert (folder / "attempt-1.table.md").exists()
    capsys.readouterr()
    assert main(["runs", "compare", "format=csv"]) == 0  # is a run among the others
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{folder.name},done,")


def test_the_wandb_run_is_an_offline_one_that_can_be_read(here, monkeypatch):
    for model, ms in (("neural_ode", 30.0), ("cdeq", 10.0)):
        put(here, model, step_ms=ms)
    code = "import sys; from implicit_bench.cli import main; code = main(sys.argv[1:]); " \
        "sys.exit(code or 3 * ('torch' in sys.modules))"  # fmt: skip
    words = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code, *PAIR[:3]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # nor does it import torch
    (folder,) = here.glob("runs/compare-digits-*")
    (line,) = done.stderr.splitlines()
    assert line == f"W&B offline (no key found); upload later with: implicit-bench sync runs/{folder.name}"
    summary = json.loads(inspect(folder / "wandb" / "latest-run", "--summary"))
    lines = [json.loads(line) for line in inspect(folder / "wandb" / "latest-run").splitlines()]
    (begun,) = [line["run"] for line in lines if line["type"] == "run"]
    assert (begun["job_type"], begun["display_name"]) == ("compare", "compare-digits")
    assert (summary["run_id"], summary["state"]) == (folder.name[-10:], "finished")
    got = summary["summary"]
    assert got["speedup/R1/step"] == pytest.approx(3.0)
    assert got["speedup/R1/epochs"] == pytest.approx(1.0)
    assert [(got[name]["nrows"], got[name]["ncols"]) for name in ("rows", "ratios")] == [(2, 9), (3, 8)]
    assert "speedup" in got


# ------------------------------------------------------------------------------------------------------------ refusals


def composes(sentence):
    """The commands at a sentence's end are ones that can be typed; what they compose to."""
    for command in re.search(r"(?<=: )implicit-bench .*?(?= \(|$)", sentence)[0].split(" && "):
        prog, name, *words = shlex.split(command)
        given = [word for word in words if word != "-m"]
        assert (prog, "-m" in words) == ("implicit-bench", name == "train" and len(config.expand(given)) > 1)
        yield name, [job.config for job in config.compose_all(name, config.expand(given))]


UNLIKE = {  # what the second model's record has: the key that is named, and both values
    "recipe.lr=3e-4": "recipe.lr is 0.001 in neural_ode-digits-s0-ID and 0.0003 in cdeq-digits-s0-ID",
    "length=short": "length is full in neural_ode-digits-s0-ID and short in cdeq-digits-s0-ID",
    "recipe.batch=64": "recipe.batch is 32 in neural_ode-digits-s0-ID and 64 in cdeq-digits-s0-ID",
    "gpu.dtype=float64": "gpu.dtype is float32 in neural_ode-digits-s0-ID and float64 in cdeq-digits-s0-ID",
    "gpu.threads=2": "gpu.threads is 1 in neural_ode-digits-s0-ID and 2 in cdeq-digits-s0-ID",
    "dataset=mnist": "dataset is digits in neural_ode-digits-s0-ID and mnist in cdeq-digits-s0-ID",
    "protocol=faithful": "protocol is sound in neural_ode-digits-s0-ID and faithful in cdeq-digits-s0-ID",
    "network.hidden=64": "network.hidden is 128 in neural_ode-digits-s0-ID and 64 in cdeq-digits-s0-ID",
    "hardware": "hardware is box in neural_ode-digits-s0-ID and other in cdeq-digits-s0-ID",
    "torch": "torch is 2.13.0 in neural_ode-digits-s0-ID and other in cdeq-digits-s0-ID",
    "allocator": "allocator is glibc-tuned in neural_ode-digits-s0-ID and other in cdeq-digits-s0-ID",
}


@pytest.mark.parametrize("word", UNLIKE)
def test_unlike_trainings_are_refused_by_the_key_that_differs(here, capsys, monkeypatch, word):
    monkeypatch.setattr(spelled, "words", lambda rec: ["WORDS"])
    put(here, "neural_ode")
    put(here, "cdeq", 0, *([word] if "=" in word else []), environment={} if "=" in word else {word: "other"})
    said = re.sub(r"[0-9a-f]{10}", "ID", refused(capsys))
    again = "bench model=neural_ode,cdeq WORDS" if "=" in word else \
        "train -m model=neural_ode,cdeq seed=0 WORDS force=true"  # fmt: skip
    assert said == f"{UNLIKE[word]}, so their times cannot be compared; time both alike: implicit-bench {again}"
    assert not list(here.glob("runs/compare-*"))


def test_the_bench_that_times_both_has_the_bases_settings_and_no_solver_of_one_alone(here, capsys):
    put(here, "neural_ode", 0, "adjoint.seminorm=true", "recipe.clip=1.5", "recipe.optimizer=adamw")
    put(here, "cdeq", 0, "recipe.clip=1.5")
    ((name, (a, b)),) = composes(refused(capsys))
    assert name == "bench"
    assert [cfg["model"]["name"] for cfg in (a, b)] == ["neural_ode", "cdeq"]
    assert a["recipe"] == b["recipe"]
    assert (a["recipe"]["clip"], a["recipe"]["optimizer"], a["adjoint"]["seminorm"]) == (1.5, "adamw", False)


def test_where_nobody_can_tell_the_load_it_stands_beside_the_times(here, capsys):
    put(here, "neural_ode")
    put(here, "cdeq", environment={"alone": None})
    ratios, _ = found(capsys)
    assert {r["measure"]: r["caveats"] for r in ratios.values()} == {
        "step": ["load unknown"], "epochs": ["load unknown"], "accuracy": ["load unknown"]}  # fmt: skip


def test_a_run_that_was_disturbed_is_refused_and_it_alone_trained_again(here, capsys):
    words = ("recipe.epochs=7", "solver=tsit5", "solver.rtol=0.005")
    put(here, "neural_ode", 0, *words)
    path = put(here, "cdeq", 0, *words, environment={"alone": False})
    said = refused(capsys)
    assert said.startswith(f"{path.name} was not alone on the machine (environment.alone)")
    ((_, [again]),) = composes(said)
    own = read_record(path)
    again["gpu"] = own["config"]["gpu"]  # as resolved here
    assert record.run_id(again) == own["run_id"]
    assert again["force"] is True


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_an_unfinished_run_is_refused_with_what_resumes_it(here, capsys, status):
    put(here, "neural_ode")
    put(here, "cdeq")
    path = put(here, "cdeq", 1, "paths.runs=elsewhere", status=status)
    said = refused(capsys)
    assert " paths.runs=elsewhere" in said
    state = {"failed": "has failed", "interrupted": "was interrupted", "running": "was stopped"}[status]
    assert said.startswith(f"{path.name} {state}; go on with: implicit-bench train model=cdeq seed=1")
    if status == "failed":
        list(composes(said))
    assert main([*PAIR, "status=done"]) == 0  # as the sentence says


def test_several_cells_of_a_model_are_never_chosen_between(here, capsys):
    put(here, "neural_ode")
    put(here, "cdeq")
    put(here, "cdeq", 0, "solver=tsit5")
    put(here, "cdeq", 1, "recipe.lr=0.5", status="failed")  # of which nothing is done: nobody means it
    said = "'cdeq' names trainings that differ in solver (tsit5, vcab3); say which, as solver=tsit5"
    assert refused(capsys) == said
    ratios, _ = found(capsys, *PAIR, "solver=vcab3")
    assert ratios["cdeq", "step"]["caveats"] == []
    rows = found(capsys, "compare", "base=solver=tsit5", "against=neural_ode", "logger=none")[1]
    assert list(rows) == ["solver=tsit5", "neural_ode"]  # words as `runs` takes them; an id is one
    id = rows["neural_ode"]["runs"][0][-10:]
    assert found(capsys, "compare", f"base={id}", "against=solver=tsit5", "logger=none")


def test_the_rest_is_one_sentence_too(here, capsys):
    neural_ode, cdeq = put(here, "neural_ode"), put(here, "cdeq", 1)
    said = refused(capsys)
    assert said.startswith("neural_ode and cdeq have no seed in common (0; 1); train what lacks: implicit-bench train "
                           "model=cdeq seed=0")  # fmt: skip
    list(composes(said))
    for words, sentence in {
        "base=deq against=cdeq": "no training of 'deq' in runs; there are: cdeq, neural_ode",
        "base=neural_ode against=cdeq seed=4": "no training of 'neural_ode' in runs with seed=4; there are: none",
        "against=cdeq": "compare wants a base, such as base=neural_ode",
        "base=cdeq": "compare wants what cdeq is compared with",
        "base=cdeq,deq against=explicit": "compare wants one base, not cdeq and deq",
        "base=cdeq base=deq against=explicit": "base=cdeq and base=deq both say base; give one of them",
        "base=cdeq against=neural_ode,cdeq": "'cdeq' is named twice",
        "base=cdeq against=neural_ode bsae=x": "no key 'bsae'; nearest: base",
        "base=cdeq against=neural_ode status=don": "no status 'don'; there are: running, done",
        "base=cdeq against=neural_ode plan=maybe": "plan='maybe' is not possible",
        "base=cdeq against=neural_ode logger=wand": "logger='wand' is not possible; nearest: wandb",
        "base=cdeq against= logger=none": "against= wants one value or more",
        "base=cdeq against=neural_ode records=nowhere": "no folder nowhere to read records from",
    }.items():
        assert refused(capsys, "compare", *words.split()).startswith(sentence)
    other = put(here, "cdeq", 1, folder="results", name="cdeq-digits-s1-copy", started_at="2026-02-02T00:00:00+00:00")
    assert "seed 1 of cdeq was trained twice, in runs/" in refused(capsys, *PAIR, "records=runs,results")
    newer = json.dumps({**read_record(cdeq), "schema_version": 9})
    for text, sentence in (("{", "cannot be read (no valid JSON"), ('{"a": 1}', "is no run record (it lacks"),
                           (newer, "has schema 9, newer than")):  # fmt: skip
        (other / "record.json").write_text(text)
        assert sentence in refused(capsys, *PAIR, "records=runs,results")
    assert neural_ode.exists()


def test_copies_among_the_results_are_the_same_training(here, capsys):
    for folder in ("results", "runs"):
        put(here, "neural_ode", folder=folder, step_ms=30.0)
        put(here, "cdeq", folder=folder)
    for path in here.glob("results/*/metrics.jsonl"):
        path.unlink()
    ratios, _ = found(capsys, *PAIR, "records=results,runs")
    assert ratios["cdeq", "epochs"]["value"] == pytest.approx(1.0)  # of the one that has its rows


# -------------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_ends_with_the_comparison_and_says_it_again_when_it_is_done(here, capsys, monkeypatch):
    monkeypatch.setattr(machine.Alone, "read", lambda self: True)
    words = ["train", "-m", "model=explicit,neural_ode", "seed=0", *jobs.words(here, "recipe.epochs=1",
             "recipe.epoch_images=320", "recipe.eval_images=60")]  # fmt: skip
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "\ncompare explicit against neural_ode: digits, " in first  # which is the base wherever it stands
    assert re.search(r"^ –  neural_ode / explicit  epochs +\d", first, re.M)
    (path,) = here.glob("runs/compare-digits-*")
    rec = read_record(path)
    ms = [read_record(p)["timing"]["step_ms"]["median"] for p in sorted(here.glob("runs/*-digits-s*"))]
    assert rec["ratios"][0]["value"] == pytest.approx(ms[1] / ms[0])
    assert main(words) == 0
    again = capsys.readouterr().out
    said = [text[text.index("compare ") : text.rindex("\n", 0, -1)] for text in (first, again)]
    assert said[0] == said[1]
    assert again.splitlines()[-1].startswith("kept    ")
    assert not (here / "runs" / path.name / "wandb").exists()  # as logger=none says


def test_a_sweep_of_which_runs_fail_keeps_its_exit_code_and_says_why_there_is_no_comparison(here, capsys):
    words = jobs.words(here, "recipe.max_steps=2", "recipe.eval_images=60")
    assert main(["train", "-m", "model=neural_ode,explicit", "solver=picard,vcab3", *words]) == 3
    out, err = capsys.readouterr()
    assert out.endswith("sweep   solver=picard\nsweep   solver=vcab3\n")
    lines = [line for line in err.splitlines() if "no comparison" in line]
    lacks = [f"model={name} has left no record" for name in ("neural_ode", "explicit")]
    assert lines == [f"note    no comparison: {text}" for text in lacks]


def test_what_a_tables_row_is_made_of_cuts_no_training():
    found = papers.table("homo_ode")
    for label, words in found.jobs(["homo_ode", "neural_ode", "deq", "explicit"], [], cpu=False).items():
        job = config.compose("train", words)
        labels = {key: job.choices[key] for key in ("experiment", "protocol", "length")}
        rec = record.new_record("train", job.config, **labels)
        for more, cut in (({}, False), ({"recipe": {**job.config["recipe"], "epochs": 1}}, True)):
            run = Run(label, {**rec, "config": {**job.config, **more}}, "done", Path())
            assert _cut(run) == cut, spelled.words(run.record)
