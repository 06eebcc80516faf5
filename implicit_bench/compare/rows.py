"""Which records are compared: a row is the finished trainings of one model, one a seed, and rows share all but that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import log, record, runs
from ..record import flat
from ..schema import UsageError
from . import spelled
from .spelled import BROUGHT


class Run(NamedTuple):
    name: str
    record: dict[str, Any]
    state: str  # of runs.STATES
    folder: Path  # where metrics.jsonl may be

    @property
    def model(self) -> str:
        return self.record["config"]["model"]["name"]

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others: an id does not say on which machine."""
        return self.record["run_id"], self.record["environment"]["hardware"] or ""

    @property
    def seed(self) -> int:
        return self.record["config"]["seed"]

    @property
    def history(self) -> Path:
        """metrics.jsonl of the run; of a record in results/, its own."""
        own = self.folder / f"{self.name}.metrics.jsonl"
        return own if own.exists() else self.folder / "metrics.jsonl"


@dataclass(frozen=True)
class Row:
    label: str
    runs: dict[int, Run]  # by seed, in order
    diverged: tuple[int, ...] = ()  # seeds whose training ended at a loss that was not finite

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))


def find(names: Sequence[str], words: Sequence[str], dirs: Sequence[Path]) -> list[Row]:
    """The row of each name, a model's or a word as `runs` takes them, among the runs that fit all the other words.

    Raises UsageError where a name has no record, or could mean several rows; RecordError for a record of its that
    cannot be read.
    """
    everything = runs.found(dirs)
    runs.check([*words, *names], everything, ("base", "against", "records", "logger", "paths.runs"))
    trainings = []
    for name, rec, _ in everything:
        if "file" in rec and any(name.startswith(f"{wanted}-") for wanted in names):
            record.read_record(rec["file"])  # says what is wrong with it
        if rec.get("command") == "train" and all(runs.matches(word, name, rec) for word in words):
            trainings.append(Run(name, rec, runs.state(rec), rec["folder"]))
    models = sorted({run.model for run in trainings})
    rows = []
    for wanted in names:
        picked = [run for run in trainings if run.model == wanted]
        picked = picked or [run for run in trainings if _tells(wanted, run)]
        if not picked:
            where = " ".join([f"in {' and '.join(map(str, dirs))}", *(["with", *words] if words else [])])
            raise UsageError(f"no training of {wanted!r} {where}; there are: {', '.join(models) or 'none'}")
        rows.append(row(wanted, _one_cell(wanted, picked)))
    return rows


def _tells(word: str, run: Run) -> bool:
    """key=value as `runs` takes it, the beginning of an id, or of a name up to a dash: `deq` must not tell a cdeq."""
    if "=" in word:
        return runs.matches(word, run.name, run.record)
    return run.name.startswith(f"{word}-") or run.name.rpartition("-")[2].startswith(word)


def _one_cell(wanted: str, picked: Sequence[Run]) -> list[Run]:
    """The runs, if they differ in nothing but the seed. A cell of which nothing is done is not what anyone means."""
    cells: dict[str, list[Run]] = {}
    for run in picked:
        cells.setdefault(record.run_id({**run.record["config"], "seed": None}), []).append(run)
    begun = [cell for cell in cells.values() if any(run.state == "done" for run in cell)] or [*cells.values()]
    if len(begun) == 1:
        return begun[0]
    settings = [_told(cell[0].record) for cell in begun]
    keys = [key for key in dict.fromkeys(key for s in settings for key in s)
            if any(s.get(key) != settings[0].get(key) for s in settings)]  # fmt: skip
    keys = [key for key in keys if "." not in key] or keys[:1]  # what a group holds follows from its choice
    values = {key: list(dict.fromkeys(_said(s.get(key)) for s in settings)) for key in keys}
    differ = " and ".join(f"{key} ({', '.join(values[key])})" for key in keys)
    which = " ".join(f"{key}={_said(settings[0].get(key))}" for key in keys)  # one that there is
    raise UsageError(f"{wanted!r} names trainings that differ in {differ}; say which, as {which}")


def _told(rec: dict[str, Any]) -> dict[str, Any]:
    """Every setting as `runs` takes it for a word, those first by which one would tell runs apart."""
    labels = {key: rec[key] for key in ("experiment", "protocol", "length")}
    rest = {key: value for key, value in rec["config"].items() if key not in record.LABELS | {"seed"}}
    return {**log.choices(rec["config"]), **labels, **flat(rest)}


def row(label: str, found: Sequence[Run]) -> Row:
    """Raises UsageError for runs that are neither done nor diverged, and for two of one seed that are no copies of each
    other."""
    by_seed: dict[int, Run] = {}
    diverged = {run.seed for run in found if run.state == "failed" and run.record["nonfinite_steps"]}
    for run in sorted(found, key=lambda run: (run.seed, not (run.folder / "metrics.jsonl").exists())):
        if run.seed in diverged:
            continue
        if run.state != "done":
            what = "is still running; wait for it" if run.state == "running" else \
                f"{'was' if run.state in ('interrupted', 'stopped') else 'has'} {run.state}; go on with: " \
                f"{spelled.train([run.record])}"  # fmt: skip
            raise UsageError(f"{run.name} {what} (or leave it out: status=done)")
        other = by_seed.setdefault(run.seed, run)
        if other.record["started_at"] != run.record["started_at"]:
            twice = f"seed {run.seed} of {label} was trained twice, in {other.folder} and in {run.folder}"
            raise UsageError(f"{twice}; name one folder with records=")
    if not by_seed:
        raise UsageError(f"every training of {label!r} diverged (seed {', '.join(map(str, sorted(diverged)))}); lower "
                         "recipe.lr or set recipe.clip=1")  # fmt: skip
    return Row(label, by_seed, tuple(sorted(diverged)))


def refuse_unlike(rows: Sequence[Row]) -> None:
    """Raises UsageError where times cannot be compared: no seed in common, another recipe or machine, not alone."""
    base = rows[0]
    for other in rows[1:]:
        if not base.runs.keys() & other.runs.keys():
            a, b = (", ".join(map(str, row.runs)) for row in (base, other))
            theirs = other.first.record
            lacking = [{**theirs, "config": {**theirs["config"], "seed": seed}} for seed in base.runs]
            raise UsageError(f"{base.label} and {other.label} have no seed in common ({a}; {b}); train what lacks: "
                             f"{spelled.train(lacking)}")  # fmt: skip
    everything = [run for row in rows for run in row.runs.values()]
    first = everything[0]
    for run in everything[1:]:
        if key := _unlike(first.record, run.record):
            a, b = (_said(_shared(r.record).get(key)) for r in (first, run))
            again = spelled.bench(first.record, run.record)
            if key.startswith("environment."):
                key, again = key[12:], spelled.train([r.record for r in everything], "force=true")
            raise UsageError(f"{key} is {a} in {first.name} and {b} in {run.name}, so their times cannot be compared; "
                             f"time both alike: {again}")  # fmt: skip
    now = [run for run in everything if record.run_id(run.record["config"]) == run.record["run_id"]]
    if old := [run for run in everything if now and run not in now]:
        again = spelled.train([run.record for run in old])
        raise UsageError(f"{old[0].name} was trained by a version of implicit-bench that computes other numbers than "
                         f"that of {now[0].name}; train it again: {again}")  # fmt: skip
    if busy := [run for run in everything if run.record["environment"]["alone"] is False]:
        names = ", ".join(run.name for run in busy[:3]) + (f" and {len(busy) - 3} more" if len(busy) > 3 else "")
        again = spelled.train([run.record for run in busy], "force=true")
        was = "was" if len(busy) == 1 else "were"
        raise UsageError(f"{names} {was} not alone on the machine (environment.alone), so the times say little; time "
                         f"again: {again}")  # fmt: skip


def _unlike(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first setting that rows must share and two records do not."""
    found, theirs = _shared(a), _shared(b)
    matched = a["config"].get("match") or b["config"].get("match")
    own = ("network.",) if matched else ("network.untied", "network.inject")  # a control's, a model's
    keys = [key for key in dict.fromkeys([*found, *theirs]) if found.get(key) != theirs.get(key)
            and (key.endswith("_target_") or not key.startswith(own))
            and not (key.startswith("sources.") and None in (found.get(key), theirs.get(key)))]  # fmt: skip
    return keys[0] if keys and keys != ["length"] else None  # lengths that resolve to the same are the same


def _shared(rec: dict[str, Any]) -> dict[str, Any]:
    """What rows must agree in, in the order in which a difference is told."""
    config = {key: value for key, value in rec["config"].items()
              if key not in (record.LABELS - {"protocol"}) | {"seed", *BROUGHT}}  # fmt: skip
    machine = {key: value for key, value in rec["environment"].items() if key not in ("versions", "git", "alone")}
    first = {key: config.pop(key, {}) for key in ("dataset", "protocol", "network", "recipe", "gpu")}
    return {**log.choices(first), "protocol": rec["protocol"], "length": rec["length"], **flat(first), **flat(config),
            **flat({"data": rec["data"], "environment": machine})}  # fmt: skip


def _said(value: Any) -> str:
    return "absent" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
