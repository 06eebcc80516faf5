"""What has been run: `implicit-bench runs`, and for Python `load_run(ID)` and `records()`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import lock, log, record, schema, terminal
from .jsonl import read_jsonl
from .record import METRICS, RecordError, flat
from .report import tables
from .schema import UsageError, no_key
from .terminal import count, number, say, share

if TYPE_CHECKING:
    import pandas

    from .device import Device
    from .models import Classifier

RECORDED = ("command", "experiment", "protocol", "length")
SHARES = {metric.key for metric in METRICS if metric.unit == "share"}
Found = tuple[str, dict[str, Any], float]
STATES = (*record.STATUSES, "stopped", "unreadable")  # running, but nobody holds it; no record that can be read


@dataclass(frozen=True)
class Run:
    """One run's folder, or a record beside no folder (as in results/), which then has no weights."""

    folder: Path
    record: dict[str, Any] = field(repr=False)
    trust: Sequence[str] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that it ran with."""
        return self.record["config"]

    @property
    def metrics(self) -> pandas.DataFrame:
        """metrics.jsonl, a row each log_steps steps and each epoch."""
        import pandas

        return pandas.DataFrame(list(read_jsonl(self.folder / "metrics.jsonl")))

    @cached_property
    def model(self) -> Classifier:
        """The trained models.Classifier in evaluation mode on the CPU, in the dtype that it was trained in. Made once.

        Raises UsageError where a class of one's own is not trusted (`load_run(..., trust=["mypkg"])`), CheckpointError
        where there are no weights.
        """
        return restore(self, trust=self.trust)


def load_run(name: str = "last", runs: str | Path = "runs", trust: Sequence[str] = ()) -> Run:
    """A run by id, by any unique prefix of its id or of its folder's name, by path, or the `last` one begun.

    Its `record` and `config` are dicts, `metrics` is a DataFrame, `model` the trained classifier. A record is data:
    `trust` names the packages of your own whose classes may be made from it. Raises RecordError.
    """
    folder = record.find(runs, name)
    return Run(folder, record.read_record(folder), tuple(trust))


def records(dirs: str | Path | Iterable[str | Path] = "runs") -> pandas.DataFrame:
    """Every record under the given folders as a DataFrame, a row a run.

    First `model`, `dataset`, `seed`, `solver` and the like; then what record.json has, under its names with dots:
    `metrics.test_acc`, `timing.step_ms` (of a spread, the median), `solve.test.nfe_sample`, `metrics.test_acc_within.2`
    ... and every setting as `config.*`. `record` holds the whole dict.
    """
    import pandas

    folders = [dirs] if isinstance(dirs, (str, Path)) else dirs
    plain = ("run_id", "command", "status", "error", "attempt", "experiment", "protocol", "length", "steps", "epochs",
             "started_at", "finished_at")  # fmt: skip
    return pandas.DataFrame([
        {**log.choices(rec["config"]), "seed": rec["config"].get("seed"), **{key: rec[key] for key in plain},
         **record.scalars(rec), **flat({"test": rec["solve"].get("test") or {}}, "solve."),
         **flat({"test_acc_within": rec["metrics"].get("test_acc_within") or {}}, "metrics."),
         "params": rec["params"]["total"], "hardware": rec["environment"]["hardware"],
         **{f"config.{k}": v for k, v in flat(rec["config"]).items()}, "record": rec}
        for rec in record.records(folders)
    ])  # fmt: skip


def restore(run: Run, device: Device | None = None, trust: Sequence[str] = ()) -> Classifier:
    """The classifier of a finished or unfinished run with its latest weights, in evaluation mode, on the device (None:
    the CPU, in the dtype that it was trained in).

    Raises UsageError for a class that is neither ours nor of a trusted package, CheckpointError without usable weights.
    """
    if run.record["command"] != "train":
        name, command = record.name_of(run.folder), run.record["command"]
        raise UsageError(f"{name} is a {command}, which leaves no weights; name a training")
    from . import config
    from .device import Device
    from .train import checkpoint

    gpu = run.config["gpu"]
    device = device or Device("cpu", gpu["dtype"], channels_last=gpu["channels_last"])
    parts = config.build(trusted(run.config, trust))
    found = checkpoint.load(run.folder, device.torch, lambda line: say("note", line, err=True))
    if found is None:
        raise RecordError(f"{run.folder} holds no checkpoint, only its record; train it here to look at it")
    model = device.place(parts.model)
    checkpoint.put(model, found["model"], run.folder)
    return model.eval()


def trusted(recorded: dict[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """A recorded config that may be built: it names shipped classes, or those of a trusted package."""
    cfg = {key: value for key, value in recorded.items() if key != "sources"}
    cfg = {**cfg, "allow_targets": list(trust), "gpu": {"_target_": "implicit_bench.device.Device"}}
    schema.check(cfg)
    return cfg


# ----------------------------------------------------------------------------------------------------- the command


def command(words: Sequence[str], dirs: Sequence[Path], yes: bool = False) -> int:
    """`runs [FILTER...]`, `runs diff A B`, `runs rm RUN...`."""
    if words[:1] == ["diff"]:
        return _diff(words[1:], dirs)
    if words[:1] == ["rm"]:
        return _remove(words[1:], dirs, yes)
    if yes:
        raise UsageError("-y answers the question of runs rm, and nothing else asks one")
    return _list(words, dirs)


def found(dirs: Sequence[Path]) -> list[Found]:
    """(name, record or {}, seconds since the epoch at which it began) of every run, the latest last.

    Into each record are put its `folder` and, of one that cannot be read, the `file`.
    """
    runs = []
    for top in dirs:
        if not top.is_dir():
            if top != Path("runs"):
                raise RecordError(f"no folder {top} to read records from")
            continue
        for path in record.record_files(top):
            try:
                rec = record.read_record(path)
            except RecordError:
                rec = {"file": path}
            runs.append((record.name_of(path), {**rec, "folder": path.parent}, record.started(rec, path)))
    return sorted(runs, key=lambda run: run[2])


def state(rec: Mapping[str, Any]) -> str:
    if "status" not in rec:
        return "unreadable"
    dead = rec["status"] == "running" and lock.owner(rec["folder"]) is None
    return "stopped" if dead else rec["status"]


def matches(word: str, name: str, rec: Mapping[str, Any]) -> bool:
    """A plain word is a part of the name; key=value is about the status, what a group was set to, or any setting."""
    key, equals, value = word.partition("=")
    if not equals:
        return word in name
    if key == "status":
        return state(rec) == value
    config = rec.get("config", {})
    if key in RECORDED and key in rec:
        return str(rec[key]) == value
    if key == "dataset" and f"-{value}-" in name:  # one of one's own has the name of its file
        return True
    if (picked := log.choices(config)).get(key) is not None:
        return picked[key] == value
    settings = flat(config)
    return key in settings and _same(settings[key], value)


def check(words: Sequence[str], everything: Sequence[Found], more: Sequence[str] = ()) -> None:
    """Raises UsageError for a status that there is not, and a key that neither the records have nor `more` names."""
    for word in words:
        if word.startswith("status=") and (name := word.partition("=")[2]) not in STATES:
            raise UsageError(f"no status {name!r}; there are: {', '.join(STATES)}")
    keys = {"status", *RECORDED, *more, *(k for _, rec, _ in everything for k in (*log.choices(rec.get("config", {})),
             *flat(rec.get("config", {}))))}  # fmt: skip
    for key in (word.partition("=")[0] for word in words if "=" in word):
        if everything and key not in keys:
            raise UsageError(no_key(key, sorted(keys)))


def _same(a: Any, b: str) -> bool:
    if isinstance(a, bool) or a is None:
        return {True: "true", False: "false", None: "null"}[a] == b
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == b


def _list(words: Sequence[str], dirs: Sequence[Path]) -> int:
    everything = found(dirs)
    check(words, everything)
    rows, now = [], time.time()
    for name, rec, began in everything:
        if not all(matches(word, name, rec) for word in words):
            continue
        values = record.scalars(rec)
        rows.append([name, state(rec), values.get("metrics.test_acc"), values.get("timing.step_ms"),
                     values.get("solve.nfe_forward"), values.get("solve.nfe_backward"),
                     rec["epochs"] if rec.get("command") == "train" else None, rec.get("length") or "",
                     round(now - began)])  # fmt: skip
    where = " and ".join(map(str, dirs))
    if not rows:
        known = f"none of the {len(everything)} runs in {where} fits {' '.join(words)!r}"
        print(known if everything else f"no runs in {where} yet; implicit-bench train makes one", file=sys.stderr)
        if terminal.format == "text":
            return 0
    columns = ["run", "status", "test acc", "ms/step", "nfe f", "nfe b", "epochs", "length", "age"]
    tables.show(columns, rows, {"test acc": share, "age": age, "nfe f": number, "nfe b": number},
                spare=["length", "epochs", "nfe b", "nfe f", "ms/step"])  # fmt: skip
    return 0


def age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= 60):
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _diff(words: Sequence[str], dirs: Sequence[Path]) -> int:
    if len(words) != 2:
        raise UsageError("runs diff wants two runs, such as: implicit-bench runs diff last skip_deq-digits")
    paths = [record.pick(dirs, word) for word in words]
    recs, names = [record.read_record(path) for path in paths], [record.name_of(path) for path in paths]
    if names[0] == names[1]:  # a run and its copy among the results
        names = [str(path) for path in paths]
    if recs[0]["command"] != recs[1]["command"]:
        kinds = " and ".join(f"{name} is a {rec['command']}" for name, rec in zip(names, recs))
        raise UsageError(f"{kinds}; runs diff compares two of one kind")
    rows: list[list[Any]] = []
    settings = [{**flat(rec["config"]), **{k: v for k, v in flat(rec["environment"]).items() if "." not in k}}
                for rec in recs]  # fmt: skip
    less = ("paths.", "logger.", "force", "progress.", "alone")
    for key in dict.fromkeys(k for s in settings for k in s):
        values = [s.get(key, "–") for s in settings]
        nothing = all(value in (None, "–", {}) for value in values)
        if values[0] != values[1] and not nothing and not key.startswith(less):
            rows.append([key, *values, ""])
    numbers = [{**record.scalars(rec), **_ratios(rec)} for rec in recs]
    for key in dict.fromkeys((*(m.key for m in METRICS), *numbers[0], *numbers[1])):
        values = [n.get(key) for n in numbers]
        if values != [None, None] and values[0] != values[1]:
            change = ""
            if None not in values and key in SHARES:
                change = f"{100 * (values[1] - values[0]):+.1f} points"
            elif None not in values and values[0]:
                change = f"{values[1] / values[0] - 1:+.1%}"
            rows.append([key, *values, change])
    if not rows:
        alike = f"{names[0]} and {names[1]} agree in every setting and every metric"
        print(alike, file=sys.stdout if terminal.format == "text" else sys.stderr)
        if terminal.format == "text":
            return 0
    tables.show(["", *names, "change"], rows, dict.fromkeys(names, _short))
    return 0


def _ratios(rec: Mapping[str, Any]) -> dict[str, float]:
    """What a bench found."""
    return {f"ratio.{r['measure']} {r['numerator']} / {r['denominator']}": r["value"] for r in rec.get("ratios", ())}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "–" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _remove(words: Sequence[str], dirs: Sequence[Path], yes: bool) -> int:
    if not words:
        raise UsageError("runs rm wants the runs to remove, by id or any unique prefix")
    folders = list({path.resolve(): path for path in (record.pick(dirs, word) for word in words)}.values())
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            kind = "a link" if folder.is_symlink() else "a record without a run's folder"
            raise RecordError(f"{folder} is {kind}, which runs rm leaves alone; nothing was removed")
        if owner := lock.owner(folder):
            raise RecordError(f"{folder} is being written by process {owner['pid']} on {owner['host']}; stop it first")
    size = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()) / 2**20
    for folder in folders:
        print(f"  {folder}", file=sys.stderr)
    found = count(len(folders), "run")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("runs rm asks before it removes, and there is nobody to ask here; add -y")
        print(f"remove {found}, {size:.1f} MiB, for good? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing removed", file=sys.stderr)
            return 0
    for folder in folders:
        shutil.rmtree(folder)
    print(f"removed {found}, {size:.1f} MiB")
    return 0
