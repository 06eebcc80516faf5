"""The stop flag as CUDA reads it, one step late, without a GPU: the same numbers, one step taken in vain."""

import math

import pytest
import torch
from late import Event, Reads
from problems import BATCH, PER_SAMPLE, Watched, affine, contraction, random, tanh_map

from implicit_bench.core import EndTime, FixedPoint, FixedSteps, Residual, Status, solve
from implicit_bench.core.solve import OpenRows
from implicit_bench.solvers import Anderson, Picard, Tsit5, gmres

MIXED = affine((0.5, 3.0, -0.7, 0.9), limit=100.0)  # one row goes NaN, the others end one by one
TANH = tanh_map(contraction(3, 0.8), random(4, 3, seed=1))
START = torch.full((4, 3), 2.0).double()
CASES = {
    "picard": (MIXED, Picard(), Residual(1e-6, max_steps=500), 1),
    "anderson": (TANH, Anderson(), Residual(1e-6), 1),
    "tsit5": (TANH, Tsit5(), Residual(1e-3, max_steps=200), 6),
    "end_time": (lambda z, t: -z * torch.arange(1, 5).view(4, 1), Tsit5(), EndTime(1.0), 6),
    "converged start": (affine((0.5, 0.1, 0.2, 0.3)), Picard(), Residual(10.0), 1),
    "cap": (affine((0.99, 0.98, 0.97, 0.5)), Picard(), Residual(1e-6, max_steps=30), 0),
    "fixed": (MIXED, Picard(), FixedSteps(20), 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_late_reading_changes_nothing_but_the_calls(name, reduce, late):
    F, solver, stop, in_vain = CASES[name]
    now = solve(F, START, solver=solver, stop=stop, reduce=reduce)
    late()
    f = F.f if isinstance(F, FixedPoint) else F
    watched = Watched(f)
    later = solve(FixedPoint(watched) if f is not F else watched, START, solver=solver, stop=stop, reduce=reduce)
    assert torch.equal(now.value, later.value)
    assert torch.equal(now.field, later.field)
    assert torch.equal(now.status, later.status)
    assert torch.equal(now.stats.nfe, later.stats.nfe)
    assert torch.equal(now.stats.steps, later.stats.steps)
    if name == "fixed" and reduce is BATCH:  # ended by its NaN, before its last step
        in_vain = 1
    assert later.stats.calls == now.stats.calls + in_vain == watched.calls
    if name == "picard" and reduce is PER_SAMPLE:
        assert Status.NONFINITE in later.status.tolist()


def test_the_host_reads_only_what_it_has_waited_for(late):
    late()
    Event.waited = 0
    flag = OpenRows(True)
    rows = [torch.tensor([True, True]), torch.tensor([True, False]), torch.tensor([False, False])]
    assert [flag.read(r) for r in rows] == [1, 2, 1]  # nothing known yet, then the count of the call before
    assert Event.waited == 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_on_cuda_the_host_never_waits_within_a_solve(name, reduce, late):
    """Each step reads the flag of the step before, which was copied to the host long ago; nothing else is read."""
    F, solver, stop, _ = CASES[name]
    late()
    Event.waited = 0
    with Reads() as seen:
        s = solve(F, START, solver=solver, stop=stop, reduce=reduce)
    assert seen.reads == Event.waited <= int(s.stats.steps.max()) + 1


def test_a_late_linear_solve_is_the_same_and_counts_its_product_in_vain(late):
    A = torch.eye(5).double() - contraction(5, 0.9)
    b = random(3, 5, seed=1)
    now = gmres(lambda v: v @ A, b, PER_SAMPLE, rtol=1e-3, atol=0.0, max_iter=20)
    late()
    later = gmres(lambda v: v @ A, b, PER_SAMPLE, rtol=1e-3, atol=0.0, max_iter=20)
    assert torch.equal(now.iterations, later.iterations)
    torch.testing.assert_close(now.residual, later.residual, rtol=1e-12, atol=0)
    torch.testing.assert_close(now.x, later.x, rtol=0, atol=1e-15)
    assert later.products == now.products + 1
    assert math.isclose(float(now.iterations.max()), now.products)
