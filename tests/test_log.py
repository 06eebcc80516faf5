"""The W&B sink: real offline runs read back with wandb's own reader, failures with a stand-in for wandb."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest

from implicit_bench.log import NoSink, Wandb, choices
from implicit_bench.record import new_record

CONFIG = {
    "model": {"name": "skip_deq"},
    "solver": {"_target_": "implicit_bench.solvers.Anderson", "window": 5},
    "penalty": {"skip": {"_target_": "implicit_bench.models.Skip", "weight": 0.01}},
    "dataset": {"_target_": "implicit_bench.data.ImageData", "name": "digits"},
    "seed": 3,
}
KEY = "q" * 40
WANDB = [sys.executable, "-m", "wandb"]


def record(command="train", **fields):
    return new_record(command, CONFIG, experiment="digits_small", protocol="sound", length="full", **fields)


# real runs, one process each

RUN = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from implicit_bench.log import Wandb
from implicit_bench.record import new_record
config, folder, how = eval(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
assert "wandb" not in sys.modules
sink = Wandb()
sink.start(new_record("train", config, experiment="digits_small", protocol="sound", length="full"), folder)
started = time.perf_counter()
if how != "at once":
    sink.wait(60)
times = []
for step in range(50):
    before = time.perf_counter()
    row = {"epoch": step // 10, "metrics.train_loss": 1 / (step + 1), "solve": {"nfe_forward": step, "gone": None}}
    sink.log(row, step)
    times.append(time.perf_counter() - before)
print("logged", sorted(times)[25])
if how == "raises":
    raise RuntimeError("the run fails")
sink.summary({"metrics.test_acc": 0.9, "timing.step_ms": 2.5})
sink.table("bench.rows", ["model", "x"], [["deq", 1.0], ["explicit", "-"]])
(folder / "a.svg").write_text("<svg/>")
sink.image("speedup", folder / "a.svg")
before = time.perf_counter()
sink.finish(0)
print("started", started - began, "finished", time.perf_counter() - before, sink.state)
"""


def run(folder, how="", **environment):
    """A run in a process of its own: its stdout, stderr and seconds. (wandb leaves a temporary folder to the exit.)"""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", RUN, repr(CONFIG), str(folder), how],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == (how == "raises"), done.stderr
    return done.stdout, done.stderr, time.perf_counter() - began


def inspect(path, *options):
    """What wandb itself reads back of a run's folder, as lines of JSON."""
    done = subprocess.run([*WANDB, "leet", "inspect", *options, "--json", str(path)], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}{done.stdout[-300:]}"
    return done.stdout


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One run written with no key; the autouse fixture is per test, so the places are set here too."""
    top = tmp_path_factory.mktemp("offline")
    places = {f"WANDB_{name}_DIR": str(top / name) for name in ("CACHE", "DATA", "CONFIG")}
    out, err, _ = run(top / "run", **places, NETRC=str(top / "none"))
    return types.SimpleNamespace(folder=top / "run", out=out, err=err, latest=top / "run" / "wandb" / "latest-run")


def test_an_offline_run_has_the_conventions(offline):
    found = json.loads(inspect(offline.latest, "--summary"))
    assert found["run_id"] == record()["run_id"]
    assert found["name"] == "skip_deq-anderson-digits-s3"
    assert found["project"] == "implicit-bench"
    assert found["config"] == CONFIG
    assert (found["state"], found["exit_code"]) == ("finished", 0)
    assert set(found["tags"]) == {"model=skip_deq", "solver=anderson", "penalty=skip", "dataset=digits",
                                  "experiment=digits_small", "protocol=sound", "length=full"}  # fmt: skip
    summary = found["summary"]
    assert summary["metrics/test_acc"] == 0.9
    assert summary["timing/step_ms"] == 2.5
    assert (summary["bench/rows"]["nrows"], summary["bench/rows"]["ncols"]) == (2, 2)
    assert "speedup" in summary


def test_the_service_of_a_parent_process_elsewhere_writes_it_here(tmp_path):
    """wandb names its service in the environment, so that a command started by a user's script shares that script's."""
    here = tmp_path / "here"
    here.mkdir()
    words = [sys.executable, "-c", RUN, repr(CONFIG), "run", ""]
    parent = f"import subprocess, wandb; wandb.setup(); subprocess.run({words}, cwd={str(here)!r}, check=True)"
    subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    log = (here / "run/wandb/latest-run/logs/debug.log").read_text()
    assert "existing wandb-core service via WANDB_SERVICE" in log
    assert json.loads(inspect(here / "run/wandb/latest-run", "--summary"))["state"] == "finished"


def test_an_offline_run_has_every_row_by_step(offline):
    lines = [json.loads(line) for line in inspect(offline.latest).splitlines()]
    (begun,) = [line["run"] for line in lines if line["type"] == "run"]
    assert (begun["job_type"], begun["run_group"]) == ("train", "digits_small")
    rows = [line["history"]["item"] for line in lines if line["type"] == "history"]
    rows = [row for row in rows if "metrics/train_loss" in row]
    assert [row["step"] for row in rows] == list(range(50))
    assert [row["epoch"] for row in rows] == [step // 10 for step in range(50)]
    assert [row["solve/nfe_forward"] for row in rows] == list(range(50))
    assert rows[4]["metrics/train_loss"] == pytest.approx(0.2)
    assert "solve/gone" not in rows[0]
    axes = {m.get("name", m.get("glob_name")): m["step_metric"] for m in (x["metric"] for x in lines if "metric" in x)}
    assert axes["*"] == "step"
    assert axes["metrics/val_acc"] == "epoch"


def test_it_says_one_line_and_wandb_says_nothing(offline):
    (line,) = offline.err.splitlines()
    match = re.fullmatch(r"W&B offline \(no key found\); upload later with: implicit-bench sync (\S+)", line)
    assert match
    assert os.path.samefile(match[1], offline.folder)
    assert all(line.startswith(("logged ", "started ")) for line in offline.out.splitlines())


def test_it_stays_in_its_folder_and_tells_nothing_of_the_machine(offline):
    assert offline.latest.resolve().parent == offline.folder / "wandb"
    files = [path for path in offline.latest.resolve().rglob("*") if path.is_file()]
    assert not [path for path in files if path.name in ("requirements.txt", "wandb-metadata.json")]
    lines = [json.loads(line) for line in inspect(offline.latest).splitlines()]
    assert "environment" not in [line["type"] for line in lines]  # command line, executable, system
    (begun,) = [line["run"] for line in lines if line["type"] == "run"]
    assert "host" not in begun


def test_starting_and_logging_take_no_time_of_the_run(offline):
    """wandb takes 0.7 to 2.5 s to come up, and 0.6 ms a row: not in this thread."""
    numbers = dict(re.findall(r"(logged|started) ([\d.e-]+)", offline.out))
    assert float(numbers["started"]) < 0.5
    assert float(numbers["logged"]) < 0.3e-3


def test_rows_before_it_is_up_are_not_lost(tmp_path):
    run(tmp_path, "at once")
    rows = inspect(tmp_path / "wandb" / "latest-run").count('"metrics/train_loss"')
    assert rows == 2 * 50 + 1  # each in the history and the summary; and once in the metric's definition


def test_an_exception_without_finish_still_ends_the_run_as_failed_with_its_rows(tmp_path):
    _, err, _ = run(tmp_path, "raises")
    assert err.count("RuntimeError: the run fails") == 1
    found = json.loads(inspect(tmp_path / "wandb" / "latest-run", "--summary"))
    assert (found["state"], found["exit_code"], found["summary"]["step"]) == ("failed", 1, 49)


def test_a_key_that_cannot_be_checked_goes_offline_in_bounded_time_and_is_written_nowhere(tmp_path):
    """No network: a closed port on this machine. wandb itself tries for 10 s; the run does not wait for it."""
    _, err, seconds = run(tmp_path / "run", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    (line,) = err.splitlines()
    assert re.fullmatch(r"W&B offline \(\w*Error: .*\); upload later with: implicit-bench sync \S+", line)
    assert seconds < 40
    assert '"exit_code": 0' in inspect(tmp_path / "run" / "wandb" / "latest-run", "--summary")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_file_where_the_folder_should_be(tmp_path):
    """Root may write anywhere, so a forbidden folder is played by a file."""
    (tmp_path / "wandb").write_text("")
    _, err, _ = run(tmp_path)
    (line,) = err.splitlines()
    assert re.fullmatch(r"W&B could not start \(FileExistsError: .*\); the run goes on without it, .*", line)


def test_runs_one_after_another_in_a_process_and_no_telemetry_offline(tmp_path):
    """A sweep in one process. wandb 0.31 else starts exporters of its own with the second offline run."""
    code = """
import sys, threading
from pathlib import Path
from implicit_bench.log import Wandb
from implicit_bench.record import new_record
for seed in (0, 1, 1):
    sink = Wandb()
    sink.start(new_record("train", {"seed": seed}), Path(sys.argv[1]) / str(seed), resume=seed == 1)
    sink.log({"a": seed}, 0)
    sink.finish(0)
print([thread.name for thread in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 3
    assert "Main" in done.stdout
    assert "Otel" not in done.stdout
    assert [len(list((tmp_path / seed / "wandb").glob("offline-run-*"))) for seed in "01"] == [1, 2]


# a stand-in for wandb


class FakeRun:
    def __init__(self, fake, **identity):
        self.fake, self.identity, self.rows, self.codes, self.metrics = fake, identity, [], [], {}
        self.url, self.summary = "https://wandb.example/run", {}
        self.id, self.project = identity["id"] or os.environ.get("WANDB_RUN_ID"), identity["project"]
        self.settings = types.SimpleNamespace(sync_dir="/elsewhere/offline run")

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, row):
        if self.fake.fail_at == len(self.rows):
            self.fake.fail_at = None  # once
            raise ConnectionError("the service is\ngone")
        self.rows.append(row)

    def finish(self, code):
        if self.fake.fail_at == "finish":
            raise ConnectionError("no end")
        self.codes.append(code)


class Settings:
    model_fields = dict.fromkeys(("mode", "silent", "quiet", "console", "init_timeout"))  # an older wandb has fewer

    def __init__(self, **values):
        unknown = set(values) - set(self.model_fields)
        assert not unknown, unknown
        vars(self).update(values)


@pytest.fixture
def fake(monkeypatch):
    """A module in the place of wandb: what it is asked, and how it fails."""
    module = types.ModuleType("wandb")
    module.runs, module.prompts, module.torn_down = [], [], 0
    module.fail_at, module.login_gives, module.online_fails, module.pause = None, False, False, threading.Event()
    module.pause.set()

    def login(*, prompt):
        module.prompts.append(prompt)
        if isinstance(module.login_gives, Exception):
            raise module.login_gives
        return module.login_gives

    def init(**identity):
        module.pause.wait(20)
        module.runs.append(FakeRun(module, **identity))
        if identity["mode"] == "online" and module.online_fails:
            raise ConnectionError("no answer")
        return module.runs[-1]

    def teardown(code):
        module.torn_down += 1

    module.Settings, module.login, module.init, module.teardown = Settings, login, init, teardown
    module.setup = lambda settings: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def lines(capsys):
    """What was said on stderr; stdout is the results' and must stay empty."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def finished(sink, folder, rows=3, code=0, **start):
    sink.start(start.pop("record", record()), folder, **start)
    for step in range(rows):
        sink.log({"metrics.val_acc": step}, step)
    sink.finish(code)


def test_online_where_the_key_is_accepted(fake, tmp_path, capsys):
    fake.login_gives = True
    finished(Wandb(), tmp_path, code=130)
    (only,) = fake.runs
    assert only.identity["mode"] == "online"
    assert [row["step"] for row in only.rows] == [0, 1, 2]
    assert only.codes == [130]
    assert fake.prompts == [False]
    assert lines(capsys) == ["W&B online: https://wandb.example/run"]


@pytest.mark.parametrize("problem", [False, ValueError("wrong key"), ConnectionError("no network")])
def test_offline_where_it_is_not(fake, tmp_path, capsys, problem):
    fake.login_gives = problem
    finished(Wandb(), tmp_path)
    (only,) = fake.runs
    assert only.identity["mode"] == "offline"
    assert len(only.rows) == 3
    (line,) = lines(capsys)
    reason = f"{type(problem).__name__}: {problem}" if problem else "no key found"
    assert line == f"W&B offline ({reason}); upload later with: implicit-bench sync {tmp_path}"


def test_a_run_that_cannot_go_online_goes_offline(fake, tmp_path, capsys):
    fake.login_gives, fake.online_fails = True, True
    finished(Wandb(), tmp_path)
    assert [r.identity["mode"] for r in fake.runs] == ["online", "offline"]
    assert fake.torn_down == 1  # or the real one says that the run's id is in use
    assert fake.runs[1].codes == [0]
    assert lines(capsys)[0].startswith("W&B offline (ConnectionError: no answer); upload later with")


@pytest.mark.parametrize(
    ("mode", "environment", "asked", "modes"),
    [
        ("offline", None, 0, ["offline"]),
        ("auto", "offline", 0, ["offline"]),
        ("auto", "dryrun", 0, ["offline"]),
        ("online", "offline", 1, ["online"]),
        ("auto", "online", 1, ["online"]),
        ("auto", "disabled", 0, []),
    ],
)
def test_who_decides_the_mode(fake, tmp_path, monkeypatch, mode, environment, asked, modes):
    fake.login_gives = True
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    finished(Wandb(mode), tmp_path)
    assert len(fake.prompts) == asked
    assert [r.identity["mode"] for r in fake.runs] == modes


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="is auto, online or offline, not 'disabled'; logger=none is for no W&B"):
        Wandb("disabled")


@pytest.mark.parametrize("fail_at", [0, 2, "finish"])
def test_when_wandb_fails_the_run_goes_on(fake, tmp_path, capsys, fail_at):
    fake.fail_at = fail_at
    sink = Wandb()
    finished(sink, tmp_path, rows=5)
    (only,) = fake.runs
    assert len(only.rows) == (5 if fail_at == "finish" else fail_at)  # nothing after the failure
    assert only.codes == ([] if fail_at == "finish" else [0])  # it is still ended
    said = lines(capsys)
    assert len(said) == 2  # offline, and once what happened
    assert re.fullmatch(r"W&B failed( at the end)? \(ConnectionError: (the service is gone|no end)\); the run goes on "
                        r"without it, metrics.jsonl has every row", said[1])  # fmt: skip
    assert sink.state == "off"


def test_no_wandb_at_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises
    finished(Wandb(), tmp_path)
    assert [line.split(" (")[0] for line in lines(capsys)] == ["W&B could not start"]


def test_a_wandb_that_hangs_holds_up_neither_the_run_nor_its_end(fake, tmp_path, capsys):
    fake.pause.clear()
    sink = Wandb(init_timeout=0.2, finish_timeout=0.2)
    began = time.monotonic()
    sink.start(record(), tmp_path)
    sink.log({"a": 1}, 0)
    assert time.monotonic() - began < 0.2
    sink.wait(0.05)
    sink.finish(0)
    assert time.monotonic() - began < 2
    fake.pause.set()
    sink._thread.join(5)
    assert lines(capsys)[0].startswith("W&B has not finished in time; the run goes on without it")


def test_wait_waits_until_it_is_up(fake, tmp_path):
    fake.pause.clear()
    sink = Wandb()
    sink.start(record(), tmp_path)
    assert sink.state == "starting"
    threading.Timer(0.2, fake.pause.set).start()
    began = time.monotonic()
    sink.wait(10)
    assert 0.1 < time.monotonic() - began < 5
    assert sink.state == "offline"
    sink.finish()


@pytest.mark.parametrize("up_first", [True, False])
def test_what_is_there_to_say_stands_above_a_table_or_below_it(fake, tmp_path, capsys, up_first):
    """The W&B thread comes up when it likes."""
    sink = Wandb()
    fake.pause.clear()
    sink.start(record(), tmp_path)
    if up_first:
        fake.pause.set()
        sink.wait(10)
    sink.hold()
    print("table", file=sys.stderr)
    fake.pause.set()
    sink.wait(10)
    fake.fail_at = 0
    sink.log({"a": 1}, 0)
    print("more of it", file=sys.stderr)
    sink.finish()
    said = [line.split(" (")[0] for line in lines(capsys)]
    above = ["W&B offline"] if up_first else []
    assert said == [*above, "table", "more of it", *(["W&B offline"] if not above else []), "W&B failed"]


def test_its_thread_ends(fake, tmp_path):
    before = threading.active_count()
    finished(Wandb(), tmp_path)
    assert threading.active_count() == before


def test_rows_and_config_are_copied_when_they_are_given(fake, tmp_path):
    fake.pause.clear()
    sink, new, row, data = Wandb(), record(), {"a": 1}, [[1]]
    fake.Table = lambda names, data, **_: (names, data)
    sink.start(new, tmp_path)
    sink.log(row, 0)
    sink.table("t", ["x"], data)
    row["a"] = data[0][0] = new["config"]["seed"] = 99
    fake.pause.set()
    sink.finish()
    assert fake.runs[0].rows == [{"step": 0, "a": 1}, {"t": (["x"], [[1]])}]
    assert fake.runs[0].identity["config"] == CONFIG


def test_values_are_flat_slashed_and_plain(fake, tmp_path):
    import torch

    sink = Wandb()
    sink.start(record(), tmp_path)
    sink.log({"timing.step_ms": {"median": torch.tensor(2.0), "p10": None}, "x": torch.ones(2)}, 7)
    sink.summary({"metrics.test_acc": torch.tensor(0.5)})
    sink.finish()
    row = fake.runs[0].rows[0]
    assert {key: row[key] for key in row if key != "x"} == {"step": 7, "timing/step_ms/median": 2.0}
    assert type(row["timing/step_ms/median"]) is float
    assert fake.runs[0].summary == {"metrics/test_acc": 0.5}


@pytest.mark.parametrize(
    ("command", "attempt", "resume", "id", "resumes", "job", "name"),
    [
        ("train", 1, False, "", None, "train", "skip_deq-anderson-digits-s3"),
        ("train", 1, True, "", "allow", "train", "skip_deq-anderson-digits-s3"),
        ("train", 2, False, "", None, "train", "skip_deq-anderson-digits-s3"),  # force=true replaces
        ("bench", 1, False, "", None, "bench", "bench-digits"),
        ("bench", 3, False, "-3", None, "bench", "bench-digits"),
        ("compare", 2, False, "-2", None, "compare", "bench-digits"),
    ],
)
def test_identity(fake, tmp_path, command, attempt, resume, id, resumes, job, name):
    new = record(command, attempt=attempt)
    folder = tmp_path / f"bench-digits-{new['run_id']}"
    finished(Wandb(project="p", entity="e"), folder, record=new, resume=resume)
    got = fake.runs[0].identity
    assert got["id"] == new["run_id"] + id
    assert got["resume"] == resumes
    assert (got["job_type"], got["name"]) == (job, name)
    assert (got["group"], got["project"], got["entity"], got["dir"]) == ("digits_small", "p", "e", str(folder))


def test_a_group_of_ones_own(fake, tmp_path):
    finished(Wandb(group="mine"), tmp_path)
    assert fake.runs[0].identity["group"] == "mine"


def test_tags_fit_into_what_wandb_takes(fake, tmp_path):
    new = record()
    new["config"]["network"] = {"name": "n" * 100}
    new["experiment"] = "none"
    finished(Wandb(), tmp_path, record=new)
    tags = fake.runs[0].identity["tags"]
    assert all(1 <= len(tag) <= 64 for tag in tags)
    assert not [tag for tag in tags if "experiment" in tag]


def test_choices():
    assert choices(CONFIG) == {"model": "skip_deq", "solver": "anderson", "penalty": "skip", "dataset": "digits"}
    assert choices({"penalty": {}, "model": {}, "seed": 0}) == {}


def test_a_forked_process_leaves_the_run_alone(fake, tmp_path, monkeypatch):
    sink = Wandb()
    sink.start(record(), tmp_path)
    sink.wait(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        sink.log({"a": 1}, 0)
        sink.finish(1)
    sink.finish(0)
    assert (fake.runs[0].rows, fake.runs[0].codes) == ([], [0])


def test_finish_twice_and_use_before_start_are_nothing(fake, tmp_path):
    sink = Wandb()
    sink.log({"a": 1}, 0)
    sink.finish(1)
    finished(sink, tmp_path)
    sink.finish(1)
    sink.log({"a": 1}, 9)
    assert fake.runs[0].codes == [0]
    assert len(fake.runs[0].rows) == 3


def test_no_sink_has_every_method(tmp_path):
    sink = NoSink()
    sink.start(record(), tmp_path)
    sink.wait(1)
    sink.hold()
    sink.log({}, 0)
    sink.summary({})
    sink.table("t", [], [])
    sink.image("i", "p")
    sink.finish(1)
    assert list(tmp_path.iterdir()) == []


def test_the_configs_make_these_sinks():
    from pathlib import Path

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    top = Path(__file__).parents[1] / "configs" / "logger"
    sink = instantiate(OmegaConf.load(top / "wandb.yaml"))
    fresh = Wandb()
    assert isinstance(sink, Wandb)
    assert vars(sink) == vars(fresh)  # the file says the defaults, which the class holds
    assert isinstance(instantiate(OmegaConf.load(top / "none.yaml")), NoSink)
