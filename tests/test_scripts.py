import json
import os
import subprocess
import sys
from pathlib import Path

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
