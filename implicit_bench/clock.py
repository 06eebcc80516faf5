"""Measuring time so that the numbers can be believed. Imports torch and the standard library only.

Units are in the names (`_ms`, `_s`). Nothing here synchronises a GPU inside a step.
"""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .machine import is_cuda, told

MIN_ROUNDS = 40  # below this a ratio gets no verdict


class StepTimer:
    """Times the parts of a step: `start()`, `lap("forward")`, `lap("backward")`; a lap runs from the mark before it.

    CPU: perf_counter_ns. CUDA: events on the device's current stream, read later, so that a step never waits for them.
    A name lapped twice in a step adds up (gradient accumulation); `skip()` leaves the time since the last mark out.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._cuda = is_cuda(device)
        self._steps: list[list[tuple[str | None, Any]]] = []  # a step is its marks: (lap that ends here, ns or event)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        new: Any = torch.cuda.Event
        event = new(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # record() alone takes the current device's, maybe another
        return event

    def start(self) -> None:
        self._steps.append([(None, self._mark())])

    def lap(self, name: str) -> None:
        self._steps[-1].append((name, self._mark()))

    def skip(self) -> None:
        self._steps[-1].append((None, self._mark()))

    def _laps(self, step: list[tuple[str | None, Any]]) -> dict[str, float]:
        laps: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in pairwise(step):
            if name is not None:
                laps[name] += before.elapsed_time(after) if self._cuda else (after - before) / 1e6
        return dict(laps)

    def read(self) -> dict[str, float]:
        """The latest step's laps in ms; on CUDA it waits for them. Forgets every step so far."""
        step, self._steps = self._steps[-1], []
        if self._cuda:
            step[-1][1].synchronize()
        return self._laps(step)

    def drain(self, wait: bool = False) -> dict[str, list[float]]:
        """The laps of all finished steps in ms, by name, each step given once. Call it between steps.

        On CUDA a step that the GPU has not finished is left for the next call, unless `wait` (the end of a run).
        """
        if wait and self._cuda and self._steps:
            self._steps[-1][-1][1].synchronize()
        out: dict[str, list[float]] = defaultdict(list)
        while self._steps and (not self._cuda or self._steps[0][-1][1].query()):
            for name, ms in self._laps(self._steps.pop(0)).items():
                out[name].append(ms)
        return dict(out)


@contextmanager
def _no_gc() -> Iterator[None]:
    """The collector off, its state restored after. What lives now is frozen, so that a collect() inside stays cheap."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


@dataclass(frozen=True)
class WarmUp:
    settled: bool  # two successive passes agreed; when False, say so beside the figures
    times: list[float]  # s, every pass; compilation and autotuning are in the first


def warm_up(run: Callable[[], float], *, max_passes: int = 10) -> WarmUp:
    """Run passes, each of which returns its seconds, until two in turn agree within 2 %, `max_passes` at most."""
    times: list[float] = []
    while len(times) < max_passes:
        times.append(run())
        if len(times) > 1 and abs(times[-1] - times[-2]) <= 0.02 * max(times[-2:]):
            return WarmUp(True, times)
    return WarmUp(False, times)


@dataclass(frozen=True)
class Samples:
    """What `interleave` measured: `rows[row][measure]` has one value a round; entry i is round i in every list."""

    rows: dict[str, dict[str, list[float]]]
    failed: dict[str, str]  # row -> error; a failed row has no figures
    rounds: int
    seconds: float
    interrupted: bool


def _order(k: int, r: int) -> list[int]:
    """Round r of a Williams square: over k rounds (2k for odd k) each row directly follows each other equally often."""
    order = [((j + 1) // 2 if j % 2 else -j // 2) + r for j in range(k)]
    return [i % k for i in (reversed(order) if k % 2 and (r // k) % 2 else order)]


def interleave(
    rows: Mapping[str, Callable[[], dict[str, float]]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    on_round: Callable[[int, dict[str, dict[str, float]]], None] | None = None,
) -> Samples:
    """Time rows in paired rounds: a round calls every row once, in an order that balances who follows whom.

    Ends after `rounds`, or between rounds once `seconds` are spent (the first is always whole); Ctrl-C returns what
    whole rounds there are. A row that raises, or whose measures change, goes to `failed`; the others go on.
    `on_round(rounds done, this round)` is called between rounds, outside every timing.
    """
    if rounds is None and seconds is None:
        raise ValueError("interleave needs rounds, seconds or both; else it never ends")
    done: list[dict[str, dict[str, float]]] = []  # a round enters whole or not at all, whenever Ctrl-C comes
    failed: dict[str, str] = {}
    begin, interrupted, alive, grad = time.perf_counter(), False, list(rows), torch.is_grad_enabled()
    with _no_gc():
        try:
            while alive and len(done) != rounds:
                if done and seconds is not None and time.perf_counter() - begin >= seconds:
                    break
                this: dict[str, dict[str, float]] = {}
                for name in [alive[i] for i in _order(len(alive), len(done))]:
                    try:
                        this[name] = dict(rows[name]())
                        if done and this[name].keys() != done[0][name].keys():
                            raise ValueError(f"measures changed from {[*done[0][name]]} to {[*this[name]]}")
                    except Exception as error:  # whatever one row does, the others are worth having
                        failed[name] = told(error)
                alive = [name for name in alive if name not in failed]
                if alive:
                    done.append({name: this[name] for name in alive})
                    if on_round is not None:
                        on_round(len(done), done[-1])
                gc.collect()  # else autograd's cycles would pile up for as long as the collector is off
        except KeyboardInterrupt:
            interrupted = True
            torch.set_grad_enabled(grad)  # between the entry of a no_grad and its body it would stay off
    ok = [name for name in rows if name not in failed]
    figures = {name: {m: [r[name][m] for r in done] for m in (done[0][name] if done else ())} for name in ok}
    return Samples(figures, failed, len(done), time.perf_counter() - begin, interrupted)


def summary(values: Sequence[float]) -> dict[str, float]:
    """{median, p10, p90, n}; quantiles interpolate linearly."""
    if not len(values):
        raise ValueError("summary of no values")
    q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist()
    return {"median": q[0], "p10": q[1], "p90": q[2], "n": len(values)}


@dataclass(frozen=True)
class Ratio:
    value: float  # median of a / b by round; above 1, b is faster
    low: float
    high: float
    n: int
    verdict: str  # "too few rounds", "no difference", "faster" or "slower" (of b)


def _t_over_z(p: float, df: float) -> float:
    """Student's t quantile over the normal's, by the Cornish-Fisher series (error under 1 % for df >= 3)."""
    z = math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item()
    s = z * z
    terms = ((s + 1) / 4, ((5 * s + 16) * s + 3) / 96, (((3 * s + 19) * s + 17) * s - 15) / 384)
    return 1 + sum(c / df**k for k, c in enumerate(terms, 1))


def ratio(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Ratio:
    """Median of a / b over paired rounds with a moving-block bootstrap interval; the times must be above 0.

    The median, so that a hiccup is nothing, of the rounds' quotients, so that what moves both rows of a round cancels,
    a trend in their evaluations too. Resamples draw blocks of 2 n^(1/3) successive rounds, which may wrap past the end
    (Politis and Romano 1992). The log ratio's percentiles are stretched about the estimate by t/z at n/block - 1
    degrees of freedom, since there are only so many blocks. The interval means little under `MIN_ROUNDS`.

    Coverage at 95 %: AR(1) log-normal times, 5 % sd, whatever share of it is common; 3 seeds x 2000, * 1 x 1000:
        rho          0     .3     .6    .8*   .9*
        n = 40     .951   .940   .908   .83   .70
        n = 60     .956   .943   .914
        n = 180*   .936   .938   .933
    rho is that of the quotients, which is small where rows drift together: .14 where the times themselves have .77.
    Blocks of 3 n^(1/3): .95 .95 .93 at n = 40, a third wider than the estimate's own spread needs.
    """
    n = len(a)
    if n != len(b) or not n:
        raise ValueError(f"a ratio needs the same rounds of both rows, at least one; got {n} and {len(b)}")
    pair = torch.tensor([list(a), list(b)], dtype=torch.float64)
    if not (pair.isfinite() & (pair > 0)).all():
        raise ValueError("a ratio needs finite times above 0")
    block = max(1, min(round(2 * n ** (1 / 3)), n // 4))
    starts = torch.randint(n, (resamples, -(-n // block), 1), generator=torch.Generator().manual_seed(seed))
    index = ((starts + torch.arange(block)) % n).flatten(1)[:, :n] + n * torch.arange(resamples)[:, None]
    # How often each resample drew each round. Medians by counting cost a quarter of sorting.
    counts = torch.bincount(index.flatten(), minlength=resamples * n).view(resamples, n)
    ranks = ((n + 1) // 2, n // 2 + 1)  # the two middle ones, equal when n is odd
    values, order = (pair[0] / pair[1]).log().sort()
    at_or_below = counts[:, order].cumsum(1)
    centre = (values[ranks[0] - 1] + values[ranks[1] - 1]) / 2
    drawn = (values[(at_or_below < ranks[0]).sum(1)] + values[(at_or_below < ranks[1]).sum(1)]) / 2
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    ends = (drawn.quantile(tails) - centre) * _t_over_z((1 + level) / 2, max(3, n / block - 1))
    low, high = (centre + torch.stack([ends[0].clamp(max=0), ends[1].clamp(min=0)])).exp().tolist()
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return Ratio(centre.exp().item(), low, high, n, verdict if n >= MIN_ROUNDS else "too few rounds")


def unit_cost(fn: Callable[[], object], *, device: str | torch.device, min_time_s: float = 0.2) -> float:
    """Median ms of one call of `fn` alone in its own loop, for about `min_time_s` (but three groups at least).

    Calls are timed in groups of min_time_s / 20, so that reading the clock costs nothing beside a 20 us call; on CUDA a
    group is one pair of events, so that launches overlap as in a step. Finding the group's size is the warm-up.
    """
    timer = StepTimer(device)

    def group(calls: int) -> float:
        timer.start()
        for _ in range(calls):
            fn()
        timer.lap("ms")
        return timer.read()["ms"]

    with _no_gc():
        calls = 1
        group(1)  # compilation, first-time allocation
        while group(calls) < min_time_s * 1e3 / 20:
            calls *= 2
        groups: list[float] = []
        while sum(groups) < min_time_s * 1e3 or len(groups) < 3:
            groups.append(group(calls))
    return summary(groups)["median"] / calls
