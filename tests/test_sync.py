"""`sync`: real offline runs rebuilt and read back, refusals and repeats against a stand-in for wandb, a real 409."""

import atexit
import http.server
import json
import os
import sys
import threading

import forked
import pytest
from test_log import KEY, FakeRun, fake, finished, inspect  # noqa: F401 (a fixture)
from test_log import record as new

from implicit_bench import mirror, record
from implicit_bench import sync as module
from implicit_bench.jsonl import Jsonl
from implicit_bench.log import Wandb, leave
from implicit_bench.sync import named, send, sync

# ------------------------------------------------------------------------------- what the live run wrote, again


def of_wandb(folder):
    """All that a reader of the run in this offline folder can see, less clock times."""
    lines = [json.loads(line) for line in inspect(folder).splitlines()]
    summary = json.loads(inspect(folder, "--summary"))
    rows = [line["history"]["item"] for line in lines if line["type"] == "history"]
    (begun,) = [line["run"] for line in lines if line["type"] == "run"]
    axes = [line["metric"] for line in lines if "metric" in line]

    def plain(values):
        other = ("_runtime", "_timestamp", "_wandb", "artifact_path")
        return {k: plain(v) if isinstance(v, dict) else v for k, v in values.items() if not k.endswith(other)}

    return {
        "rows": [plain(row) for row in rows], "summary": plain(summary["summary"]), "config": summary["config"],
        "tags": summary["tags"], "metrics": axes, "end": (summary["state"], summary["exit_code"]),
        **{key: begun.get(key) for key in ("run_id", "display_name", "project", "run_group", "job_type", "entity")},
    }  # fmt: skip


def offline_folders(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A command run in a process of its own, as users do: its only run's folder."""

    def run(*words):
        done = forked.run([sys.executable, "-m", "implicit_bench", *words, "gpu.threads=1"], cwd=tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr
        monkeypatch.chdir(tmp_path)
        (folder,) = (tmp_path / "runs").iterdir()
        return folder

    return run


def again(folder, *options):
    """Sync in a process of its own; stdout."""
    code = f"""
import sys
from pathlib import Path
from implicit_bench.sync import sync
sys.exit(sync([Path({str(folder)!r})], {", ".join(options)}))
"""
    done = forked.run([sys.executable, "-c", code], timeout=200, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


WORDS = {
    "train": ("train", "model=skip_deq", "recipe.max_steps=90", "progress.log_steps=20"),
    "bench": ("bench", "model=explicit,skip_deq", "rounds=3", "memory=false", "length=smoke"),
}


@pytest.mark.parametrize("command", WORDS)
def test_a_run_rebuilt_is_the_live_one_in_every_row_and_word(live, command):
    folder = live(*WORDS[command])
    (first,) = offline_folders(folder)
    wanted = of_wandb(first)
    assert len(wanted["rows"]) > 1
    assert "already there; upload it with: wandb sync " in again(folder)  # the live run left its marker
    assert offline_folders(folder) == [first]
    said = again(folder, "force=True")
    (second,) = set(offline_folders(folder)) - {first}
    assert said.startswith(f"offline {folder.name}: upload it with: wandb sync {folder / 'wandb' / second.name}\n")
    assert f"it replaces {first}\n" in said
    assert of_wandb(second) == wanted
    if command == "bench":
        media = [sorted(p.read_bytes() for p in top.rglob("media/**/*") if p.is_file()) for top in (first, second)]
        assert len(media[0]) == 3  # rows, ratios, picture
        assert media[0] == media[1]
    assert "already there" in again(folder)
    (folder / "metrics.jsonl").open("a").write('{"step": 95, "metrics.train_loss": 0.5}\n')
    assert "already there" not in again(folder)
    assert len(offline_folders(folder)) == 3


# --------------------------------------------------------------------------------------------- a stand-in for wandb


def stored(tmp_path, command="train", status="done", rows=3, **fields):
    """A run's folder as a command leaves it."""
    rec = new(command, status=status, **fields)
    rec["metrics"]["val_acc"] = 0.75
    folder = tmp_path / "runs" / f"{command}-digits-{rec['run_id']}"
    record.write_record(folder, rec)
    log = Jsonl(folder / "metrics.jsonl")
    for step in range(rows):
        log.append({"step": step, "metrics.train_loss": 1 / (step + 1)})
    log.close()
    return folder, rec


@pytest.fixture
def online(fake, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake.login_gives = True
    return fake


def test_a_second_time_sends_nothing_and_a_changed_run_is_sent_under_the_same_id(online, tmp_path, capsys):
    folder, rec = stored(tmp_path)
    assert sync([folder]) == 0
    assert sync([folder]) == 0
    assert len(online.runs) == 1
    page = "https://wandb.example/run"
    assert capsys.readouterr().out == f"sent    {folder.name}: {page}\nsame    {folder.name}: already there: {page}\n"
    rec["metrics"]["val_acc"] = 0.8
    record.write_record(folder, rec)
    assert sync([folder]) == 0
    assert sync([folder], force=True) == 0
    assert [run.identity["id"] for run in online.runs] == [rec["run_id"]] * 3
    assert [run.identity["resume"] for run in online.runs] == [None] * 3  # which replaces
    assert online.runs[1].summary["metrics/val_acc"] == 0.8
    assert [row["step"] for row in online.runs[2].rows] == [0, 1, 2]
    assert sync([folder], project="other") == 0  # W&B has it, but not there
    assert online.runs[3].identity["project"] == "other"


def test_offline_does_not_count_as_there_once_it_can_go_online(fake, tmp_path, monkeypatch):  # noqa: F811
    folder, _ = stored(tmp_path)
    assert send(folder).label == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake.login_gives = True
    assert send(folder) == ("sent", "https://wandb.example/run")
    assert [run.identity["mode"] for run in fake.runs] == ["offline", "online"]


def test_an_offline_folder_that_is_gone_is_written_again(fake, tmp_path, monkeypatch):  # noqa: F811
    folder, _ = stored(tmp_path)
    place = folder / "wandb" / "offline-run-1"
    init = fake.init

    def at_place(**identity):
        run = init(**identity)
        run.settings.sync_dir = str(place)
        return run

    fake.init = at_place
    place.mkdir(parents=True)
    assert "already there" not in send(folder).text
    assert "already there" in send(folder).text
    place.rmdir()
    assert "already there" not in send(folder).text


def test_a_resumed_offline_run_is_not_all_there(fake, tmp_path):  # noqa: F811
    """Its second offline folder has the rows since it was resumed."""
    folder, rec = stored(tmp_path)
    finished(Wandb(), folder, record=rec, resume=True)
    assert mirror.marker(folder) == {}
    finished(Wandb(), folder, record=rec)
    assert mirror.marker(folder)["state"] == "offline"


def test_an_upload_that_does_not_end_is_no_success_nor_does_it_hang(online, tmp_path, capsys, monkeypatch):
    """Wandb itself says so by an exception where it can; where it hangs, the process still ends, with code 1."""
    fields = dict.fromkeys(("mode", "silent", "quiet", "finish_timeout_raises"))
    monkeypatch.setattr(online.Settings, "model_fields", fields)
    leaves = []
    monkeypatch.setattr(atexit, "register", lambda *call: leaves.append(call))
    monkeypatch.setattr(module, "UPLOAD_S", -9.9)  # init_timeout is 10
    ended = threading.Event()
    monkeypatch.setattr(FakeRun, "finish", lambda run, code: ended.wait(20))
    folder, _ = stored(tmp_path)
    assert sync([folder]) == 1
    ended.set()
    [thread.join(5) for thread in threading.enumerate() if thread.name == "wandb"]
    assert "W&B has not finished in time; nothing is lost" in capsys.readouterr().err
    assert [call[1] for call in leaves if call[0] is leave] == [0, 1]  # the last one comes first
    assert vars(online.runs[0].identity["settings"])["finish_timeout_raises"] is True


DELETED = "Timed out while retrying: HTTP 409: run e/p/x was previously created and deleted; try a new run name"


@pytest.mark.parametrize(
    ("command", "attempt", "second"), [("train", 2, "-2"), ("bench", 1, "-1-2"), ("bench", 3, "-3-2")]
)
def test_an_id_that_was_deleted_there_gets_a_suffix_that_stays(online, tmp_path, capsys, command, attempt, second):
    folder, rec = stored(tmp_path, command, attempt=attempt)
    first = rec["run_id"] + ("-3" if attempt == 3 else "")
    init = online.init

    def refuse(**identity):
        if identity["id"] == first:
            raise RuntimeError(DELETED)
        return init(**identity)

    online.init = refuse
    assert sync([folder]) == 0
    assert "wandb" not in [thread.name for thread in threading.enumerate()]
    id = rec["run_id"] + second
    assert [run.identity["id"] for run in online.runs] == [id]
    assert f"as {id}, for {first} was deleted at W&B, which takes no id back" in capsys.readouterr().out
    assert sync([folder], force=True) == 0  # not tried again: each refusal takes W&B ten seconds
    assert [run.identity["id"] for run in online.runs] == [id] * 2
    assert "deleted" not in capsys.readouterr().out


def test_no_network_is_one_sentence_and_code_1_and_loses_nothing(online, tmp_path, capsys):
    folders = [stored(tmp_path)[0]] * 3
    before = {path: path.read_bytes() for path in folders[0].iterdir() if path.is_file()}
    online.online_fails = True
    assert sync(folders) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (f"failed  {folders[0].name}: W&B could not start (ConnectionError: no answer); nothing is lost, "
                   "the same command sends it later; 2 more not tried\n")  # fmt: skip
    assert [run.identity["mode"] for run in online.runs] == ["online"]  # nor is it written offline instead
    assert {path: path.read_bytes() for path in folders[0].iterdir() if path.is_file()} == before


def test_a_failure_on_the_way_is_no_success(online, tmp_path, capsys):
    folder, _ = stored(tmp_path)
    online.fail_at = 1
    assert sync([folder]) == 1
    assert "W&B failed (ConnectionError: the service is gone); nothing is lost" in capsys.readouterr().err
    assert mirror.marker(folder) == {}
    assert sync([folder]) == 0


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("interrupted", 130)])
def test_a_run_is_sent_with_its_end(online, tmp_path, status, code):
    assert send(stored(tmp_path, status=status)[0]).label == "sent"
    assert online.runs[0].codes == [code]


def test_a_running_one_is_skipped(online, tmp_path, capsys):
    from implicit_bench.lock import RunLock

    killed, _ = stored(tmp_path, status="running")
    assert sync([killed]) == 0
    with RunLock(killed):
        assert sync([killed]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"skipped {killed.name}: it was ended before it could say how; the command that began it")
    assert f"is being written by pid {os.getpid()}" in second
    assert online.runs == []


def test_what_is_no_run_fails_alone(online, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert sync([tmp_path / "empty", stored(tmp_path)[0]]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert len(online.runs) == 1


def test_a_record_alone_cannot_be_sent(online, tmp_path, capsys):
    folder, _ = stored(tmp_path)
    assert sync([folder / "record.json"]) == 1
    assert "it is a record without a run's folder" in capsys.readouterr().err


def test_runs_by_name_and_all_of_them(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(record.RecordError, match="there are no runs in"):
        named([runs], [])
    (one, _), (two, _) = stored(tmp_path), stored(tmp_path, "bench")
    (runs / ".sweeps").mkdir()
    assert named([runs], []) == sorted([one, two])
    assert named([runs], ["train"]) == named([tmp_path / "elsewhere", runs], ["train"]) == [one]
    with pytest.raises(record.RecordError, match="no run 'other'"):
        named([runs], ["other"])


def test_project_entity_and_group_are_the_runs_own_unless_said(online, tmp_path, monkeypatch):
    folder, rec = stored(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "environment")
    send(folder)
    rec["config"]["logger"] = {"project": "p", "entity": "e", "group": "g"}
    record.write_record(folder, rec)
    send(folder)
    send(folder, project="mine", entity="us")
    got = [[run.identity[key] for key in ("project", "entity", "group")] for run in online.runs]
    assert got == [["environment", None, "digits_small"], ["p", "e", "g"], ["mine", "us", "g"]]


@pytest.mark.parametrize(("mode", "said"), [("disabled", "switches W&B off"), ("online", "no key found; `wandb"),
                                           ("run", "no key found; `wandb")])  # fmt: skip
def test_a_mode_that_cannot_be(fake, tmp_path, monkeypatch, capsys, mode, said):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", mode)
    assert sync([stored(tmp_path)[0]]) == 1
    assert said in capsys.readouterr().err
    assert fake.runs == []


# ------------------------------------------------------------------------------------------ wandb's own words


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as it takes to send a training, with one id that was deleted there."""

    deleted, seen = "", []

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = json.loads(body) if body.startswith(b"{") else {}
        text, given = query.get("query", ""), query.get("variables") or {}
        code, answer = 200, {"data": {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}"}}}
        if "mutation UpsertBucket" in text and given["name"] == self.deleted:
            message = f"run e/p/{self.deleted} was previously created and deleted; try a new run name"
            code, answer = 409, {"data": {"upsertBucket": None}, "errors": [{"message": message}]}
        elif "mutation UpsertBucket" in text:
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": given["name"], "displayName": "d", "config": "{}", "project": project}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        elif "mutation CreateRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"http://{self.headers['Host']}/up"} for name in given["files"]]
            answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        elif "/file_stream" in self.path:
            self.seen.append((self.path, query))
            answer = {"exitcode": None, "limits": {}}
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *_): ...


def test_the_installed_wandb_sends_to_a_server_and_takes_another_id_for_one_deleted_there(tmp_path, monkeypatch):
    folder, rec = stored(tmp_path, status="failed")
    monkeypatch.setattr(Server, "deleted", rec["run_id"])
    monkeypatch.setattr(Server, "seen", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    said = again(folder)
    server.shutdown()
    id = f"{rec['run_id']}-2"
    assert said.startswith(f"sent    {folder.name}: http://127.0.0.1:{server.server_port}/")
    assert f"as {id}, for {rec['run_id']} was deleted at W&B" in said
    assert {path for path, _ in Server.seen} == {f"/files/e/implicit-bench/{id}/file_stream"}
    chunks = [query["files"]["wandb-history.jsonl"] for _, query in Server.seen
              if "wandb-history.jsonl" in query.get("files", {})]  # fmt: skip
    rows = [json.loads(line) for chunk in chunks for line in chunk["content"]]
    assert chunks[0]["offset"] == 0  # in the place of the rows that were there
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [query["exitcode"] for _, query in Server.seen if query.get("complete")] == [1]
    assert mirror.marker(folder)["id"] == id
