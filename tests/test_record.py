"""Identity, run folders, record.json and metrics.jsonl."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_bench import record
from implicit_bench.jsonl import Jsonl, read_jsonl
from implicit_bench.record import RecordError, read_record, run_id, write_record

CONFIG = {
    "model": {"name": "deq"},
    "solver": {"_target_": "implicit_bench.solvers.Anderson", "window": 5, "ridge": 1e-6},
    "stop": {"tol": 1e-3, "max_steps": 50},
    "gpu": {"device": "cpu", "threads": 2},
    "seed": 0,
}
NAMES = st.text("abcdefgh", min_size=1, max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("abc .:\"'{", max_size=4)
CONFIGS = st.dictionaries(
    NAMES, st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
)


def changed(**values):
    return {**CONFIG, **values}


def make_run(runs, name, *, started="2026-01-01T00:00:00.000+00:00", config=CONFIG, **fields):
    write_record(runs / name, {**record.new_record("train", config, **fields), "started_at": started})
    return runs / name


# identity


def test_a_known_config_keeps_its_id():
    """Committed records are found by these: a change here orphans every one of them."""
    solver = '"solver":{"_target_":"implicit_bench.solvers.Anderson","ridge":1e-06,"window":5}'
    rest = f'"seed":0,{solver},"stop":{{"max_steps":50,"tol":0.001}}'
    text = f'[3,{{"gpu":{{"device":"cpu","threads":2}},{rest}}}]'
    assert run_id(CONFIG) == hashlib.sha256(text.encode()).hexdigest()[:10] == "ea5e7ce2ef"
    assert record.cell_id(CONFIG) == hashlib.sha256(f"[3,{{{rest}}}]".encode()).hexdigest()[:10] == "5bb06db767"


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(CONFIGS)
@settings(max_examples=200, deadline=None)
def test_id_ignores_key_order_and_survives_the_record_file(config):
    assert run_id(reordered(config)) == run_id(config)
    written = json.loads(json.dumps(record.plain(config, record._spelled), allow_nan=False))
    assert run_id(written) == run_id(config)


@pytest.mark.parametrize("label", sorted(record.LABELS))
def test_labels_are_no_part_of_the_id(label):
    assert run_id(changed(**{label: {"name": "another"}})) == run_id(CONFIG)
    deeper = changed(stop={**CONFIG["stop"], label: 1})  # only at the top
    assert run_id(deeper) != run_id(CONFIG)


def test_the_labels_are_those_of_the_design():
    assert {"model", "experiment", "protocol", "length", "logger", "paths", "force", "hydra", "progress",
            "loader", "allow_targets", "match", "match_to"} == record.LABELS  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        changed(seed=1),
        changed(seed=None),
        changed(seed="0"),
        changed(seed=False),
        changed(stop={"tol": 1e-3 * (1 + 1e-15), "max_steps": 50}),
        changed(stop={"tol": float("inf"), "max_steps": 50}),
        {key: value for key, value in CONFIG.items() if key != "seed"},
        changed(extra=None),
    ],
)
def test_whatever_computes_something_else_has_another_id(other):
    assert run_id(other) != run_id(CONFIG)


def test_infinity_is_not_null():
    assert len({run_id({"t1": value}) for value in (None, float("inf"), -float("inf"), float("nan"))}) == 4


def test_numbers_count_by_value():
    spelled = json.loads('{"a": 1e-3, "b": 1.0, "c": [2.50], "d": -0.0}')
    assert run_id(spelled) == run_id({"a": 0.001, "b": 1, "c": (2.5,), "d": 0})


def test_numerics_changes_every_id(monkeypatch):
    before = run_id(CONFIG), record.cell_id(CONFIG)
    monkeypatch.setattr(record, "NUMERICS", record.NUMERICS + 1)
    assert run_id(CONFIG) != before[0]
    assert record.cell_id(CONFIG) != before[1]


def test_cell_id_is_less_the_hardware():
    other = changed(gpu={"device": "cuda", "threads": 1})
    assert record.cell_id(other) == record.cell_id(CONFIG)
    assert run_id(other) != run_id(CONFIG)
    assert record.cell_id(changed(seed=1)) != record.cell_id(CONFIG)


def test_an_unresolved_config_has_no_id():
    with pytest.raises(ValueError, match=r"still holds an interpolation \(\$\{protocol.tol\}"):
        run_id(changed(stop={"tol": "${protocol.tol}"}))


# folders


def test_folder_names():
    assert record.folder_name("skip_deq", "digits", 0, "3fa9c1d20b") == "skip_deq-digits-s0-3fa9c1d20b"
    assert record.folder_name("bench", "digits", None, "3fa9c1d20b") == "bench-digits-3fa9c1d20b"
    assert "/" not in record.folder_name("mine/deq", "digits", 0, "3fa9c1d20b")


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    make_run(folder, "deq-digits-s0-3fa9c1d20b", started="2026-01-01T12:00:00.000+00:00")
    make_run(folder, "deq-digits-s1-3fb0000000", started="2026-01-01T13:00:00.000+02:00")  # 11:00 there
    make_run(folder, "skip_deq-digits-s0-77c0e25f1a", started="2026-01-01T10:00:00.000+00:00")
    (folder / ".sweeps").mkdir()
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("3fa", "deq-digits-s0-3fa9c1d20b"),
        ("3fa9c1d20b", "deq-digits-s0-3fa9c1d20b"),
        ("deq-digits-s1", "deq-digits-s1-3fb0000000"),
        ("skip", "skip_deq-digits-s0-77c0e25f1a"),
        ("last", "deq-digits-s0-3fa9c1d20b"),
    ],
)
def test_find(runs, text, name):
    assert record.find(runs, text) == runs / name


def test_find_by_path_as_the_shell_completes_it(runs):
    assert record.find("elsewhere", f"{runs}/skip_deq-digits-s0-77c0e25f1a/").name == "skip_deq-digits-s0-77c0e25f1a"


def test_an_exact_name_wins_over_a_prefix(runs):
    make_run(runs, "deq-digits-s0-3fa9c1d20b-copy")
    assert record.find(runs, "deq-digits-s0-3fa9c1d20b").name == "deq-digits-s0-3fa9c1d20b"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3f", "'3f' fits 2 runs: deq-digits-s0-3fa9c1d20b, deq-digits-s1-3fb0000000; give more letters"),
        ("77c0e25f1b", "no run '77c0e25f1b' in .*; nearest: 77c0e25f1a"),
        ("zzzz", "no run 'zzzz' in .*; implicit-bench runs lists them"),
        ("", "no run '' in .*"),
    ],
)
def test_find_refuses_in_one_sentence(runs, text, sentence):
    with pytest.raises(RecordError, match=sentence) as caught:
        record.find(runs, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["last", "3f"])
def test_find_where_there_are_no_runs(tmp_path, text):
    with pytest.raises(RecordError, match=f"no run '{text}' in .*; there are none yet"):
        record.find(tmp_path / "runs", text)


def test_a_broken_record_hides_no_other_run(runs):
    (runs / "skip_deq-digits-s0-77c0e25f1a" / "record.json").write_text("{")
    os.utime(runs / "skip_deq-digits-s0-77c0e25f1a", (0, 0))
    assert record.find(runs, "last").name == "deq-digits-s0-3fa9c1d20b"
    assert record.find(runs, "77").name == "skip_deq-digits-s0-77c0e25f1a"


def test_lookup_is_by_id_and_prefers_a_finished_run(tmp_path):
    id = run_id(CONFIG)
    assert record.lookup(tmp_path, id) is None
    renamed = make_run(tmp_path, "my favourite", status="done", started="2026-01-01T00:00:00.000+00:00")
    assert record.lookup(tmp_path, id) == renamed
    relabelled = make_run(tmp_path, f"cdeq-digits-s0-{id}", status="failed", started="2026-02-01T00:00:00.000+00:00")
    assert record.lookup(tmp_path, id) == renamed
    make_run(tmp_path, "my favourite", status="failed", started="2026-01-01T00:00:00.000+00:00")
    assert record.lookup(tmp_path, id) == relabelled
    assert record.lookup(tmp_path, "0" * 10) is None


# record.json

KEYS = [
    *("schema_version", "run_id", "attempt", "command", "status", "error", "experiment", "protocol", "length"),
    *("config", "params", "data", "steps", "epochs", "best_epoch", "metrics", "timing", "solve", "memory", "flops"),
    *("nonfinite_steps", "resumed_from", "environment", "started_at", "finished_at"),
]
SECTIONS = {
    "params": {"total", "by_part"},
    "data": {"name", "sha256", "n_train", "n_val", "n_test"},
    "metrics": {"train_loss", "val_acc", "val_loss", "test_acc", "test_loss", "start_acc"},
    "timing": {"total_s", "cold_s", "step_ms", "forward_ms", "backward_ms", "optimizer_ms", "data_ms", "predict_ms"},
    "solve": {"nfe_forward", "nfe_backward", "linear_iterations", "residual", "rhs_norm", "converged_fraction",
              "backward_converged", "status_counts"},
    "memory": {"peak_mib"},
    "flops": {"step"},
    "environment": {"hardware", "cpu", "gpu", "threads", "world_size", "allocator", "torch", "cuda", "python",
                    "versions", "git", "alone"},
}  # fmt: skip


def test_a_new_record_has_the_keys_of_the_design_in_order():
    new = record.new_record("train", CONFIG, experiment="digits", environment={"cpu": "Xeon"})
    assert list(new) == KEYS
    for section, keys in SECTIONS.items():
        assert keys <= set(new[section]), section
    assert new["experiment"] == "digits"
    assert new["environment"]["cpu"] == "Xeon"
    assert new["environment"]["alone"] is None  # sections are updated, not replaced
    assert new["run_id"] == run_id(CONFIG)
    with pytest.raises(TypeError, match="no 'enviroment'; nearest: environment"):
        record.new_record("train", CONFIG, enviroment={})


def test_records_share_no_state():
    record.new_record("train", CONFIG)["solve"]["status_counts"]["CONVERGED"] = 1
    assert record.new_record("train", CONFIG)["solve"]["status_counts"] == {}


def test_metrics_are_the_one_list():
    keys = [metric.key for metric in record.METRICS]
    assert len(set(keys)) == len(keys)
    assert all(metric.sentence.endswith(".") for metric in record.METRICS)
    assert {metric.better for metric in record.METRICS} <= {"lower", "higher", None}
    new = record.new_record("train", CONFIG)
    new["metrics"]["test_acc"] = 0.9
    new["timing"]["step_ms"] = {"median": 2.5, "p10": 2.0, "p90": 3.0, "n": 10}
    assert record.scalars(new) == {"metrics.test_acc": 0.9, "timing.step_ms": 2.5, "nonfinite_steps": 0}


def test_written_and_read_back_as_strict_json(tmp_path):
    import torch

    config = {**CONFIG, "stop": {"t1": float("inf"), "tol": None}}
    new = record.new_record("train", config)
    new["metrics"] |= {"test_loss": float("nan"), "test_acc": torch.tensor(0.5), "where": Path("a/b")}
    new["solve"]["residual"] = [1.0, -float("inf")]
    text = write_record(tmp_path / "run", new).read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back = read_record(tmp_path / "run")
    assert list(back) == KEYS
    assert back["metrics"]["test_loss"] is None
    assert back["metrics"]["test_acc"] == 0.5
    assert back["metrics"]["where"] == "a/b"
    assert back["solve"]["residual"] == [1.0, None]
    assert run_id(back["config"]) == new["run_id"]  # infinity in a config has not become null
    assert read_record(tmp_path / "run" / "record.json") == back


def test_what_json_cannot_hold_is_refused_and_the_old_record_stays(tmp_path):
    write_record(tmp_path, record.new_record("train", CONFIG, steps=1))
    with pytest.raises(TypeError, match="is a object, which JSON cannot hold"):
        write_record(tmp_path, record.new_record("train", CONFIG, error=object()))
    with pytest.raises(RecordError, match="status is one of running, done, failed, interrupted, not 'finished'"):
        write_record(tmp_path, record.new_record("train", CONFIG, status="finished"))
    assert read_record(tmp_path)["steps"] == 1


CRASH = """
import os, signal, sys
from implicit_bench import record
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
record.write_record(sys.argv[1], record.new_record("train", {}, steps=2))
"""


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_record(tmp_path, at):
    write_record(tmp_path, record.new_record("train", CONFIG, steps=1))
    killed = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), at], timeout=60)
    assert killed.returncode == -9
    assert read_record(tmp_path)["steps"] == 1
    assert [r["steps"] for r in record.records([tmp_path])] == [1]  # what the crash left is no record
    write_record(tmp_path, record.new_record("train", CONFIG, steps=3))
    assert read_record(tmp_path)["steps"] == 3


def test_an_error_while_writing_leaves_no_litter(tmp_path, monkeypatch):
    write_record(tmp_path, record.new_record("train", CONFIG, steps=1))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, record.new_record("train", CONFIG, steps=2))
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert read_record(tmp_path)["steps"] == 1


def test_the_record_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_record(tmp_path, record.new_record("train", CONFIG))
    assert order == ["fsync", "replace"]


def spoil(tmp_path, change):
    path = write_record(tmp_path, record.new_record("train", CONFIG))
    content = change(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text[: len(text) // 2], r"cannot be read \(no valid JSON: .*\); delete it and run again"),
        (lambda text: "", r"cannot be read \(no valid JSON"),
        (lambda text: b"\xff\xfe\x00", r"cannot be read \(no valid JSON"),
        (lambda text: "[1]", r"is no run record \(it lacks schema_version, run_id, attempt\); delete it and run again"),
        (lambda text: text.replace('"timing"', '"timings"'), r"is no run record \(it lacks timing\)"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2').replace('"timing"', '"x"'),
         "has schema 2, newer than 1; upgrade implicit-bench"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, change, sentence):
    path = spoil(tmp_path, change)
    with pytest.raises(RecordError, match=sentence) as caught:
        read_record(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_record_is_a_sentence_too(tmp_path):
    with pytest.raises(RecordError, match=r"record.json cannot be read \(No such file or directory\)"):
        read_record(tmp_path)


def test_records_of_folders_and_files_each_once(tmp_path):
    one = make_run(tmp_path / "runs", "one", steps=1)
    make_run(tmp_path / "runs", "two", steps=2)
    committed = tmp_path / "results" / "cpu" / "deq.record.json"
    committed.parent.mkdir(parents=True)
    committed.write_text((one / "record.json").read_text())
    (tmp_path / "results" / "cpu" / "table.json").write_text("{}")
    (one / "attempt-1.record.json").write_text((one / "record.json").read_text())  # one that force=true has followed
    found = record.records([tmp_path / "runs", one, one / "record.json", tmp_path / "results"])
    assert [r["steps"] for r in found] == [1, 2, 1]
    with pytest.raises(RecordError, match=r"no folder .*nowhere to read records from"):
        record.records([tmp_path / "nowhere"])


# metrics.jsonl


def test_rows_are_with_the_system_when_append_returns(tmp_path):
    rows = Jsonl(tmp_path / "run" / "metrics.jsonl")
    rows.append({"epoch": 1, "metrics.val_loss": float("nan")})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"epoch": 1, "metrics.val_loss": null}\n'
    rows.append({"epoch": 2})
    assert [row["epoch"] for row in read_jsonl(rows.path)] == [1, 2]
    rows.close()


@given(cut=st.integers(0, 60))
@settings(max_examples=61, deadline=None)
def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    whole = b"".join(b'{"epoch": %d, "a": 1}\n' % epoch for epoch in range(3))
    path.write_bytes(whole[:cut])
    kept = [{"epoch": epoch, "a": 1} for epoch in range(whole[:cut].count(b"\n"))]
    assert list(read_jsonl(path)) == kept  # as a reader finds it while it is being written
    rows = Jsonl(path)
    rows.append({"epoch": 9})
    rows.close()
    assert list(read_jsonl(path)) == [*kept, {"epoch": 9}]


def test_resume_drops_the_rows_after_the_checkpoint(tmp_path):
    rows = Jsonl(tmp_path / "metrics.jsonl")
    rows.append({"step": 1})
    offset = rows.offset()
    rows.append({"step": 2})
    rows.append({"step": 3})
    rows.close()
    rows = Jsonl(tmp_path / "metrics.jsonl")
    rows.truncate(offset)
    assert rows.offset() == offset
    rows.append({"step": 20})
    rows.close()
    assert [row["step"] for row in read_jsonl(rows.path)] == [1, 20]


def test_another_checkpoints_offset_is_refused(tmp_path):
    rows = Jsonl(tmp_path / "metrics.jsonl")
    rows.append({"step": 1})
    end = rows.offset()
    for offset in (end - 1, end + 1, -1):
        with pytest.raises(RecordError, match=f"no row ends at byte {offset}"):
            rows.truncate(offset)
    assert rows.offset() == end  # and never padded with zeros
    rows.truncate(0)
    assert rows.offset() == 0
    rows.close()


def test_offset_syncs_to_disk(tmp_path, monkeypatch):
    rows = Jsonl(tmp_path / "metrics.jsonl")
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    rows.append({"step": 1})
    assert synced == []  # a row must be cheap
    rows.offset()
    assert len(synced) == 1
    rows.close()


def test_a_full_disk_leaves_no_half_line(tmp_path):
    rows = Jsonl(tmp_path / "metrics.jsonl")
    rows.append({"step": 1})
    real, end = rows._file, rows.offset()

    class Full:
        def write(self, line):
            if real.tell() > end:
                raise OSError("disk full")
            return real.write(line[:5])

        def __getattr__(self, name):
            return getattr(real, name)

    rows._file = Full()
    with pytest.raises(OSError, match="disk full"):
        rows.append({"step": 2, "a": 1})
    rows._file = real
    rows.append({"step": 3})
    rows.close()
    assert [row["step"] for row in read_jsonl(rows.path)] == [1, 3]


def test_a_broken_line_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(RecordError, match=r"metrics.jsonl line 2 is no valid JSON; delete that line"):
        list(read_jsonl(path))
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_standard_library_only():
    check = "import sys; from implicit_bench import lock, record; print({'torch', 'wandb', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_an_attempt_keeps_its_number_though_the_next_was_killed(tmp_path):
    rec = record.new_record("bench", {}, status="done")
    record.write_record(tmp_path, rec)
    assert record.next_attempt(tmp_path, ["record.json"]) == 2
    assert record.next_attempt(tmp_path, ["record.json"]) == 2  # killed before it could write one
    record.write_record(tmp_path, {**rec, "attempt": 2})
    assert record.next_attempt(tmp_path, ["record.json"]) == 3
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["attempt-1.record.json", "attempt-2.record.json"]
