"""`implicit-bench check`: the conformance kit on what the command line names."""

from __future__ import annotations

from typing import Any

import torch

from . import config, terminal, testing
from .report import tables
from .schema import UsageError
from .terminal import card, say

KINDS = ("solver", "adjoint", "network")
READ = (*KINDS, "dataset", "model", "protocol", "seed", "allow_targets")


def check(job: config.Composed) -> int:
    """Check each component that an override names, or all three; 0, or 1 when a check failed."""
    heads = {o.key_or_group.partition(".")[0]: o.input_line for o in config.parse(job.overrides)}
    if idle := [word for head, word in heads.items() if head not in READ]:
        raise UsageError(f"check tries a solver, an adjoint and a network by themselves, so that {idle[0]!r} would "
                         "change nothing; leave it out")  # fmt: skip
    if "dataset" in heads and heads.keys() & set(KINDS) and "network" not in heads:
        raise UsageError(f"{heads['dataset']!r} sizes a network, and none is named; add network= or leave it out")
    torch.set_num_threads(1)  # the problems are tiny
    made = {kind: _make(job, kind) for kind in KINDS if kind in heads or not heads.keys() & set(KINDS)}
    found = {f"{kind}={job.choices[kind]}": _card(f"{kind}={job.choices[kind]}", job.config[kind], *it)
             for kind, it in made.items()}  # fmt: skip
    if terminal.format != "text":
        rows = [[name, r.name, r.passed, r.sentence] for name, results in found.items() for r in results]
        tables.show(["component", "check", "passed", "found"], rows)
    return int(not all(r.passed for results in found.values() for r in results))


def _make(job: config.Composed, kind: str) -> tuple[Any, ...]:
    """The component, and what its checks need beside it. Mistakes come out before anything is tried."""
    if kind != "network":
        return (config.make(job.config[kind], kind),)
    data = config.make(job.config["dataset"], "dataset")
    torch.manual_seed(job.config["seed"])
    network = config.make(job.config["network"], "network", shape=data.shape, classes=data.classes)
    return network, data.shape, data.classes


def _card(name: str, settings: dict[str, Any], component: Any, *beside: Any) -> list[Any]:
    said = [f"{key}={value}" for key, value in settings.items() if key != "_target_"]
    say("check", " · ".join([name, str(settings["_target_"]), *said]))
    results = getattr(testing, f"check_{name.partition('=')[0]}")(component, *beside)
    passed = sum(map(bool, results))
    if terminal.format == "text":
        card([(r.passed, r.name, r.sentence) for r in results])
        print(f"{name}: {passed} of {len(results)} checks passed", flush=True)
    return [*results]
