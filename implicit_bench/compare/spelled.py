"""A record's config as the words of a command line: what to type to get such a run again."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .. import config, log, record
from ..schema import UsageError, files
from ..words import quoted

DEFAULTS = {"experiment": "none", "protocol": "sound", "length": "full"}
GROUPS = ("network", "init", "solver", "stop", "adjoint", "recipe", "dataset")
BROUGHT = ("model", "init", "solver", "stop", "adjoint", "penalty", "field")  # by a model


def train(recs: Sequence[Mapping[str, Any]], *more: str) -> str:
    """The commands that train what these records are of; one where the words agree but for model and seed."""
    cells: dict[tuple[str, ...], tuple[dict[str, None], dict[str, None]]] = {}
    known: dict[str, tuple[str, ...]] = {}
    for rec in recs:
        id = record.run_id({**rec["config"], "seed": None})
        known[id] = known.get(id) or tuple(words(rec))
        models, seeds = cells.setdefault(known[id], ({}, {}))
        models[rec["config"]["model"]["name"]], seeds[str(rec["config"]["seed"])] = None, None
    lines = []
    for common, (models, seeds) in cells.items():
        sweep = ["-m"] if len(models) * len(seeds) > 1 else []
        rows = [f"model={','.join(models)}", f"seed={','.join(sorted(seeds, key=int))}"]
        lines.append(shlex.join(["implicit-bench", "train", *sweep, *rows, *common, *more]))
    return " && ".join(lines)


def bench(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The command that times the models of two records under the settings of the first; what a model brings, where
    both say it."""
    models, theirs = [rec["config"]["model"]["name"] for rec in (a, b)], words(b)
    kept = [word for word in words(a) if word in theirs or word.partition("=")[0].partition(".")[0] not in BROUGHT]
    return shlex.join(["implicit-bench", "bench", f"model={','.join(dict.fromkeys(models))}", *kept])


def words(rec: Mapping[str, Any]) -> list[str]:
    """All but model and seed that differs from the defaults; without the single values where they do not compose."""
    paths = (rec["config"].get("paths") or {}).items()
    return [*_differing(rec), *(f"paths.{key}={quoted(folder)}" for key, folder in paths if folder != key)]


def _differing(rec: Mapping[str, Any]) -> list[str]:
    given = [f"{key}={rec[key]}" for key, default in DEFAULTS.items() if rec.get(key) not in (None, default)]
    wanted, model = rec["config"], f"model={rec['config']['model']['name']}"
    try:
        composed = _composed((model, *given))
        names = [log.choices(c).get("dataset") for c in (wanted, composed)]
        given += [f"{group}={_file(group, wanted[group])}" for group in GROUPS
                  if wanted[group].get("_target_") != composed[group].get("_target_")
                  or (group == "dataset" and names[0] != names[1])
                  or (group == "network" and wanted[group] != composed[group]
                      and _file(group, wanted[group]) != _file(group, composed[group]))]  # fmt: skip
        if set(wanted["penalty"]) != set(composed["penalty"]):
            given.append(f"penalty=[{','.join(wanted['penalty']) or 'none'}]")
        before = record.flat(_composed((model, *given)))
        skipped = record.LABELS | {"model", "seed", "sources"}
        return given + [f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                        for key, value in record.flat(dict(wanted)).items()
                        if key.partition(".")[0] not in skipped and before.get(key, value) != value]  # fmt: skip
    except (UsageError, KeyError):  # of --config-dir, or of another version
        return given


@functools.lru_cache(maxsize=64)  # a refusal spells out many records that differ in little
def _composed(given: tuple[str, ...]) -> dict[str, Any]:
    found = config.compose("train", given).config
    return {**found, "gpu": config.make(found["gpu"], "gpu").settings()}


def _file(group: str, settings: Mapping[str, Any]) -> str:
    """The file of a group that says the most of these settings."""
    said = {name: config.alone(path, resolve=False) for name, path in files(group).items()}
    fits = {name: sum(settings.get(key) == value for key, value in found.items())
            for name, found in said.items() if found.get("_target_") == settings["_target_"]}  # fmt: skip
    if not fits:
        raise UsageError(f"no {group} of ours")
    return max(fits, key=fits.__getitem__)
