"""The three comparisons of training records, kept apart, and the arithmetic of their ratios. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, geometric_mean, median_low, stdev
from typing import Any

from ..bench.claims import CLAIMS, OF_TESTS, Claim
from ..jsonl import read_jsonl
from ..record import CONVERGED_ENOUGH
from ..report.ratios import NOT_CONVERGED, Line, too_wide, verdict
from .rows import Row, Run

MEASURES = ("step", "epochs", "accuracy")
CUT = "not the experiment's own recipe and data"  # a caveat of these
WINDOW, SHARE = 3, 0.99  # epochs that are smoothed over; of the base's final accuracy, what the others have to reach


class Unknown(Exception):
    """The records do not hold this figure; a few words say why."""


@dataclass
class Trained:
    """What one record says of time and accuracy.

    Smoothed validation accuracy is the lower median of the last WINDOW epochs (of the second epoch and the first, the
    lower; of the first, itself), so that from the second epoch on one lucky epoch is no arrival and one unlucky last
    epoch lowers no target; it is always an accuracy that was measured. Training time runs by whole epochs, without
    validation, checkpoints and the first, cold step.
    """

    run: Run

    @property
    def errors(self) -> float:
        """The share of the test split that it gets wrong."""
        return 1 - self.run.record["metrics"]["test_acc"]

    @property
    def step_ms(self) -> float:
        return self.run.record["timing"]["step_ms"]["median"]

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.run.history) if "epoch" in row]

    @cached_property
    def seconds(self) -> list[float]:
        """Training time at the end of each epoch. Raises Unknown."""
        if not self.epochs:
            raise Unknown("no metrics.jsonl beside the record")
        total, found = -(self.run.record["timing"]["cold_s"] or 0.0), []
        for row in self.epochs:
            if row.get("timing.epoch_s") is None:
                raise Unknown(f"epoch {row['epoch']} of seed {self.run.seed} was not timed whole")
            found.append(total := total + row["timing.epoch_s"])
        return found

    @cached_property
    def smoothed(self) -> list[float]:
        """Validation accuracy after each epoch. Raises Unknown."""
        values: list[Any] = [row.get("metrics.val_acc") for row in self.epochs]
        if not values or None in values:
            raise Unknown("no validation split" if values else "no metrics.jsonl beside the record")
        return [median_low(values[max(0, k - WINDOW) : k]) for k in range(1, len(values) + 1)]

    def reached(self, target: float) -> float | None:
        """Training time, s, at which the smoothed accuracy first is `target`; None: not within the run."""
        return next((s for s, acc in zip(self.seconds, self.smoothed) if acc >= target), None)


@dataclass
class Pair:
    """The base and a row against it, by the seeds that both have."""

    base: Row
    other: Row
    a: dict[int, Trained] = field(init=False)
    b: dict[int, Trained] = field(init=False)

    def __post_init__(self) -> None:
        self.seeds = sorted(self.base.runs.keys() & self.other.runs.keys())
        self.a, self.b = ({seed: Trained(row.runs[seed]) for seed in self.seeds} for row in (self.base, self.other))

    @property
    def measures(self) -> list[str]:
        return [*MEASURES, *(measure for measure in OF_TESTS if self._claim(measure))]

    def _claim(self, measure: str) -> Claim | None:
        about = self.base.first.model, self.other.first.model, measure if measure in OF_TESTS else "train"
        return next((c for c in CLAIMS if (c.slower, c.faster, c.measure) == about), None)

    def times(self, measure: str) -> list[tuple[float, float]]:
        """(base's, the other's) a seed, in one unit; shares of errors for those of tests. Raises Unknown."""
        if measure in OF_TESTS:
            wrong = [(self.a[s].errors, self.b[s].errors) for s in self.seeds]
            if not all(a and b for a, b in wrong):
                raise Unknown("no test error to divide by")
            return wrong
        if measure == "step":
            return [(self.a[s].step_ms, self.b[s].step_ms) for s in self.seeds]
        if measure == "epochs":
            return [(self.a[s].seconds[-1], self.b[s].seconds[-1]) for s in self.seeds]
        found, late = [], []
        for seed in self.seeds:
            a, b = (t.reached(SHARE * self.a[seed].smoothed[-1]) for t in (self.a[seed], self.b[seed]))
            late += [] if b is not None else [seed]
            found.append((a, b))
        if late:  # the seeds that got there would flatter it
            whose = "" if len(late) == len(self.seeds) else f" by seed {', '.join(map(str, late))}"
            raise Unknown(f"not reached in {len(self.b[late[0]].epochs)} epochs{whose}")
        return found  # type: ignore[return-value]

    def record(self, measure: str) -> dict[str, Any]:
        """One comparison, as bench's records have theirs; value None where there is none, and `verdict` says why."""
        claim = self._claim(measure)
        found: dict[str, Any] = {
            "id": claim.id if claim else "–", "numerator": self.base.label, "denominator": self.other.label,
            "measure": measure, "paper": claim.paper(None) if claim and measure == "step" else "",
            "value": None, "low": None, "high": None, "n": len(self.seeds), "seeds": {},
        }  # fmt: skip
        try:
            times = self.times(measure)
            if measure == "spread":
                found |= spread(times)
            else:
                found |= ratio(times)
                found["seeds"] = {str(seed): a / b for seed, (a, b) in zip(self.seeds, times)}
        except Unknown as why:
            found["verdict"] = str(why)
        return {**found, "caveats": self._caveats(found)}

    def _caveats(self, found: dict[str, Any]) -> list[str]:
        runs = [t.run for side in (self.a, self.b) for t in side.values()]
        caveats = [f"{row.label} {NOT_CONVERGED}" for row, side in ((self.base, self.a), (self.other, self.b))
                   if not all(converged(t.run.record) for t in side.values())]
        caveats += [f"{row.label} diverged with seed {', '.join(map(str, row.diverged))}"
                    for row in (self.base, self.other) if row.diverged]  # fmt: skip
        settings = [row.first.record["config"] for row in (self.base, self.other)]
        if found["id"] == "R1" and settings[0]["solver"] != settings[1]["solver"]:
            caveats.append("different solvers or stepping tolerances")
        if len({(run.record["environment"]["git"] or "").rstrip("+") for run in runs}) > 1:
            caveats.append("of different commits")
        if found["measure"] != "step" and any(run.record["resumed_from"] for run in runs):
            caveats.append("some resumed")
        if found["measure"] in MEASURES and None in [run.record["environment"]["alone"] for run in runs]:
            caveats.append("load unknown")  # too short to tell, or a system that does not say
        return caveats + (too_wide(found["verdict"], found["low"], found["high"]) if found["low"] else [])


def converged(rec: Mapping[str, Any]) -> bool:
    """Whether solves ended as their stopping rule wants, or have none to meet."""
    share = rec["solve"]["converged_fraction"]
    return share is None or share >= CONVERGED_ENOUGH


def line(found: dict[str, Any]) -> Line:
    keys = ("id", "numerator", "denominator", "measure", "value", "low", "high", "verdict", "paper", "caveats")
    return Line(*(found[key] for key in keys))


def ratio(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Geometric mean of a / b over pairs, and Student's 95 % interval of its logarithm: value, low, high, verdict."""
    logs = [math.log(a / b) for a, b in times]
    centre = fmean(logs)
    if len(logs) < 2:
        return {"value": math.exp(centre), "verdict": "one seed"}
    half = t_quantile(0.95, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(centre - half), math.exp(centre + half)
    return {"value": math.exp(centre), "low": low, "high": high, "verdict": verdict(low, high)}


def spread(errors: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Ratio of standard deviations over seeds, and its 95 % interval by F(d, d), d seeds less one: value, low, high,
    verdict. Quantiles of F(d, d) are Student's: t_d = sqrt(d) / 2 (sqrt(F) - 1 / sqrt(F)) (Cacoullos 1965)."""
    if len(errors) < 2:
        raise Unknown("one seed")
    a, b = (stdev(side) for side in zip(*errors))
    if not a or not b:
        raise Unknown("no spread to divide by")
    t = t_quantile(0.95, len(errors) - 1) / math.sqrt(len(errors) - 1)
    root = t + math.sqrt(t * t + 1)
    low, high = a / b / root, a / b * root
    return {"value": a / b, "low": low, "high": high, "verdict": verdict(low, high)}


def t_quantile(level: float, df: int) -> float:
    """t with P(|T| < t) = level, to 1e-9; the finite series in the angle, Abramowitz and Stegun 26.7.3 and 26.7.4.

    clock's series is for the many degrees of freedom of a bench; here one or two are the rule."""

    def inside(angle: float) -> float:
        s, c2 = math.sin(angle), math.cos(angle) ** 2
        odd = df % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(1 + odd, df, 2):
            total += term
            term *= c2 * k / (k + 1)
        return (angle + s * total) * 2 / math.pi if odd else s * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan(high)


def of_row(row: Row, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The figures of a row over the seeds that are compared: means, of times the geometric, whose quotients the ratios
    are; None for what is not known."""
    side = [pair.a if row is pair.base else pair.b for pair in pairs if row in (pair.base, pair.other)]
    trained = {seed: t for found in side for seed, t in found.items()}
    targets = {seed: pair.a[seed] for pair in pairs for seed in pair.seeds}
    recs = [t.run.record for t in trained.values()]

    def mean(section: str, key: str) -> float | None:
        values = [rec[section][key] for rec in recs]
        return None if None in values else fmean(values)

    def time(of: Any) -> float | None:
        try:
            values = [of(seed, t) for seed, t in sorted(trained.items())]
        except Unknown:
            return None
        return None if None in values else geometric_mean(values)

    return {
        "label": row.label, "model": row.first.model, "seeds": sorted(trained),
        "diverged": list(row.diverged),
        "runs": [t.run.name for _, t in sorted(trained.items())], "epochs": recs[0]["epochs"],
        "metrics": {key: mean("metrics", key) for key in ("val_acc", "test_acc")},
        "solve": {key: mean("solve", key) for key in ("nfe_forward", "nfe_backward", "converged_fraction")},
        "timing": {"step_ms": time(lambda _, t: t.step_ms), "train_s": time(lambda _, t: t.seconds[-1]),
                   "target_s": time(lambda seed, t: t.reached(SHARE * targets[seed].smoothed[-1]))},
    }  # fmt: skip
