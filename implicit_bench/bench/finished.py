"""`bench runs=A,B`: rows that are finished trainings."""

from __future__ import annotations

from .. import config, log, record, runs
from ..train import checkpoint
from ..words import Words

OWN = ("rounds", "time", "peers", "memory", "gpu", "logger", "paths", "force", "allow_targets")


def of_runs(words: Words) -> list[config.Composed]:
    """The jobs of `bench runs=A,B`: finished trainings as their records have them, timed here at their last weights.

    Raises UsageError for a word that would make them others and for a run that is not done, RecordError where none is.
    """
    said = {o.key_or_group: o for o in config.parse(words.overrides)}
    names = [str(name) for name in said.pop("runs").value()]
    for key, o in said.items():
        if key.partition(".")[0] not in OWN:
            raise config.UsageError(f"runs= times trainings as they are; leave {o.input_line} out, or bench model=")
    base = config.compose("bench", [o.input_line for o in said.values()], words.search).config
    jobs = []
    for name in names:
        folder = record.find(base["paths"]["runs"], name, "train")
        rec = record.read_record(folder)
        what = f"a {rec['command']}" if rec["command"] != "train" else rec["status"]
        if what == "done" and not (folder / checkpoint.NAMES[0]).exists():
            what = "a record without weights"
        if what != "done":
            raise config.UsageError(f"runs={name} is {what}; bench times finished trainings, with their checkpoints")
        cfg = {**base, **runs.trusted(rec["config"], base["allow_targets"]), **{key: base[key] for key in (*OWN, "at")}}
        if not any(key.partition(".")[0] == "gpu" for key in said):
            cfg["gpu"] = {**cfg["gpu"], "dtype": rec["config"]["gpu"]["dtype"]}
        labels = {key: rec[key] for key in ("experiment", "protocol", "length")}
        choices = {"dataset": log.choices(rec["config"]).get("dataset", "data"), **labels}
        jobs.append(config.Composed(cfg, choices, label=cfg["model"]["name"], trained=folder))
    for job in jobs:
        if sum(other.label == job.label for other in jobs) > 1 and job.trained:
            job.label = job.trained.name
    return jobs
