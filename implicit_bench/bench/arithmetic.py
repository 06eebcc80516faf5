"""What a solver does beside f and its VJPs: sums, norms and inner products of its vectors."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..adjoints.base import Corrected
from .rows import Row

AGAIN_S = 0.05  # for steps beyond the first, which comes after another row's and is slower than those of a round
OWN = ("layer", "correction")  # the solve forward and the one of the backward, less what else is timed within


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def arithmetic_ms(row: Row) -> float | None:
    """ms of a training step that go by inside the solves, but in no call of f and no VJP; leaves no trace.

    None where calls cannot be told apart by a clock: on a GPU, of a compiled cell, in another library's loop. What
    autograd makes of an unrolled solver's arithmetic is not in it.
    """
    layer: Any = row.model.layer
    if row.device.torch.type != "cpu" or row.device.compile or not hasattr(layer, "last_call"):
        return None
    spent: dict[str, float] = defaultdict(float)
    within: list[float] = []  # of each call that is going on, the time that those inside it took

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **given: Any) -> Any:
            began = time.perf_counter()
            within.append(0.0)
            try:
                return call(*args, **given)
            finally:
                whole = time.perf_counter() - began
                spent[name] += whole - within.pop()
                if within:
                    within[-1] += whole

        return wrapped

    before, found, until = row.state(), list[float](), time.perf_counter() + AGAIN_S
    with torch.random.fork_rng([]), ExitStack() as stack:
        for owner, name, said in ((layer, "forward", "layer"), (layer.cell, "forward", "f"),
                                  (layer.cell, "begin", "begin"), (layer.init, "forward", "init"),
                                  (torch.autograd, "grad", "vjp")):  # fmt: skip
            stack.enter_context(_replaced(owner, name, timed(said, getattr(owner, name))))
        back = staticmethod(timed("correction", Corrected.backward))
        stack.enter_context(_replaced(Corrected, "backward", back))
        while time.perf_counter() < until or not found:
            spent.clear()
            row.step(*row.batch(row.batches + len(found)))
            found.append(sum(spent[name] for name in OWN))
    row.step.timer.drain(wait=True)
    row.put(before)
    return 1e3 * statistics.median(found[1:] or found)
