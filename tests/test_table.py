"""`table`: which records a cell is made of, its mean and sd, what is missing or failed, verdicts, formats, mistakes.

Records are written here, but for one test that lets a table run what it lacks.
"""

import base64
import csv
import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import forked
import pytest
from test_compare import ENVIRONMENT, put
from test_log import inspect

from implicit_bench import config, papers, record, schema
from implicit_bench.cli import main
from implicit_bench.compare.figures import CUT
from implicit_bench.compare.rows import Run
from implicit_bench.report.ratios import WIDE
from implicit_bench.schema import GROUPS
from implicit_bench.table import cells, columns, verdicts
from implicit_bench.table.out import publish
from implicit_bench.table.report import _bars, _curves, _trainings

MINE = """title: Digits
source: a paper of mine
words: [gpu.threads=1]
seeds: {sound: [0, 1], faithful: [7]}
columns: [params, test_acc, train_min, target_s]
target: 0.9
rows:
  deq: {words: [model=deq], published: {params: 42_378, test_acc: [0.97, 0.002]}}
  cdeq: {words: [model=cdeq], published: {params: 42_378, test_acc: 0.98}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/table").mkdir(parents=True)
    (tmp_path / "own/table/mine.yaml").write_text(MINE)
    return tmp_path


def asked(capsys, *words, table="mine"):
    """The exit code, and the rows of the table as dicts."""
    code = main(["table", f"table={table}", "--config-dir=own", "format=csv", *words])
    return code, [*csv.DictReader(io.StringIO(capsys.readouterr().out))]


def bench(top, ratios, *, table="mine", protocol="sound", status="done", name="bench", hardware="box", rows=(),
          started="2026-01-01T00:00:00+00:00", settings=None, **environment):  # fmt: skip
    """The record of a bench with these ratios: (id, numerator, denominator, measure, value, low, high, more); what its
    rows were, beside the batch, is in `settings`."""
    keys = ("id", "numerator", "denominator", "measure", "value", "low", "high")
    told = [{"n": 60, "verdict": "faster", "caveats": [], "paper": "", "explained": None, **dict(zip(keys, r[:7])),
             **(r[7] if len(r) > 7 else {})} for r in ratios]  # fmt: skip
    gpu = {"dtype": "float32", "compile": False}
    cfg = {"table": table, "rows": [{"gpu": gpu, "recipe": {"batch": 32}, **(settings or {})}], "name": name}
    rec = record.new_record("bench", cfg, status=status, protocol=protocol,
                            environment={**ENVIRONMENT, "hardware": hardware, **environment})  # fmt: skip
    rec |= {"ratios": told, "rows": list(rows), "rounds": 60, "started_at": started}
    record.write_record(top / "runs" / f"{name}-{rec['run_id']}", rec)
    return rec["run_id"]


def timed(label, train_ms, at=None):
    times = {f"{name}_ms": {"median": ms, "p10": ms, "p90": ms, "n": 60} for name, ms in (
        ("train", train_ms), ("backward", train_ms / 2), ("predict", train_ms / 4))}  # fmt: skip
    return {"label": label, **({} if at is None else {"at": at}), "params": 42_378, "timing": times,
            "solve": {"nfe_forward": 12.0, "nfe_backward": 6.0}, "memory": {"train_mib": 3.5}}  # fmt: skip


def test_a_cell_is_the_mean_and_the_sd_of_its_seeds_beside_the_papers(here, capsys):
    for seed, acc in ((0, 0.95), (1, 0.97)):
        put(here, "deq", seed, metrics={"test_acc": acc, "val_acc": acc})
    _, (deq, cdeq) = asked(capsys)
    assert (deq["n"], deq["of"], deq["test_acc_n"]) == ("2", "2", "2")
    assert float(deq["test_acc"]) == pytest.approx(96)
    assert float(deq["test_acc_sd"]) == pytest.approx(math.sqrt(2))  # of 95 and 97
    assert (deq["test_acc_paper"], deq["params_paper"]) == ("97.0 ± 0.2", "42,378")
    assert (cdeq["n"], cdeq["test_acc"], cdeq["test_acc_paper"]) == ("0", "", "98")


def test_runs_of_another_seed_or_recipe_or_protocol_fill_no_cell(here, capsys):
    put(here, "deq", 2)
    put(here, "deq", 0, "recipe.epochs=3")
    put(here, "deq", 0, "protocol=faithful")
    put(here, "deq", 0, status="running")
    _, (deq, _) = asked(capsys)
    assert deq["n"] == "0"
    put(here, "deq", 7, "protocol=faithful")
    _, (deq, _) = asked(capsys, "protocol=faithful")
    assert (deq["n"], deq["of"], deq["protocol"]) == ("1", "1", "faithful")


def test_any_other_word_is_said_to_every_row(here, capsys):
    put(here, "deq", 0, "recipe.epochs=3")
    _, (deq, _) = asked(capsys, "recipe.epochs=3")
    assert deq["n"] == "1"


def test_cells_of_different_machines_are_never_averaged(here, capsys):
    put(here, "deq", 0, metrics={"test_acc": 0.9}, environment={"hardware": "a box"})
    put(here, "deq", 1, metrics={"test_acc": 0.8}, environment={"hardware": "another"}, name="deq-digits-s1-other")
    put(here, "deq", 0, metrics={"test_acc": 0.7}, environment={"hardware": "another"}, name="deq-digits-s0-other")
    _, rows = asked(capsys)
    found = {row["machine"]: (row["n"], row["test_acc"]) for row in rows if row["model"] == "deq"}
    assert found["a box, 1 thread"] == ("1", "90.0")
    assert found["another, 1 thread"][0] == "2"
    assert float(found["another, 1 thread"][1]) == pytest.approx(75)
    main(["table", "table=mine", "--config-dir=own"])
    assert "a box, 1 thread" in capsys.readouterr().out


def test_a_run_that_lies_in_two_folders_counts_once(here, capsys):
    path = put(here, "deq", 0)
    (here / "results/box").mkdir(parents=True)
    (here / "results/box" / f"{path.name}.record.json").write_text((path / "record.json").read_text())
    _, (deq, _) = asked(capsys)
    assert deq["n"] == "1"


def test_missing_and_failed_say_so_and_what_fills_them(here, capsys):
    put(here, "deq", 0, status="failed", error="loss was nan")
    assert main(["table", "table=mine", "--config-dir=own", "length=short"]) == 0
    out = capsys.readouterr().out
    fill = "implicit-bench table table=mine length=short run_missing=true --config-dir=own"
    assert f"not done: 4 trainings; {fill} runs them" in out
    main(["table", "table=mine", "--config-dir=own"])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "failed" in lines["deq"]
    assert "not run" in lines["cdeq"]
    assert "failed: deq seed 0: loss was nan" in out


def test_training_time_is_of_runs_that_were_alone_else_of_a_bench_with_their_batch(here, capsys):
    """Four epochs of 4 s, ten steps each; .9 is reached in the fourth, smoothed."""
    put(here, "deq", 0)
    put(here, "cdeq", 0, environment={"alone": False})
    _, (deq, cdeq) = asked(capsys)
    assert (float(deq["train_min"]), float(deq["target_s"])) == (pytest.approx(16 / 60), pytest.approx(16))
    assert (cdeq["train_min"], cdeq["target_s"]) == ("", "")
    bench(here, [], rows=[timed("cdeq", 300.0, 0), timed("cdeq", 600.0, 500)])
    _, (_, cdeq) = asked(capsys, "columns=train_min,target_s,train_s,backward_s,predict_s,nfe_f,nfe_b,memory_mib")
    assert [float(cdeq[c]) for c in ("train_min", "target_s", "train_s", "backward_s", "predict_s")] == pytest.approx(
        [0.4, 24, 0.6, 0.3, 0.15])  # 40 steps of the last point's .6 s  # fmt: skip
    put(here, "cdeq", 0, epoch_s=None)
    _, (_, again) = asked(capsys, "columns=train_min,target_s")
    assert (again["train_min"], again["target_s"]) == (cdeq["train_min"], cdeq["target_s"])
    assert [float(cdeq[c]) for c in ("nfe_f", "nfe_b", "memory_mib")] == [12, 6, 3.5]


def test_a_target_that_one_seed_did_not_reach_has_no_time(here, capsys):
    put(here, "deq", 0)
    put(here, "deq", 1, accuracy=(0.5, 0.8, 0.85, 0.86))
    main(["table", "table=mine", "--config-dir=own"])
    assert "reached by 1 of 2" in capsys.readouterr().out
    put(here, "deq", 0, accuracy=(0.5, 0.8, 0.85, 0.86))
    main(["table", "table=mine", "--config-dir=own"])
    assert "not reached" in capsys.readouterr().out


def test_a_row_of_a_bench_is_the_latest_of_those_furthest_along_training(here, capsys):
    bench(here, [], rows=[timed("deq", 50.0)], name="old", started="2025-01-01T00:00:00+00:00")
    bench(here, [], rows=[timed("deq ×18", 80.0)], name="new")
    bench(here, [], rows=[timed("deq", 999.0)], name="foreign", table="cdeq_mnist")
    bench(here, [], rows=[timed("deq", 999.0)], name="theirs", protocol="faithful")
    _, (deq, cdeq) = asked(capsys, "columns=train_s,params")
    assert float(deq["train_s"]) == 0.08
    assert deq["params"] == "42378.0"
    assert cdeq["train_s"] == ""
    bench(here, [], rows=[timed("deq", 70.0) | {"at": 500}], name="far", started="2025-01-01T00:00:00+00:00")
    _, (deq, _) = asked(capsys, "columns=train_s")
    assert float(deq["train_s"]) == 0.07


def test_a_row_that_a_table_inherits_keeps_its_times(here, capsys):
    bench(here, [], rows=[timed("deq", 50.0), timed("cdeq", 60.0)], name="base")
    (here / "own/table/wider.yaml").write_text("inherits: mine\nrows:\n  cdeq: {words: [model=cdeq, stop.tol=1e-3]}\n")
    (here / "own/table/other.yaml").write_text("inherits: mine\nwords: [gpu.threads=1, recipe.batch=16]\n")
    for table, times in (("wider", ["0.05", ""]), ("other", ["", ""])):
        assert [row["train_s"] for row in asked(capsys, "columns=train_s", table=table)[1]] == times
    bench(here, [], rows=[timed("cdeq", 70.0)], name="own", table="wider")
    assert [row["train_s"] for row in asked(capsys, "columns=train_s", table="wider")[1]] == ["0.05", "0.07"]


def test_formats_hold_the_same_cells_and_the_same_records_give_the_same_bytes(here, capsys):
    put(here, "deq", 0, metrics={"test_acc": 0.9512}, params={"total": 42_378})
    found = []
    for _ in range(2):
        assert main(["table", "table=mine", "--config-dir=own", "out=tables", "-q"]) == 0
        found.append({path.suffix: path.read_text() for path in (here / "tables").glob("mine.*")})
    files, again = found
    assert files == again
    assert {*files} == {".md", ".csv", ".tex", ".json", ".txt", ".bib"}
    assert "| deq | 1/2 | 42,378 | 42,378 | 95.12 | 97.0 ± 0.2 |" in files[".md"]
    assert r"deq & 1/2 & 42,378 & 42,378 & 95.12 & 97.0 $\pm$ 0.2" in files[".tex"]
    assert r"\toprule" in files[".tex"]
    assert files[".tex"].count(r"\footnotesize") >= 3
    assert json.loads(files[".json"])["rows"][0]["test_acc"] == pytest.approx(95.12)
    capsys.readouterr()
    main(["table", "table=mine", "--config-dir=own", "format=tex"])
    assert capsys.readouterr().out == files[".tex"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["table=min"], "no table 'min'; nearest: mine"),
     (["table=mine", "columns=tst_acc"], "no column 'tst_acc'; nearest: test_acc"),
     (["table=mine", "rows=dq"], "table=mine has no row 'dq'; nearest: deq"),
     (["table=mine", "run_missing=yes"], "run_missing='yes' is not possible"),
     (["table=mine", "records=nowhere"], "no folder nowhere to read records from"),
     (["table=mine", "run_missing=true", "time=5"], "time='5' is not a time; write 20s, 5m or 1h"),
     (["table=mine", "modle=deq"], "no key 'modle'"), (["table=mine", "record=results"], "nearest: records"),
     (["table=mine", "time=5m"], "time=5m is about what run_missing=true would do"),
     (["table=mine", "plan=true"], "plan=true is about what run_missing=true would do"),
     (["table=mine", "records="], "records= names no folder"), (["tabel=mine"], "no key 'tabel'; nearest: table"),
     (["foo=bar"], "table=claims has no use for 'foo=bar'"), (["protocol=sond"], "no use for 'protocol=sond'"),
     (["table=claims", "rows=deq"], "table=claims has no use for 'rows=deq'"),
     (["table=cdeq_fig1", "protocol=sond"], "no protocol 'sond'; nearest: sound"),
     (["table=claims", "run_missing=true"], "table=claims is made of other tables' records"),
     (["table=mine", "--cfg", "job"], "table takes no flag but --config-dir")],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(here, capsys, words, sentence):
    assert main(["table", *words, "--config-dir=own", "out=tables"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (here / "tables").exists()


@pytest.mark.parametrize("command", ["table", "bench"])
def test_a_claim_that_there_is_not_is_a_sentence_before_any_work(here, capsys, command):
    (here / "own/table/unclaimed.yaml").write_text("inherits: mine\nclaims: [R9, R77]\n")
    assert main([command, "table=unclaimed", "--config-dir=own"]) == 2
    assert "table=unclaimed: no claim 'R77'; there are R1 to R7, R9 and H1 to H5" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_the_table_of_the_page_is_one(here, capsys):
    page = (Path(__file__).parent.parent / "docs/tables.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (here / "own/table/theirs.yaml").write_text(text)
    _, rows = asked(capsys, table="theirs")
    assert [row["model"] for row in rows][-1] == "deq anderson"
    assert {row["of"] for row in rows} == {"2"}


@pytest.mark.parametrize(
    "spoil",
    [lambda rec: rec.pop("metrics"), lambda rec: rec.update(schema_version=99), lambda rec: rec.update(config=None),
     lambda rec: rec["environment"].pop("threads"), lambda rec: rec["config"]["gpu"].pop("dtype"),
     lambda rec: rec["metrics"].update(test_acc="high")],
)  # fmt: skip
def test_a_record_that_lacks_keys_or_is_newer_is_a_sentence(here, capsys, spoil):
    path = put(here, "deq", 0) / "record.json"
    rec = json.loads(path.read_text())
    spoil(rec)
    path.write_text(json.dumps(rec))
    assert main(["table", "table=mine", "--config-dir=own", "out=tables"]) == 2
    assert str(path) in capsys.readouterr().err.replace("runs/", f"{here}/runs/", 1)
    assert not (here / "tables").exists()


@pytest.mark.parametrize(("lack", "where"), [("label", "rows"), ("caveats", "ratios"), ("n", "ratios")])
def test_a_bench_that_lacks_keys_is_a_sentence(here, capsys, lack, where):
    bench(here, [("R1", "neural_ode", "cdeq", "train", 2.5, 2.4, 2.6)], rows=[timed("deq", 5.0)])
    (path,) = here.glob("runs/*/record.json")
    rec = json.loads(path.read_text())
    del rec[where][0][lack]
    path.write_text(json.dumps(rec))
    for command in (["table"], ["table", "table=mine", "--config-dir=own"], ["report"]):
        assert main([*command, "out=made"]) == 2
        assert f"has no {lack} in its {where}, which a table reads" in capsys.readouterr().err
    assert not (here / "made").exists()


def test_what_would_be_run_is_told_and_nothing_is(here, capsys):
    put(here, "deq", 0)
    assert main(["table", "table=mine", "--config-dir=own", "run_missing=true", "plan=true", "recipe.max_steps=3"]) == 0
    assert "4 jobs, 0 done, 4 to do" in " ".join(capsys.readouterr().out.split())
    assert len([*here.glob("runs/*")]) == 1


def test_what_is_missing_is_run_once_and_shown(here, capsys, monkeypatch):
    words = ["table=mine", "--config-dir=own", "recipe.max_steps=3", "logger=none", "rows=deq"]
    assert main(["table", *words, "run_missing=true", "seed=0"]) == 2
    assert "a table has its seeds; say seeds=0 for others" in capsys.readouterr().err
    assert main(["table", *words, "run_missing=true", "format=csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["model"], row["n"]) == ("deq", "2")
    before = {path: path.stat().st_mtime_ns for path in here.glob("runs/*/record.json")}
    assert len(before) == 2
    assert main(["table", *words, "run_missing=true"]) == 0
    assert {path: path.stat().st_mtime_ns for path in here.glob("runs/*/record.json")} == before


def test_rows_are_timed_here_beside_one_that_another_machine_has_timed(here, capsys, brisk):
    words = ["table=mine", "--config-dir=own", "recipe.max_steps=2", "logger=none", "seeds=0"]
    bench(here, [], rows=[timed("deq", 5.0), timed("cdeq", 5.0)], hardware="another box")
    run = [*words, "columns=test_acc,train_s", "run_missing=true", "time=20s"]
    assert main(["table", *run, "rows=cdeq", "format=csv"]) == 0
    lines = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert [line["machine"] == "another box, 1 thread" for line in lines if line["train_s"]].count(False) == 1
    made = [rec for path in here.glob("runs/*/record.json")
            if (rec := record.read_record(path))["command"] == "bench" and rec["environment"]["threads"] == 1
            and rec["environment"]["hardware"] != "another box"]  # fmt: skip
    assert [row["label"] for row in made[0]["rows"]] == ["deq", "cdeq"]  # the reference once more
    assert main(["table", *run, "rows=cdeq"]) == 0  # and that is that
    again = list(here.glob("runs/bench-*/*record.json"))
    assert len(again) == 2


def test_a_later_bench_of_some_rows_hides_nothing_of_an_earlier_one(here, capsys):
    old = {**timed("cdeq", 9.0, at=3), "memory": {"train_mib": 7.0}}
    id = bench(here, [], rows=[timed("deq", 9.0), old], name="old", started="2026-01-01T00:00:00+00:00")
    again = {**timed("cdeq", 5.0, at=3), "memory": {"train_mib": None}}
    bench(here, [], rows=[again], name="none", started="2026-01-01T12:00:00+00:00")  # nor has this one
    new = bench(here, [], rows=[again], name="new", started="2026-01-02T00:00:00+00:00")
    _, (deq, cdeq) = asked(capsys, "columns=train_s,memory_mib")
    assert [float(row["train_s"]) for row in (deq, cdeq)] == pytest.approx([0.009, 0.005])
    assert [float(row["memory_mib"]) for row in (deq, cdeq)] == [3.5, 7.0]
    main(["table", "table=mine", "--config-dir=own", "columns=train_s,memory_mib", "rows=cdeq", "publish=true"])
    assert f"MiB where that bench has none: {id} at step 3\n" in capsys.readouterr().out
    published = {path.name.partition(".")[0][-10:] for path in here.glob("results/*/*.record.json")}
    assert published == {id, new}


@pytest.mark.parametrize(
    ("settings", "words", "shown"),
    [({}, [], True), ({"dataset": {"name": "digits"}}, [], True), ({"dataset": {"name": "mnist"}}, [], False),
     ({"dataset": {"name": "digits"}}, ["dataset=mnist"], False), ({"solver": {"window": 3}}, [], False),
     ({}, ["recipe.batch=32"], True), ({}, ["recipe.batch=64"], False), ({}, ["recipe.lr=1e-2"], True)],
)  # fmt: skip
def test_times_are_of_the_settings_that_the_row_has(here, capsys, settings, words, shown):
    bench(here, [], rows=[timed("deq", 5.0)], settings=settings)
    _, (deq, _) = asked(capsys, "columns=train_s", *words)
    assert bool(deq["train_s"]) is shown


def test_times_of_another_number_of_threads_are_a_line_of_their_own(here, capsys):
    put(here, "deq", 0, environment={"alone": False})
    bench(here, [], rows=[timed("deq", 5.0)], threads=2)
    _, rows = asked(capsys, "rows=deq", "columns=train_min,train_s")
    assert [(row["machine"], row["train_min"], bool(row["train_s"])) for row in rows] == [
        ("box, 1 thread", "", False), ("box, 2 threads", "", True)]  # fmt: skip
    main(["table", "table=mine", "--config-dir=own", "rows=deq", "columns=test_acc,train_s"])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["deq", "1/2", "a", "90.00", "97.0", "±", "0.2", "not", "timed"] in said
    assert ["deq", "b", "0.00500"] in said  # nothing is missing of it there
    _, rows = asked(capsys, "rows=deq", "columns=test_acc")
    assert len(rows) == 1


def test_what_was_worked_out_or_disturbed_or_did_not_converge_is_marked(here, capsys):
    for seed in (0, 1):
        put(here, "deq", seed, environment={"alone": False})
    row = timed("deq", 60_000.0)
    row["solve"] |= {"converged_fraction": 0.2, "residual": 0.31}
    id = bench(here, [], rows=[row], alone=False)
    main(["table", "table=mine", "--config-dir=own", "rows=deq", "columns=train_min,train_s"])
    out = capsys.readouterr().out
    assert re.search(r"deq \*\s+2/2\s+~[\d.]+\s+60.0", out)
    assert "~: trainings were not alone" in out
    assert f"times of a step of 32 images: {id}, 60 rounds, not alone on its machine" in out
    assert "*: fewer than 95% of its solves converged: deq when timed to a residual of 0.31" in out
    _, (deq,) = asked(capsys, "rows=deq", "columns=train_min,train_s")
    assert (deq["train_min_n"], deq["train_min_sd"], deq["timed_converged"]) == ("1", "", "0.2")


def test_a_training_that_was_not_alone_costs_what_its_evaluations_do(here, capsys):
    folder = put(here, "deq", 0, environment={"alone": False})
    rows = [{"step": 10 * k, "epoch": k, "metrics.val_acc": acc, "solve.nfe_forward": f, "solve.nfe_backward": b}
            for k, (acc, f, b) in enumerate([(0.5, 24.0, 6.0), (0.95, 12.0, 9.0), (0.95, 12.0, 6.0)], 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = timed("deq", 10_000.0)  # of 12 evaluations forward, and 6 backward
    row["timing"]["forward_ms"] = {"median": 4_000.0, "n": 60}
    bench(here, [], rows=[row])
    _, (deq,) = asked(capsys, "rows=deq", "columns=train_min,target_s")
    assert float(deq["target_s"]) == pytest.approx(10 * (10 + 4) + 10 * (10 + 2.5) + 10 * 10)  # two epochs to be sure
    assert float(deq["train_min"]) == pytest.approx((140 + 125 + 100) / 60)
    more = timed("deq", 50_000.0, at=0)
    more["solve"] |= {"nfe_forward": 25.0}
    more["timing"]["forward_ms"] = {"median": 25_000.0, "n": 60}
    bench(here, [], rows=[more, {**row, "at": 30}], name="twice", started="2026-06-01T00:00:00+00:00")
    _, (deq,) = asked(capsys, "rows=deq", "columns=train_min,target_s")
    assert float(deq["train_min"]) == pytest.approx((490 + 125 + 100) / 60)  # the first epoch was as that point is
    del row["timing"]["forward_ms"], row["timing"]["backward_ms"]  # nothing to tell them apart by
    bench(here, [], rows=[{**row, "at": 30}], name="plain", started="2027-01-01T00:00:00+00:00")
    _, (deq,) = asked(capsys, "rows=deq", "columns=train_min,target_s")
    assert float(deq["train_min"]) == pytest.approx(300 / 60)


@pytest.mark.parametrize(("solve", "said"), [
    ({"converged_fraction": 0.2}, "in training with 1 of 2 seeds (20%)"),
    ({"test": {"converged_fraction": 0.9496}}, "at test with 1 of 2 seeds (94.9%)"),  # not 95%
])
def test_trainings_whose_solves_did_not_converge_are_marked_in_a_table_without_times(here, capsys, solve, said):
    put(here, "deq", 0)
    folder = put(here, "deq", 1)
    rec = record.read_record(folder)
    rec["solve"] |= solve
    record.write_record(folder, rec)
    put(here, "cdeq", 0)
    main(["table", "table=mine", "--config-dir=own", "columns=test_acc"])
    out = capsys.readouterr().out
    assert "deq *  2/2" in out
    assert "cdeq *" not in out
    assert f"*: fewer than 95% of its solves converged: deq {said}\n" in out


def test_a_bench_of_few_rounds_takes_no_fuller_ones_place(here, capsys):
    bench(here, [], rows=[timed("deq", 5.0)])
    few = timed("deq", 7.0)
    few["timing"] = {name: {**times, "n": 3} for name, times in few["timing"].items()}
    bench(here, [], rows=[few], name="few", status="interrupted", started="2027-01-01T00:00:00+00:00")
    _, (deq,) = asked(capsys, "rows=deq", "columns=train_s")
    assert float(deq["train_s"]) == pytest.approx(5e-3)


def test_what_other_numerics_trained_fills_no_cell(here, capsys, monkeypatch):
    put(here, "deq", 0)
    assert asked(capsys)[1][0]["n"] == "1"
    monkeypatch.setattr(record, "NUMERICS", record.NUMERICS + 1)
    assert asked(capsys)[1][0]["n"] == "0"
    main(["table", "table=mine", "--config-dir=own", "run_missing=true", "plan=true"])
    assert "4 trainings" in capsys.readouterr().out.replace("4 jobs", "4 trainings")


def test_the_same_training_on_two_machines_is_two_records_to_publish(here, capsys):
    for box in ("box", "slow box"):
        put(here, "deq", 0, folder=f"runs/{box}", environment={"hardware": box})
    main(["table", "table=mine", "--config-dir=own", "publish=true", "records=runs/box,runs/slow box"])
    assert len([*here.glob("results/*/deq-*.record.json")]) == 2


@pytest.mark.parametrize(("mean", "sd", "said"), [(999.7, 3.2, "1000 ± 3"), (999.4, 3.2, "999 ± 3"),
                                                  (12.345, 0.5, "12.3 ± 0.5"), (1234.0, None, "1234")])  # fmt: skip
def test_three_significant_digits_and_as_many_decimals_of_their_sd(mean, sd, said):
    assert columns.spelled(mean, sd, None) == said


def test_on_a_narrow_terminal_a_column_goes_with_the_papers(here, capsys, monkeypatch):
    put(here, "deq", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width, left in ((200, 2), (45, 1)):
        monkeypatch.setenv("COLUMNS", str(width))
        main(["table", "table=mine", "--config-dir=own"])
        head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" model"))
        assert head.count("paper") == left
        assert "test acc %" in head
        assert len(head) <= width


def test_published_records_fill_the_table_without_the_runs(here, capsys):
    path = put(here, "deq", 0)
    run = Run(path.name, record.read_record(path), "done", path)
    publish([run], here / "results")
    [copied] = here.glob("results/*/deq-*.metrics.jsonl")
    assert len(copied.read_text().splitlines()) == 4  # the epochs
    id = bench(here, [("R1", "neural_ode", "cdeq", "train", 2.5, 2.4, 2.6)])
    folder = here / f"runs/bench-{id}"
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    publish([Run(folder.name, record.read_record(folder), "done", folder)], here / "results")
    [copied] = here.glob("results/*/bench-*.metrics.jsonl")
    assert copied.read_text() == (folder / "metrics.jsonl").read_text()  # the rounds
    capsys.readouterr()
    _, (with_runs, _) = asked(capsys)
    _, (without, _) = asked(capsys, "records=results")
    assert without == with_runs
    assert float(without["train_min"]) == pytest.approx(16 / 60)  # epochs went along


# ------------------------------------------------------------------------------------------------------------ claims


def found(*intervals, measure="train", verdict="faster", caveats=(), table="t", n=60, command="bench"):
    """Ratios of one record, by (low, high)."""
    ratios = [{"measure": measure, "value": (low + high) / 2, "low": low, "high": high, "verdict": verdict, "n": n,
               "caveats": list(caveats), "numerator": "a", "denominator": "b"} for low, high in intervals]  # fmt: skip
    run = Run("x", {"command": command, "run_id": "abc"}, "done", Path())
    return [verdicts.Found(table, "sound", "box", None, ratio, run) for ratio in ratios]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [(found((2.1, 2.5), (1.8, 2.0)), "holds on t"),
     (found((2.1, 2.5), (1.1, 1.9)), "partly on t: above 1, 1 of 2 reach 2×"),
     (found((1.1, 1.9)), "partly on t: above 1, none reaches 2×"),
     (found((2.1, 2.5), (0.8, 1.2)), "partly on t: 1 of 2 above 1"),
     (found((0.8, 1.2)), "fails on t"), (found((0.5, 0.8)), "fails on t"),
     (found((0.9, 1.9), caveats=[WIDE]), "fails on t"),  # twice as fast it is not
     (found((0.9, 2.7), caveats=[WIDE]), "not testable here "),
     (found((0.9, 2.7), caveats=[WIDE]) + found((2.1, 2.5), table="u"), "holds on u alone"),
     (found((1.1, 1.9)) + found((3, 4), table="u", caveats=["cdeq not converged"]),
      "partly on t alone: above 1, none reaches 2×"),
     (found((2.1, 2.5)) + found((3, 4), table="u"), "holds on t, u"),
     ([], "not testable here "), (found((2.1, 2.5), caveats=["cdeq not converged"]), "not testable here "),
     (found((2.1, 2.5), verdict="too few rounds"), "not testable here "),
     (found((2.5, 2.5), measure="memory", n=1), "not testable here "),  # it varies from step to step
     (found((2.1, 2.5), measure="errors", command="bench"), "not testable here "),  # along training
     (found((2.1, 2.5), measure="errors", command="compare"), "holds on t"),
     (found((2.1, 2.5), measure="errors", command="compare", caveats=[CUT]), "not testable here "),
     (found((2.1, 2.5), measure="memory", n=3), "holds on t"),
     (found((0.0, 0.0), measure="logits", verdict="equal"), "holds on t"),
     (found((1.0, 1.0), measure="logits", verdict="not equal"), "fails on t")],
)  # fmt: skip
def test_a_word_for_a_claim_of_twice_as_fast_and_what_it_rests_on(ratios, said):
    assert " ".join(verdicts.verdict({"least": 2.0}, ratios)) == said


def test_a_claim_of_likeness_is_refuted_by_what_is_below_one_alone():
    pairs = (0.4, 9), (2, 9), (0.2, 0.7)
    words = [verdicts.verdict({"equal": True}, found(pair, measure="spread"))[0] for pair in pairs]
    assert words == ["holds", "holds", "fails"]
    wide = found(pairs[0], measure="spread", caveats=[WIDE])
    assert verdicts.verdict({"equal": True}, wide)[0] == "not testable here"
    both = verdicts.verdict({"equal": True}, found(pairs[0], pairs[2], measure="spread"))
    assert both == ("partly", "on t: 1 of 2 not below 1")


def test_claims_are_of_the_latest_bench_of_those_furthest_along_training(here, capsys):
    r1 = ("R1", "neural_ode", "cdeq", "train")
    bench(here, [(*r1, 8.0, 7.9, 8.1, {"at": 500})], table="mdeq_fashion", name="older",
          started="2025-01-01T00:00:00+00:00")  # fmt: skip
    bench(here, [(*r1, 9.0, 8.9, 9.1)], table="mdeq_fashion", name="old", started="2025-01-01T00:00:00+00:00")
    id = bench(here, [(*r1, 1.1, 1.0, 1.2, {"at": 0}), (*r1, 2.5, 2.4, 2.6, {"at": 500})], table="mdeq_fashion")
    bench(here, [(*r1, 7.0, 6.0, 8.0, {"at": 500})], table="mdeq_fashion", protocol="faithful", name="theirs",
          started="2025-01-01T00:00:00+00:00")  # fmt: skip
    bench(here, [(*r1, 3.0, 2.0, 4.0, {"at": 100})], table="mdeq_fashion", protocol="faithful", name="newer")
    r7 = [("R7", "cdeq", "skip_cdeq", measure, 2.0, 1.9, 2.1) for measure in ("predict", "train")]
    skip = bench(here, [*r7, ("R7", "cdeq", "skip_reg_cdeq", "train", 3.0, 2.9, 3.1)], table="cdeq_mnist", name="skip")
    bench(here, [(*r1, 7.0, 6.0, 8.0)], table=None, name="free")
    shy = {"caveats": ["cdeq not converged"]}
    bench(here, [(*r1, 9.0, 8.0, 10.0, shy)], table="cdeq_cifar10_large", name="shy")
    bench(here, [("R4", "cdeq", "skip_cdeq", "train", 7.0, 6.0, 8.0)], table="cdeq_mnist", name="dense")  # is R7's
    fresh = bench(here, [(*r1, 1.5, 1.4, 1.6, {"at": 0})], table="cdeq_cifar10_small", name="fresh", hardware="another")
    bench(here, [(*r1, 1.3, 1.2, 1.4, {"at": 400})], table="mdeq_fashion", name="behind", hardware="slow box")
    bench(here, [(*r1, 2.2, 2.1, 2.3, {"at": 500})], table="mdeq_fashion", name="level", hardware="fast box")
    few = {"at": 900, "verdict": "too few rounds"}
    bench(here, [(*r1, 5.0, 4.9, 5.1, few)], table="mdeq_fashion", name="hasty", hardware="another")
    _, rows = asked(capsys, table="claims")
    told = [row for row in rows if row["id"] == "R1"]
    assert [(r["protocol"], r["table"], r["at"], float(r["value"])) for r in told] == [
        ("sound", "cdeq_cifar10_small", "0", 1.5), ("sound", "mdeq_fashion", "500", 2.5),
        ("sound", "mdeq_fashion", "500", 2.2), ("sound", "cdeq_cifar10_large", "", 9.0),
        ("faithful", "mdeq_fashion", "500", 7.0)]  # fmt: skip
    assert (told[1]["verdict"], told[1]["record"]) == ("partly", id)
    assert {row["verdict"] for row in rows if row["id"] == "H1"} == {"not testable here"}
    main(["table", "--config-dir=own"])
    out = " ".join(capsys.readouterr().out.split())
    assert "takes less memory than they do not run; implicit-bench bench table=homo_ode measures it" in out
    assert f"2.50× [2.40, 2.60] by {id}, 2.20×" in out
    assert f"sound neural_ode / cdeq train 1.50× [1.40, 1.60] by {fresh} on cdeq_cifar10_small at step 0;" in out
    assert "not converged 9.00× faithful neural_ode / cdeq train 7.00×" in out
    for measure in ("predict", "train"):
        assert f"cdeq / skip_cdeq {measure} 2.00× [1.90, 2.10] by {skip} on cdeq_mnist" in out
    assert f"cdeq / skip_reg_cdeq train 3.00× [2.90, 3.10] by {skip} on cdeq_mnist" in out
    assert "free" not in out
    assert "cdeq / skip_cdeq train 7.00×" not in out


def test_claims_are_of_no_bench_with_other_settings_or_fewer_rounds_and_of_each_count_of_threads(here, capsys):
    r1, late = ("R1", "neural_ode", "cdeq", "train"), "2027-01-01T00:00:00+00:00"
    rows = [timed("cdeq", 1.0), timed("neural_ode", 2.0)]
    asked_for = config.compose("train", ["experiment=cdeq_mnist", "model=cdeq", "solver=tsit5"]).config
    settings = {key: asked_for[key] for key in cells.STEP}
    sure = bench(here, [(*r1, 1.5, 1.4, 1.6)], table="cdeq_mnist", rows=rows, settings=settings)
    loose = {**settings, "stop": {**settings["stop"], "tol": 0.5}}
    bench(here, [(*r1, 3.0, 2.9, 3.1)], table="cdeq_mnist", name="loose", started=late, rows=rows, settings=loose)
    few = {"verdict": "too few rounds", "n": 3}
    bench(here, [(*r1, 4.0, 2.9, 5.1, few)], table="cdeq_mnist", name="few", started=late, status="interrupted",
          rows=rows, settings=settings)  # fmt: skip
    two = bench(here, [(*r1, 1.7, 1.6, 1.8)], table="cdeq_mnist", name="two", threads=2, rows=rows, settings=settings)
    _, rows = asked(capsys, table="claims")
    told = [(row["record"], row["hardware"]) for row in rows if row["id"] == "R1"]
    assert sorted(told) == sorted([(sure, "box, 1 thread"), (two, "box, 2 threads")])


def test_in_brief_what_decides_is_told_whole_and_the_rest_by_its_span():
    shy = [ratio for table, pair in (("u", (3, 4)), ("w", (0.2, 0.4)), ("x", (1, 2)))
           for ratio in found(pair, table=table, caveats=["cdeq not converged"])]  # fmt: skip
    whole = found((2.1, 2.5)) + found((1.9, 2.1), table="v") + found((2.0, 2.2))
    told = "2.30× [2.10, 2.50] by abc, 2.10× [2.00, 2.20] by abc on t; 2.00× [1.90, 2.10] by abc on v"
    assert verdicts.brief(whole + shy) == [f"a / b train {told}; not converged 0.30–3.50×"]
    assert verdicts.brief(whole + shy, whole=False) == ["a / b train 2.00–2.30×; not converged 0.30–3.50×"]
    hasty = found((1, 3), measure="backward", verdict="too few rounds")
    assert verdicts.brief(whole[:1] + hasty, whole=False) == ["a / b train 2.30×", "a / b backward undecided 2.00×"]
    assert verdicts.brief([]) == []
    equal = found((0.0, 0.0), measure="logits", verdict="equal")
    assert verdicts.brief(equal, whole=False) == ["a / b logits equal by abc on t"]  # no multiple of anything
    both = found((1.9, 2.1), measure="predict") + found((1.9, 2.1))
    assert verdicts.told(both) == ["t (abc): a / b predict 2.00× [1.90, 2.10], train 2.00× [1.90, 2.10]"]


@pytest.mark.parametrize(("words", "word"), [([], "holds"), (["recipe.epochs=1"], "not testable here"),
                                             (["network.width=16"], "not testable here")])  # fmt: skip
def test_a_comparison_of_whole_trainings_tells_of_their_errors_and_of_no_time(here, capsys, words, word):
    words = ["experiment=homo_mnist", "network=homo_conv", *words]
    labels = {"data": {"name": "mnist"}}
    for seed, (a, b) in enumerate([(0.8, 0.95), (0.8, 0.94), (0.79, 0.96)]):
        put(here, "anode", seed, *words, metrics={"val_acc": 0.9, "test_acc": a}, converged=None, **labels)
        put(here, "homo_ode", seed, *words, metrics={"val_acc": 0.9, "test_acc": b}, converged=None, **labels)
    assert main(["compare", "base=anode", "against=homo_ode", "logger=none"]) == 0
    [folder] = here.glob("runs/compare-*")
    capsys.readouterr()
    _, rows = asked(capsys, table="claims")
    [h1] = (row for row in rows if row["id"] == "H1")
    assert (h1["record"], h1["measure"], h1["verdict"]) == (folder.name[-10:], "errors", word)
    assert float(h1["value"]) == pytest.approx((0.2**2 * 0.21 / (0.05 * 0.06 * 0.04)) ** (1 / 3))
    assert main(["report"]) == 0  # which has the machines of all
    capsys.readouterr()
    rec = record.read_record(folder)
    del rec["config"]["gpu"]  # as it was once
    record.write_record(folder, rec)
    assert asked(capsys, table="claims")[1] == rows


def test_one_reading_of_memory_is_told_only_where_there_are_no_more(here, capsys):
    h2 = ("H2", "neural_ode", "homo_ode", "memory")
    bench(here, [(*h2, 1.5, 1.5, 1.5, {"n": 1})], table="homo_ode", name="old", hardware="slow box")
    _, rows = asked(capsys, table="claims")
    assert [(r["value"], r["verdict"]) for r in rows if r["id"] == "H2"] == [("1.5", "not testable here")]
    bench(here, [(*h2, 1.2, 1.1, 1.3, {"n": 3})], table="homo_ode", name="new")
    _, rows = asked(capsys, table="claims")
    assert [(r["value"], r["verdict"]) for r in rows if r["id"] == "H2"] == [("1.2", "holds")]


def test_a_comparison_of_times_decides_no_claim(here, capsys):
    for model in ("neural_ode", "cdeq"):
        put(here, model, 0, experiment="mdeq_fashion", converged=None)
    assert main(["compare", "base=neural_ode", "against=cdeq", "logger=none"]) == 0
    capsys.readouterr()
    _, rows = asked(capsys, table="claims")
    assert {row["record"] for row in rows} == {""}
    assert asked(capsys, table="cdeq_fig1")[0] == 0


def test_every_claim_of_the_file_is_one_that_ratios_have():
    from implicit_bench.bench import claims

    known = {claim.id for claim in claims.CLAIMS}
    for line in papers.table("claims").lines:
        assert line.get("ratios", line["id"] == "R8" and []) is not False
        assert {*line.get("ratios", ())} <= known


def test_a_bar_is_the_time_over_the_vanilla_rows_and_a_slip_is_told(here, capsys):
    bench(here, [("R4", "cdeq", "skip_cdeq", "train", 1.25, 1.0, 2.0), ("R1", "neural_ode", "cdeq", "train", 3, 2, 4)],
          table="cdeq_cifar10_small")  # fmt: skip
    _, rows = asked(capsys, table="cdeq_fig1")
    skip, _, ode, large, *_ = rows
    assert [float(skip[k]) for k in ("value", "low", "high")] == [0.8, 0.5, 1.0]
    assert [float(ode[k]) for k in ("value", "low", "high")] == [3, 2, 4]
    for name, box, caveats in (("sure", "box", []), ("shy", "slow box", ["cdeq not converged"])):
        bench(here, [("R4", "cdeq", "skip_cdeq", "train", 2 + len(caveats), 1.9, 3.1, {"at": 5, "caveats": caveats})],
              table="cdeq_cifar10_small", name=name, hardware=box)  # fmt: skip
    _, (skip, *_) = asked(capsys, table="cdeq_fig1")
    assert float(skip["value"]) == 0.5  # of solves that converged, where there are some
    assert (skip["the bar is"], large["the bar is"]) == ("", "lower by .200")
    assert sum(row["the bar is"] != "" for row in rows) == 4


def test_no_format_has_an_interval_of_too_few_rounds(here, capsys):
    bench(here, [("R4", "cdeq", "skip_cdeq", "train", 2.0, 1.9, 2.1, {"verdict": "too few rounds"}),
                 ("R1", "neural_ode", "cdeq", "train", 2.0, 1.9, 2.1)], table="cdeq_cifar10_small")  # fmt: skip
    _, (skip, _, ode, *_) = asked(capsys, table="cdeq_fig1")
    assert [(row["value"], row["low"]) for row in (skip, ode)] == [("0.5", ""), ("2.0", "1.9")]
    _, rows = asked(capsys, table="claims")
    assert [(row["low"], row["high"]) for row in rows if row["record"]] == [("1.9", "2.1"), ("", "")]


def test_the_bars_tables_are_the_tables_own():
    for line in papers.table("cdeq_fig1").lines:
        rows = papers.table(line["of"]).rows
        cell = "train_s" if line["measure"] == "training" else "backward_s"
        assert rows[line["row"]].cell(cell) / rows["cdeq"].cell(cell) == pytest.approx(line["table"], abs=6e-4)


def test_the_board_is_in_order_and_leaves_out_what_nobody_read(here, capsys):
    _, rows = asked(capsys, table="leaderboard_cifar10")
    accs = [float(row["acc"]) for row in rows if row["acc"]]
    assert accs == sorted(accs, reverse=True)
    homo = [row for row in rows if row["model"].startswith("HomoODE")]
    assert [row["acc"] for row in homo] == ["", ""]
    assert all(row["source"] for row in rows)


def test_ours_stand_among_the_published(here, capsys):
    (here / "own/table/board.yaml").write_text(
        "title: Board\nkind: board\nlines:\n  - {model: theirs, acc: 93.0, source: them}\n"
        "  - {model: best, acc: 99.0, source: them}\n  - {model: ours, table: mine, row: deq}\n"
    )
    for seed, acc in ((0, 0.95), (1, 0.97)):
        put(here, "deq", seed, metrics={"test_acc": acc})
    _, rows = asked(capsys, table="board")
    assert [row["model"] for row in rows] == ["best", "ours", "theirs"]
    assert (float(rows[1]["acc"]), rows[1]["n"], rows[1]["source"]) == (pytest.approx(96), "2", "here")


def test_published_cells_are_spelled_as_the_paper_has_them():
    theirs = {"test_acc": [0.98070, 0.0008], "nfe": [4.001, 0.0], "train_min": 5.197, "params": 138_000}
    line = cells.Line("deq", papers.Row(published=theirs))
    assert [columns.published(line, c) for c in ("test_acc", "nfe", "train_min", "params", "val_acc")] == [
        "98.07 ± 0.08", "4.001 ± 0.000", "5.197", "138,000", ""]  # fmt: skip
    assert str(columns.measured(replace(line, timed=None), "train_s")) == "not timed"


def test_a_table_cites_its_methods_and_no_others(here, capsys):
    main(["table", "table=mine", "--config-dir=own", "out=tables", "rows=cdeq", "dataset=mnist"])
    keys = re.findall(r"^@\w+\{(\w+),", (here / "tables/mine.bib").read_text(), re.M)
    assert {"hairer1993solving", "saad1986gmres", "pal2023continuous", "lecun1998gradient"} <= {*keys}
    assert not {"anderson1965iterative", "ding2023two", "xiao2017fashion"} & {*keys}


def test_every_reference_is_about_something_that_there_is():
    entries = (files("implicit_bench.table") / "refs.bib").read_text()
    words = {w for line in re.findall(r"keywords = \{([^}]*)\}", entries) for w in line.split(", ")}
    texts = [path.read_text() for group in (*GROUPS, "dataset") for path in schema.files(group).values()]
    known = {w for text in texts for w in re.findall(r"(?:_target_: [\w.]+\.|^name: )(\w+)", text, re.M)}
    assert words <= known
    assert entries.count("\n@") == entries.count("keywords =")


# ------------------------------------------------------------------------------------------------------------ report


class Page(HTMLParser):
    """What a browser would have to fetch, the pictures, headings and rows of a page."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.pictures, self.rows, self.stack = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        for key in ("src", "href"):
            if (url := found.get(key)) and not url.startswith(("data:", "#")):
                self.fetched.append(url)
        if tag == "img":
            self.pictures.append(base64.b64decode(found["src"].partition("base64,")[2]).decode())
            assert found["alt"]
        self.rows += tag == "tr"


def test_a_report_is_one_page_that_fetches_nothing_and_has_what_was_measured(here, capsys):
    for seed in (0, 1):
        put(here, "cdeq", seed)
        put(here, "neural_ode", seed, converged=None)
    id = bench(here, [("R1", "neural_ode", "cdeq", "train", 2.5, 2.4, 2.6)], table="mdeq_fashion",
               rows=[timed("cdeq", 10.0), timed("neural_ode", 25.0)])  # fmt: skip
    assert main(["report"]) == 0
    text = (here / "report/report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert f"mdeq_fashion ({id}): neural_ode / cdeq train 2.50× [2.40, 2.60]" in text
    assert text.count("every ratio, also") == 1  # unfolds where there are any
    assert 'class="holds"' in text
    assert len(page.pictures) == 3  # speed-ups, memory, accuracy against time
    assert all(p.startswith("<?xml") and "<svg" in p for p in page.pictures)
    names = {path.name for path in (here / "report/figures").iterdir()}
    amounts = "memory-mdeq_fashion-sound-box_1_thread"
    for name in ("speedup-mdeq_fashion-sound-box_1_thread", amounts, "accuracy-digits_sound_box"):
        assert {f"{name}.svg", f"{name}.png", f"{name}.pdf", f"{name}-narrow.pdf"} <= names
    widths = [float(re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+)", (here / f"report/figures/{name}").read_bytes())[1])
              for name in (f"{amounts}{narrow}.pdf" for narrow in ("", "-narrow"))]  # fmt: skip
    assert widths == [6.75 * 72, 3.25 * 72]
    svgs = {p.name: p.read_bytes() for p in (here / "report/figures").glob("*.svg")}
    assert main(["report", "out=again"]) == 0
    assert {p.name: p.read_bytes() for p in (here / "again/figures").glob("*.svg")} == svgs
    assert (here / "again/report.html").read_text() == text


def test_the_report_has_curves_of_what_did_not_converge_and_tells_settings_apart(here):
    for words in ([], ["recipe.lr=0.1"]):
        folder = put(here, "cdeq", 0, *words, converged=0.0)
        rows = [{"step": 10 * k, "epoch": k, "solve.residual": 0.5 / k} for k in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [lines] = _trainings(cells.read([here / "runs"]), []).values()
    assert sorted(line.label for line in lines) == sorted(f"cdeq {path.name[-10:]}" for path in here.glob("runs/*"))
    assert [_curves(line, "residual") for line in lines] == [[([1, 2], [0.5, 0.25])]] * 2


def test_bars_of_too_few_rounds_have_no_interval(here):
    few = {"verdict": "too few rounds", "at": None}
    for name, more in (("few", few), ("many", {"at": None})):
        bench(here, [("R1", "neural_ode", "cdeq", "train", 2.5, 2.4, 2.6, more)], name=name)
    [hasty, sure] = sorted(here.glob("runs/*/record.json"))
    bars = [_bars(Run("x", record.read_record(path), "done", path.parent), 0)[0][1:4] for path in (hasty, sure)]
    assert bars == [(2.5, 2.5, 2.5), (2.5, 2.4, 2.6)]


def test_a_run_that_was_not_alone_has_no_time_in_the_report(here, capsys):
    put(here, "cdeq", 0, environment={"alone": False})
    assert main(["report"]) == 0
    assert Page((here / "report/report.html").read_text()).pictures == []


def test_what_an_eval_saw_step_by_step_is_drawn(here, capsys):
    path = put(here, "cdeq", 0)
    (path / "eval").mkdir()
    (path / "eval/test.json").write_text(json.dumps({"residual_by_step": {"vcab3": [1.0, 0.1, 0.01]}}))
    assert main(["report"]) == 0
    assert (here / f"report/figures/steps-{path.name}.svg").exists()


def test_wandb_has_the_table_and_the_page(here, capsys, monkeypatch):
    """Offline, each in a process of its own, read back by wandb itself."""
    put(here, "deq", 0)
    for words in (["table", "table=mine", "--config-dir=own"], ["report"]):
        done = forked.run([sys.executable, "-m", "implicit_bench", *words, "logger=wandb"])
        assert done.returncode == 0, done.stderr
        assert "W&B offline" in done.stderr
        (folder,) = here.glob(f"runs/{words[0]}-*")
        latest = folder / "wandb/latest-run"
        (begun,) = [run for line in inspect(latest).splitlines() if (run := json.loads(line).get("run"))]
        assert begun["job_type"] == words[0]
        media = [path.read_text() for path in latest.rglob("media/**/*") if path.is_file()]
        assert any(("97.0 ± 0.2" if words[0] == "table" else "What was measured") in text for text in media)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [([], "there is nothing finished to report on in runs and results"), (["out"], "report takes no 'out'"),
     (["records=nowhere"], "no folder nowhere to read records from"), (["logger=tensorboard"], "logger='tensorboard'")],
)  # fmt: skip
def test_a_report_of_nothing_is_one_sentence_and_writes_nothing(here, capsys, words, sentence):
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (here / "report").exists()


def test_a_labels_signs_are_no_grammar_and_logger_and_paths_are_the_trainings_too(here, capsys):
    (here / "own/table/signs.yaml").write_text(
        "seeds: {sound: [0]}\ncolumns: [test_acc, train_s]\nwords: [recipe.max_steps=2, gpu.threads=1]\n"
        "rows: {'deq (anderson)': {words: [model=deq, solver=anderson]}, deq: {words: [model=deq]}}\n")
    words = ["table=signs", "--config-dir=own", "paths.runs=mine", "logger=none"]
    assert main(["table", *words, "run_missing=true", "time=20s"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"deq \(anderson\)( \*)? +1/1", out)
    assert "not timed" not in out
    assert not [*here.glob("*/*/wandb")]
    assert {path.parts[-3] for path in here.rglob("record.json")} == {"mine"}
