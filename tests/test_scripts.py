import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from implicit_bench import clock
from implicit_bench.compare.rows import Run

ROOT = Path(__file__).parent.parent


def on_gpu(out, *words):
    return run("-g", "cpu", "-T", "-o", str(out), "--", *words)


def run(*words):
    script = ["bash", str(ROOT / "scripts" / "on_gpu.sh"), "-p", sys.executable]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*script, *words], capture_output=True, text=True, env=environment, check=False)


def test_on_gpu_runs_each_command_once_and_gathers_records(tmp_path):
    good, bad = "train length=smoke gpu.threads=1", "train model=nothing"
    first = on_gpu(tmp_path, good, bad)
    assert "nearest: " in first.stdout or "no model 'nothing'" in first.stdout
    (gathered,) = (tmp_path / "results" / "cpu").iterdir()
    rec = json.loads(gathered.read_text())
    assert rec["status"] == "done"
    assert gathered.name == f"deq-digits-s0-{rec['run_id']}.record.json"
    second = on_gpu(tmp_path, good, bad)
    assert "train_length_smoke_gpu.threads_1 is done" in second.stdout.replace("=", "_")
    assert "train_model_nothing ended with 2" in second.stdout.replace("=", "_")
    assert gathered.read_text() == json.dumps(rec, indent=1) + "\n"


def test_on_gpu_without_a_gpu_says_so(tmp_path):
    ran = run("-o", str(tmp_path))
    assert ran.returncode == 1
    assert "torch sees no CUDA device" in ran.stderr


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where a script finds what it shares with another


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def choosing():
    """scripts/choosing.py as a module."""
    return module_of("choosing")


def test_every_committed_table_and_figure_is_what_the_records_say(monkeypatch, capsys):
    results = module_of("results")
    monkeypatch.setattr(sys, "argv", ["results.py"])
    assert results.main() == 0, capsys.readouterr().err


def test_what_differs_from_the_records_is_told(monkeypatch, capsys, tmp_path):
    results = module_of("results")
    (tmp_path / "results/tables").mkdir(parents=True)
    (tmp_path / "results/tables/claims.md").write_text("R1 holds\n")
    (tmp_path / "README.md").write_text("<!-- claims -->\nall hold\n<!-- /claims -->\n")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["results.py"])
    assert results.main() == 1
    assert "differs results/tables/claims.md\n" in capsys.readouterr().err
    assert (tmp_path / "results/tables/claims.md").read_text() == "R1 holds\n"
    monkeypatch.setattr(sys, "argv", ["results.py", "--write"])
    assert results.main() == 0
    monkeypatch.setattr(sys, "argv", ["results.py"])
    assert results.main() == 0
    assert "not testable here" in (tmp_path / "README.md").read_text()


def test_a_figure_is_the_same_on_another_processor_and_another_figure_is_not():
    alike = module_of("results").alike
    svg = b'<?xml?><g id="pc86f3cbe66"><path d="M 154.666803 -2 L 3 4" style="fill: #c44e52"/></g>'
    assert alike(svg, svg.replace(b"154.666803", b"154.666802").replace(b"pc86f3cbe66", b"pa5e8ce5db0"))
    for old, new in ((b"154.666803", b"154.67"), (b"-2", b"2"), (b"L 3 4", b"L 3"), (b"#c44e52", b"#c44e53")):
        assert not alike(svg, svg.replace(old, new)), new
    assert not alike(svg, None)
    assert alike(None, None)
    assert not alike(b"| 1.50 |", b"| 1.5000001 |")  # text is bytes


def test_a_benchs_ratios_are_made_anew_from_its_rounds(tmp_path):
    results = module_of("results")
    rounds = [{"step": k, "at": 5, "a": {"train": 3.0 + k % 2, "nfe": 4.0}, "b": {"train": 2.0, "nfe": 2.0}}
              for k in range(40)]  # fmt: skip
    (tmp_path / "x.metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    pair = {"at": 5, "id": "R1", "numerator": "a", "denominator": "b"}
    said = [{**pair, "measure": measure, **asdict(clock.ratio([row["a"][measure] for row in rounds], [2.0] * 40))}
            for measure in ("train", "nfe")]  # fmt: skip
    memory = {**pair, "measure": "memory", "value": 1.0, "low": 1.0, "high": 1.0, "n": 3}

    def told(ratios):
        return results.retold(Run("x", {"ratios": [*ratios, memory]}, "done", tmp_path))

    assert told(said) == (2, [])
    assert told([{**said[0], "low": said[0]["low"] * 1.001}, said[1]]) == (2, ["x: R1 a / b, train"])
    assert told([said[0], {**said[1], "n": 39}]) == (2, ["x: R1 a / b, nfe"])
    assert told([{**said[0], "at": 6}]) == (1, ["x: R1 a / b, train"])  # rounds that are not there


def test_the_page_on_faithfulness_shows_the_committed_figures():
    faithfulness = module_of("faithfulness")
    page = (ROOT / "docs" / "faithfulness.md").read_text()
    assert page == faithfulness.render(page, json.loads((ROOT / "results/faithfulness.json").read_text()))


def test_the_page_on_choosing_shows_the_committed_figures(choosing):
    page = (ROOT / "docs" / "choosing.md").read_text()
    figures = [json.loads(path.read_text()) for path in ROOT.glob("results/*/choosing.json")]
    assert page in [choosing.render(page, each) for each in figures]


def test_choosing_measures_and_writes_what_it_says(choosing, tmp_path):
    """Two steps of training: the figures mean nothing, but exact gradients are exact."""
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("how", "adjoint")))
    argv = [sys.executable, str(ROOT / "scripts" / "choosing.py"), "adjoint", "--epochs", "1", "--seeds", "1",
            "--rounds", "2", "--page", str(page), "--results", str(tmp_path), "--runs", str(tmp_path / "runs"),
            "recipe.max_steps=2", "recipe.eval_images=50"]  # fmt: skip
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/choosing.json")
    figures = json.loads(file.read_text())
    adjoints = {row["label"].strip("`"): row for row in figures["tables"]["adjoint"]}
    assert adjoints["unroll"]["error"] < 1e-4
    assert adjoints["ift, gmres"]["error"] < 0.02  # its own tolerance
    assert adjoints["phantom"]["error"] < adjoints["jfb"]["error"] < 1
    assert adjoints["jfb"]["vjps"] == 1
    assert adjoints["unroll"]["kept_kib"] > 2 * adjoints["phantom"]["kept_kib"] > 2 * adjoints["jfb"]["kept_kib"]
    assert page.read_text().count("\n| --- |") == 1
    assert choosing.render(page.read_text(), figures) == page.read_text()
