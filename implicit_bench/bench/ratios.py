"""Ratios between rows and what explains them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from .. import clock
from ..clock import Ratio
from ..papers import Table
from ..record import CONVERGED_ENOUGH
from ..report.ratios import NOT_CONVERGED, too_wide, verdict
from ..terminal import number
from .claims import OF_TESTS, asked

EQUAL = 1e-4  # of the largest logit, in float32


class Prices(NamedTuple):
    """ms of one call, each alone in a loop of its own."""

    f: float  # without a graph
    f_graph: float  # while autograd records it
    vjp: float  # on a kept graph, to the state alone
    vjp_all: float  # to the parameters and x as well


@dataclass(frozen=True)
class Figures:
    """What is known of a row when its rounds are done."""

    label: str
    name: str  # by which claims know it: a table's row, else the model
    model: str
    times: Mapping[str, Sequence[float]]  # measure -> ms a step by round; nfe: evaluations a forward
    means: Mapping[str, float]  # of train.Tally
    price: Prices
    parameters: int
    solver: Mapping[str, Any]
    adjoint: str
    ends_at_residual: bool
    memory: Mapping[str, Sequence[float]] = field(default_factory=dict)  # readings of train and predict, MiB
    flops: float | None = None  # of a training step
    val_acc: float | None = None
    peer_of: str = ""  # the label of our row that this one of another library is beside
    own_ms: float | None = None  # of a step: the solvers' own arithmetic, beside f and VJPs
    logits: Tensor | None = None  # (B, classes) of a batch at the initial weights

    def median(self, measure: str) -> float:
        return clock.summary(self.times[measure])["median"]

    def mib(self, of: str) -> float | None:
        return median(self.memory[of]) if self.memory.get(of) else None

    @property
    def f_calls(self) -> float:
        return self.means["nfe_forward"] + self.means["calls_backward"]

    @property
    def by_f(self) -> float:
        """ms a step of all calls of f."""
        recorded = self.means["recorded"]
        return (self.f_calls - recorded) * self.price.f + recorded * self.price.f_graph

    @property
    def by_vjp(self) -> float:
        """ms a step of all VJPs."""
        narrow = self.means["narrow"]
        return narrow * self.price.vjp + (self.means["nfe_backward"] - narrow) * self.price.vjp_all

    @property
    def floor_ms(self) -> float:
        """Counted work at unit cost: what a step would take if nothing but f and its VJPs took time."""
        return self.by_f + self.by_vjp

    @property
    def priced(self) -> bool:
        """A step cannot be faster than its parts: if it seems so, the prices were taken in a bad moment."""
        return self.floor_ms <= self.median("train")

    @property
    def converged(self) -> bool:
        return not self.ends_at_residual or self.means["converged_fraction"] >= CONVERGED_ENOUGH


@dataclass(frozen=True)
class Comparison:
    id: str  # R1..R9, H2, H3, or a dash for a pair that no claim is about
    slower: Figures
    faster: Figures
    measure: str
    paper: str
    ratio: Ratio

    @property
    def caveats(self) -> list[str]:
        found = [f"{row.label} {NOT_CONVERGED}" for row in (self.slower, self.faster) if not row.converged]
        if self.id == "peer" and self.faster.ends_at_residual:
            ours, theirs = (number(row.means["residual"], 2) for row in (self.faster, self.slower))
            found.append(f"residual {ours} against its {theirs}")
        if self.id in ("R1", "R1b", "R2", "R2b", "R6") and dict(self.slower.solver) != dict(self.faster.solver):
            found.append("different solvers or stepping tolerances")
        if self.id == "H2":  # which of them keeps its steps for the backward, and how many
            found += [f"{row.label} by {row.adjoint}, {row.f_calls:.0f} f" for row in (self.slower, self.faster)]
        if self.measure == "memory" and self.ratio.n > 1:
            return [*found, f"readings {self.ratio.low:.2f} to {self.ratio.high:.2f}"]
        return found + too_wide(self.ratio.verdict, self.ratio.low, self.ratio.high)

    def explained(self) -> dict[str, float] | None:
        """The saving of a training step, ms, and its parts: fewer calls of f, fewer VJPs, the solvers' own arithmetic
        where it was measured, the rest.

        None for a ratio of other times, and where the prices cannot be right.
        """
        a, b = self.slower, self.faster
        if self.measure != "train" or not (a.priced and b.priced):
            return None
        saved = a.median("train") - b.median("train")
        f, vjp = a.f_calls - b.f_calls, a.means["nfe_backward"] - b.means["nfe_backward"]
        by_f, by_vjp = a.by_f - b.by_f, a.by_vjp - b.by_vjp
        own = {} if a.own_ms is None or b.own_ms is None else {"own_ms": a.own_ms - b.own_ms}
        return {"saved_ms": saved, "f": f, "vjps": vjp, "f_ms": by_f, "vjp_ms": by_vjp, **own,
                "other_ms": saved - by_f - by_vjp - sum(own.values())}  # fmt: skip

    def why(self) -> str:
        e = self.explained()
        if not e or not e["saved_ms"]:
            return ""
        saved = e["saved_ms"]

        def part(count: float, ms: float, what: str) -> str:
            return f"{abs(count):.1f} {'fewer' if count >= 0 else 'more'} {what} ({ms / saved:.0%})"

        verb = "saves" if e["saved_ms"] > 0 else "costs"
        own = f"the solvers' own arithmetic ({e['own_ms'] / saved:.0%}), " if "own_ms" in e else ""
        return (f"{self.faster.label} {verb} {number(abs(e['saved_ms']))} ms a step against {self.slower.label}: "
                f"{part(e['f'], e['f_ms'], 'f')}, {part(e['vjps'], e['vjp_ms'], 'VJPs')}, "
                f"{own}other ({e['other_ms'] / e['saved_ms']:.0%})")  # fmt: skip

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "numerator": self.slower.label, "denominator": self.faster.label,
                "measure": self.measure, "paper": self.paper, **asdict(self.ratio), "caveats": self.caveats,
                "explained": self.explained()}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The rows at one point of their training."""

    at: int | None  # steps; None: as they train from the first step on
    figures: list[Figures]
    found: list[Comparison]
    rounds: int
    seconds: float
    interrupted: bool
    steps: int  # a round
    unsettled: list[str]
    cold_s: float


def comparisons(rows: Sequence[Figures], table: Table | None = None) -> list[Comparison]:
    """Every claim that the rows support; then, of a free list, the first row over each that no claim has compared; then
    other libraries over ours."""
    peers, rows = [row for row in rows if row.peer_of], [row for row in rows if not row.peer_of]
    by_name = {row.name: row for row in rows}
    timed = [c for c in asked(table) if c.measure not in OF_TESTS and len(by_name) == len(rows)]
    found = [_compare(c.id, by_name[c.slower], by_name[c.faster], c.measure, c.paper(table)) for c in timed
             if c.slower in by_name and c.faster in by_name]  # fmt: skip
    found = [c for c in found if c.measure != "logits" or c.ratio.value == c.ratio.value]
    told = {row.label for c in found for row in (c.slower, c.faster)}
    found += [_compare("–", rows[0], row, "train", "") for row in rows[1:] if row.label not in told and not table]
    by_label = {row.label: row for row in rows}
    return found + [_compare("peer", peer, by_label[peer.peer_of], measure, "") for peer in peers
                    for measure in ("train", "predict") if peer.peer_of in by_label]  # fmt: skip


def _compare(id: str, a: Figures, b: Figures, measure: str, paper: str) -> Comparison:
    special = {"memory": _memory, "logits": _logits}.get(measure)
    found = special(a, b) if special else clock.ratio(a.times[measure], b.times[measure])
    return Comparison(id, a, b, measure, paper, found)


def _single(value: float, word: str) -> Ratio:
    return Ratio(value, value, value, 1, "not measured" if math.isnan(value) else word)


def _memory(a: Figures, b: Figures) -> Ratio:
    """Of median readings; low and high are those of any two readings that were made, no confidence interval: rows that
    are alike are told apart by three readings each in one case of ten."""
    x, y = a.memory.get("train", []), b.memory.get("train", [])
    if not (x and y and min(*x, *y) > 0):
        return _single(math.nan, "")
    low, high = min(x) / max(y), max(x) / min(y)
    return Ratio(median(x) / median(y), low, high, min(len(x), len(y)), verdict(low, high))


def _logits(a: Figures, b: Figures) -> Ratio:
    """Largest difference over the largest logit, of one batch at the same weights."""
    if a.logits is None or b.logits is None:
        return _single(math.nan, "")
    value = float((a.logits - b.logits).abs().max() / b.logits.abs().max())
    return _single(value, "equal" if value <= EQUAL else "not equal")
