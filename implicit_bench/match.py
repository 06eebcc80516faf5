"""`match=params|time`: a control, k plain applications of cells, made as large or as slow as an implicit model.

What is found becomes plain settings before a run id is made, so that a record needs none of this to be repeated.
"""

from __future__ import annotations

import functools
import inspect
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import torch

from . import config, machine, record
from .bench.rows import initial_ms
from .config import Composed, UsageError
from .schema import files, locate, nearest
from .terminal import progress

Config = dict[str, Any]
OWN = ("model", "init", "solver", "stop", "adjoint", "penalty", "field", "match", "match_to", "rounds", "time")
SECONDS = 15.0  # that a comparison of times may take at most
NEAR, FAR = 12, 100  # the deeper of two networks that are timed is between them


def matched(jobs: Sequence[Composed], search: Sequence[str] = (), measure: bool = True,
            aloud: bool = True) -> list[Composed]:  # fmt: skip
    """The jobs, the controls among them resolved. Raises UsageError where match= is asked for and none is a control."""
    asked = [job for job in jobs if job.config.get("match")]
    if asked and not any(_is_control(job.config) for job in asked):
        raise UsageError(f"match={asked[0].config['match']} is for a control, k plain applications of cells, and "
                         f"model={asked[0].choices['model']} is none; use model=explicit or model=resnet")  # fmt: skip
    return [one(job, search, measure, aloud) for job in jobs]


def one(job: Composed, search: Sequence[str] = (), measure: bool = True, aloud: bool = True) -> Composed:
    """The job with its widths or its depth resolved; any but a control is left as it is.

    Without `measure`, a depth that nothing is known of is null, and `alike` the model that it will be matched to.
    """
    if not job.config.get("match") or not _is_control(job.config):
        return job
    other = _other(job, search)
    new, line = _params(job, other) if job.config["match"] == "params" else _time(job, other, measure)
    if aloud:
        progress("match", line)
    return new


def _is_control(cfg: Config) -> bool:
    solver, stop = (cfg[part]["_target_"].rpartition(".")[2] for part in ("solver", "stop"))
    return (solver, stop, cfg["field"]) == ("Picard", "FixedSteps", "equilibrium")


def _other(job: Composed, search: Sequence[str]) -> Config:
    """The model that the job is matched to, on the same network and data, under the same recipe."""
    name, known = job.config["match_to"], files("model", search)
    if name not in known:
        raise UsageError(f"no model {name!r} for match_to{nearest(name, [*known])} (implicit-bench list models)")
    words = [word for word in job.overrides if not _says(word, *OWN, "network.untied")]
    other = config.compose("train", [*words, f"model={name}"], search).config
    other |= {key: job.config[key] for key in ("network", "recipe", "dataset", "gpu", "seed")}
    if "untied" in other["network"]:
        other["network"] = {**other["network"], "untied": 0}
    if _is_control(other):
        raise UsageError(f"match_to={name} is a control itself; name an implicit model, such as match_to=deq")
    return other


def _says(word: str, *keys: str) -> bool:
    return any(f"{word.partition('=')[0].lstrip('+')}.".startswith(f"{key}.") for key in keys)


def total(cfg: Config) -> int:
    with torch.device("meta"):  # where nothing is computed
        return sum(config.build(cfg).model.parameter_counts().values())


def _params(job: Composed, other: Config) -> tuple[Composed, str]:
    cfg, target, network = job.config, total(other), job.config["network"]
    name, to = f"{cfg['model']['name']} ×{cfg['stop']['steps']}", f"{other['model']['name']} {target:,}"
    if total(cfg) == target:
        return job, f"{name}: {target:,} parameters as it is, {to}"
    widths = _widths(job)
    sizes = [w for value in widths.values() for w in (value if isinstance(value, list) else [value])]

    def grown(most: int) -> list[Fraction]:
        """The factors up to `most` at which a width, rounded, becomes one more: between two of them nothing changes."""
        return [Fraction(0), *sorted({Fraction(2 * j - 1, 2 * w) for w in sizes for j in range(2, most * w + 1)})]

    @functools.cache
    def parameters(factor: Fraction) -> int:
        return total({**cfg, "network": {**network, **scaled(widths, factor)}})

    def gap(i: int) -> int:
        return abs(parameters(factors[i]) - target)

    most, factors = 1, grown(1)
    while parameters(factors[-1]) < target:  # a learned start has parameters that explicit lacks
        factors = grown(most := 2 * most)
    at = max(bisect_left(factors, target, key=parameters) - 1, 0)
    # and on from there, as a total may jump: a shortcut is no parameters where its two ends are equally wide
    while (near := min(range(max(at - 1, 0), min(at + 2, len(factors))), key=gap)) != at:
        at = near
    found, now = scaled(widths, factors[at]), parameters(factors[at])
    shown = ", ".join(f"{key} {value}" for key, value in found.items())
    line = f"{name} with {shown}: {now:,} parameters, {to} ({now / target - 1:+.1%})"
    return replace(job, config={**cfg, "network": {**network, **found}}), line


def scaled(value: Any, factor: Fraction) -> Any:
    """Every number of it times the factor, rounded, at least 1."""
    if isinstance(value, dict):
        return {key: scaled(v, factor) for key, v in value.items()}
    if isinstance(value, list):
        return [scaled(v, factor) for v in value]
    return max(1, floor(factor * value + Fraction(1, 2)))  # a half is rounded up


def _widths(job: Composed) -> Config:
    """The settings that the network's class calls widths, as they are."""
    node = job.config["network"]
    cls = locate(node["_target_"], "network", job.config["allow_targets"])
    if not getattr(cls, "widths", ()):
        raise UsageError(f"match=params scales the widths of a network, but network={job.choices['network']} does not "
                         f"say which they are; give {cls.__name__} a line such as widths = ('hidden',)")  # fmt: skip
    found = {key: node.get(key, inspect.signature(cls).parameters[key].default) for key in cls.widths}
    if None in found.values():  # the network's own choice for the data set
        dataset = config.make(job.config["dataset"], "dataset")
        with torch.device("meta"):
            made = config.make(node, "network", shape=dataset.shape, classes=dataset.classes)
        found = {key: getattr(made, key) if value is None else value for key, value in found.items()}
    return {key: [*value] if isinstance(value, tuple) else value for key, value in found.items()}


def _time(job: Composed, other: Config, measure: bool) -> tuple[Composed, str]:
    cfg, name, to = job.config, job.config["model"]["name"], other["model"]["name"]
    if given := next((w for w in job.overrides if _says(w, "stop.steps", "network.untied")), None):
        raise UsageError(f"match=time finds stop.steps itself, so that {given} cannot be; leave one of them out")
    settings = config.make(cfg["gpu"], "gpu").settings()
    apart = record.LABELS | record.MEASURING | {"seed"}  # one depth for all seeds, in train and in bench
    pair = [{**{k: v for k, v in c.items() if k not in apart}, "gpu": settings} for c in (_at(cfg, 1), other)]
    facts = machine.fingerprint()
    key = record.run_id({"pair": pair, "machine": [facts[fact] for fact in ("cpu", "cores", "gpu", "torch", "cuda")]})
    path = Path(cfg["paths"]["runs"], ".matched.json")
    found = _kept(path).get(key)
    if found is None and not measure:
        line = f"{name}: match=time is measured when the job runs; a step is then as long as one of {to}"
        return replace(job, config=_at(cfg, None), alike=other), line
    if found is None:
        record.writable("paths.runs", path.parent)
        found = {"model": name, "match_to": to, **_depth(cfg, other)}
        with record.whole(path) as file:
            file.write(json.dumps({**_kept(path), key: found}, indent=1).encode() + b"\n")
    line = f"{name} ×{found['steps']}: {found['step_ms']:.3g} ms a step, {to} {found['match_to_ms']:.3g} ms"
    return replace(job, config=_at(cfg, found["steps"])), line


def _at(cfg: Config, k: int | None) -> Config:
    """The control with k applications, and as many cells if they are untied."""
    network = {**cfg["network"], "untied": k} if cfg["network"].get("untied") else cfg["network"]
    return {**cfg, "stop": {**cfg["stop"], "steps": k}, "network": network}


def _kept(path: Path) -> Config:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UsageError(f"{path} is no valid JSON; delete it, and depths are measured again") from None


def _depth(cfg: Config, other: Config) -> Config:
    """The whole k whose step is nearest to the other's on the line through two depths, the second one near it."""
    few, k = 2, NEAR
    for seconds in (SECONDS / 5, SECONDS):
        many = min(max(k, NEAR), FAR)
        goal, a, b = initial_ms([other, _at(cfg, few), _at(cfg, many)], seconds)
        slope = (b - a) / (many - few)
        k = max(1, round(few + (goal - a) / slope)) if slope > 0 else NEAR
    if slope <= 0:
        raise UsageError(f"{many} applications took {b:.3g} ms a step and {few} {a:.3g} ms, so that no k can be told; "
                         "try again when the machine is quiet, or give stop.steps instead of match=time")  # fmt: skip
    return {"steps": k, "step_ms": a + slope * (k - few), "match_to_ms": goal}
