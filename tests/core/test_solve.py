"""The loop: how many steps, how a row ends, what a finished row may not do."""

import math

import pytest
import torch
from problems import BATCH, PER_SAMPLE, Watched, affine, close, contraction, f64, random, tanh_map

from implicit_bench.core import (
    EndTime,
    FixedPoint,
    FixedSteps,
    Residual,
    Solver,
    State,
    Status,
    relative_residual,
    solve,
)
from implicit_bench.solvers import Anderson, Broyden, Homotopy, Picard, TorchDiffeq, Tsit5, Vcab3

RATES = (0.1, 0.5, -0.7, 0.9)
D = 3
START = f64([[2.0] * D] * 4)


def geometric_steps(rate, tol, norm, error=1.0):
    """Picard's steps on a row of `affine` from 1 + error: F_k = (r - 1) r^k error, f(z_k) = 1 + r^(k+1) error."""
    for k in range(10_000):
        size = abs((rate - 1) * rate**k * error) * math.sqrt(D)
        bound = tol * (abs(1 + rate ** (k + 1) * error) * math.sqrt(D) if norm == "rel" else 1.0)
        if size <= bound:
            return k
    raise AssertionError


@pytest.mark.parametrize("norm", ["rel", "abs"])
@pytest.mark.parametrize("tol", [3e-2, 1e-5, 1e-10])
def test_picard_takes_exactly_the_steps_of_the_geometric_law(norm, tol):
    F = affine(RATES)
    watched = Watched(F.f)
    stop = Residual(tol, norm, max_steps=1000)
    s = solve(FixedPoint(watched), START, solver=Picard(), stop=stop, reduce=PER_SAMPLE)
    steps = [geometric_steps(r, tol, norm) for r in RATES]
    assert s.stats.steps.tolist() == steps
    assert s.stats.nfe.tolist() == [1 + k for k in steps]  # one a step, one to start; the residual costs none
    assert watched.calls == s.stats.calls == 1 + max(steps)
    assert s.status.tolist() == [Status.CONVERGED] * 4
    close(s.value, f64([[1 + r**k] * D for r, k in zip(RATES, steps)]), 1e-12)


def test_a_known_fixed_point_of_a_matrix_and_of_tanh():
    A, b = contraction(5, 0.9), random(2, 5, seed=1)
    stop = Residual(1e-12, max_steps=1000)
    s = solve(FixedPoint(lambda z, t: z @ A + b), torch.zeros_like(b), solver=Picard(), stop=stop, reduce=PER_SAMPLE)
    close(s.value, torch.linalg.solve(torch.eye(5) - A.T, b.T).T, 1e-10)
    z = 0.6  # f(z) = tanh(a z) has the fixed point z = .6 at a = atanh(.6) / .6, |f'| = a (1 - z^2) < 1
    a = math.atanh(z) / z
    s = solve(FixedPoint(lambda v, t: (a * v).tanh()), torch.ones(1, 1).double(), solver=Picard(), stop=stop)
    close(s.value, f64([[z]]), 1e-10)
    k = int(s.stats.steps)
    earlier = solve(FixedPoint(lambda v, t: (a * v).tanh()), torch.ones(1, 1).double(), solver=Picard(),
                    stop=Residual(1e-30, max_steps=k - 10))  # fmt: skip
    gained = float((s.value - z) / (earlier.value - z))
    assert math.isclose(gained, (a * (1 - z * z)) ** 10, rel_tol=1e-3)  # linear convergence at the rate of the slope


def test_residual_is_that_of_the_value_and_costs_no_call():
    W, ctx = contraction(4, 0.8), random(3, 4, seed=1)
    F = tanh_map(W, ctx)
    s = solve(F, torch.zeros_like(ctx), solver=Anderson(), stop=Residual(1e-4), reduce=PER_SAMPLE)
    again = F(s.value, torch.zeros(3))
    close(s.field, again, 0)
    close(s.fixed_point, torch.tanh(s.value @ W + ctx), 1e-15)
    close(s.stats.residual, again.norm(dim=1) / (s.value + again).norm(dim=1), 1e-15)
    assert bool((s.stats.residual <= 1e-4).all())
    assert bool((s.stats.residual > 1e-8).all())


def test_a_start_that_has_converged_takes_no_step():
    one = torch.ones(4, D).double()
    for solver, calls in ((Picard(), 1), (Anderson(), 1), (Tsit5(), 2)):
        s = solve(affine(RATES), one, solver=solver, stop=Residual(1e-6), reduce=PER_SAMPLE)
        assert (s.stats.steps.tolist(), s.stats.nfe.tolist(), s.stats.calls) == ([0] * 4, [calls] * 4, calls)
        assert s.status.tolist() == [Status.CONVERGED] * 4
        assert torch.equal(s.value, one)


def test_a_start_at_a_zero_solution_is_converged_in_the_relative_norm_too():
    s = solve(FixedPoint(lambda z, t: 0.5 * z), torch.zeros(1, 2), solver=Picard(), stop=Residual(1e-6))
    assert (int(s.status), int(s.stats.steps), float(s.stats.residual)) == (Status.CONVERGED, 0, 0.0)


def test_max_steps_is_a_cap_and_says_so():
    s = solve(affine((0.5, 0.99)), START[:2], solver=Picard(),
              stop=Residual(1e-6, max_steps=30), reduce=PER_SAMPLE)  # fmt: skip
    assert s.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert s.stats.steps.tolist() == [geometric_steps(0.5, 1e-6, "rel"), 30]
    assert s.stats.nfe[1] == s.stats.calls == 31
    close(s.value[1], f64([1 + 0.99**30] * D), 1e-14)


FALL_AND_RISE = f64([[0.1, 1.2, 1.2], [0.1, 1.1, 1.1], [0.5, 0.5, 0.5], [0.2, -1.3, 1.0]])
SMALL = f64([[1.0, 1e-4, 0.0], [1.0, 1e-6, 0.0], [1.0, 1.0, 1.0], [1.0, 1e-3, 0.0]])


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
@pytest.mark.parametrize("norm", ["rel", "abs"])
def test_a_row_that_does_not_converge_returns_its_best_iterate(reduce, norm):
    """f(z) = 1 + r (z - 1) by components: the error r^k e of one falls while that of another rises."""
    F = FixedPoint(lambda z, t: 1 + FALL_AND_RISE * (z - 1))
    stop = Residual(1e-9, norm, max_steps=25)
    s = solve(F, 1 + SMALL, solver=Picard(), stop=stop, reduce=reduce)
    last = solve(F, 1 + SMALL, solver=Picard(), stop=Residual(1e-9, norm, 25, best=False), reduce=reduce)
    path = torch.stack([1 + FALL_AND_RISE**k * SMALL for k in range(26)])
    sizes = torch.stack([reduce.norm(F(z, z)) / (reduce.norm(z + F(z, z)) if norm == "rel" else 1) for z in path])
    best = sizes.argmin(0).squeeze(1)
    assert len(set(best.tolist())) == len(best), "each row must have a best of its own for this to test anything"
    rows = torch.arange(4)
    close(s.value, path[best.expand(4), rows], 1e-14)
    close(s.field, F(s.value, s.value), 1e-14)
    close(last.value, path[25], 1e-12)
    ended = [Status.MAX_STEPS] * 4
    assert s.status.tolist() == last.status.tolist() == ended
    assert s.stats.steps.tolist() == [25] * 4


def test_anderson_returns_the_best_of_its_path():
    """Its residual rises and falls; what the trace saw least is what comes back, converged or not."""
    F = FixedPoint(lambda z, t: torch.tanh(3 * z @ contraction(6, 1.0)) + random(5, 6, seed=3))
    worse = False
    for cap in (3, 6, 8, 12):
        s = solve(F, torch.zeros(5, 6).double(), solver=Anderson(3), stop=Residual(1e-12, max_steps=cap),
                  reduce=PER_SAMPLE, trace=True)  # fmt: skip
        close(s.stats.residual, s.stats.trace.amin(0), 0)
        worse |= bool((s.stats.trace.argmin(0) < cap).any())
    assert worse, "some row must be worse at its last step for this to test anything"


def test_the_trace_is_the_residual_of_every_step_until_the_row_ends():
    s = solve(affine(RATES), START, solver=Picard(), stop=Residual(1e-3), reduce=PER_SAMPLE, trace=True)
    steps = s.stats.steps.tolist()
    assert s.stats.trace.shape == (max(steps) + 1, 4)
    for i, (r, n) in enumerate(zip(RATES, steps)):
        law = [abs((r - 1) * r**k / (1 + r ** (k + 1))) for k in range(n + 1)]
        close(s.stats.trace[: n + 1, i], f64(law), 1e-13)
        assert bool(s.stats.trace[n + 1 :, i].isnan().all())
    assert solve(affine(RATES), START, solver=Picard(), stop=Residual(1e-3)).stats.trace is None


def test_patience_ends_a_solve_that_hovers_near_its_tolerance():
    """Within 3 tol and 1.3 of itself over 30 steps: a rate of .999 does, one of .98 (1.8 in 30 steps) does not."""
    F = affine((0.999, 0.98, 0.5))
    tol, z0 = 3e-4, f64([[2.0] * D] * 3)
    s = solve(F, z0, solver=Picard(), stop=Residual(tol, max_steps=300, patience=30), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.STALLED, Status.CONVERGED, Status.CONVERGED]
    assert s.stats.steps[0] == 29  # thirty residuals, the start's among them; (1 - .999) / 2 is within 3 tol at once
    far = solve(F, z0, solver=Picard(), stop=Residual(1e-5, max_steps=400, patience=30), reduce=PER_SAMPLE)
    assert far.status.tolist() == [Status.MAX_STEPS, Status.CONVERGED, Status.CONVERGED]  # hovers, but far from it


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_protection_ends_a_solve_that_runs_away(reduce):
    """Ended when |F_k| = 2^k |F_0| reaches 10 |F_0| times the numbers in the state: 2^5 >= 10 D, 2^6 >= 10 * 2 D."""
    stop = Residual(1e-6, "abs", max_steps=100, protect=10.0)
    s = solve(affine((3.0, 3.0)), START[:2], solver=Picard(), stop=stop, reduce=reduce)
    rows = 1 if reduce is PER_SAMPLE else 2
    k = next(k for k in range(100) if 3**k >= 10 * D * rows)
    assert s.status.tolist() == [Status.STALLED] * 2
    assert s.stats.steps.tolist() == [k] * 2
    close(s.value, START[:2], 0)  # the best was the start


def test_reached_end_is_for_end_times_and_fixed_steps():
    s = solve(lambda z, t: -z, torch.ones(2, 1).double(), solver=Tsit5(1e-9, 1e-9), stop=EndTime(1.0))
    assert s.status.tolist() == [Status.REACHED_END] * 2
    close(s.value, f64([[math.exp(-1)]] * 2), 1e-8)
    assert bool(s.stats.residual.isnan().all())  # the speed of an ODE is no residual, that of a flow to a root is
    s = solve(affine((0.5,)), START[:1], solver=Tsit5(1e-9, 1e-9), stop=EndTime(1.0))
    left = math.exp(-0.5)
    close(s.stats.residual, f64([0.5 * left / (1 + 0.5 * left)]), 1e-8)
    s = solve(affine((0.99,)), START[:1], solver=Picard(), stop=FixedSteps(5))
    assert (s.status.tolist(), s.stats.calls) == ([Status.REACHED_END], 5)
    close(s.fixed_point, f64([[1 + 0.99**5] * D]), 1e-14)  # f of the last z: five cells


def test_every_status_has_advice():
    assert len({s.advice for s in Status}) == len(Status)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Tsit5(1e-6, 1e-6)], ids=["picard", "anderson", "tsit5"])
def test_a_finished_row_is_frozen_to_the_bit(solver):
    """Each row equals the whole batch stopped at that row's own step count; one step more would have moved it."""
    F, z0 = tanh_elementwise(), torch.linspace(0.3, 3.0, 12).double().view(4, 3)

    def run(n, tol=1e-3):
        return solve(F, z0, solver=solver, stop=Residual(tol, max_steps=n), reduce=PER_SAMPLE)

    s = run(1000)
    steps = s.stats.steps.tolist()
    assert len(set(steps)) > 2, "the rows must end at different steps for this to test anything"
    for row, k in enumerate(steps):
        assert torch.equal(s.value[row], run(k).value[row])
        assert torch.equal(s.field[row], run(k).field[row])
        assert s.stats.nfe[row] == run(k).stats.calls
        assert not torch.equal(s.value[row], run(k + 1, tol=1e-12).value[row])


def tanh_elementwise(limit=math.inf):
    """Four rows of different rates; NaN where z > limit."""
    a = f64([[0.2], [0.6], [0.9], [-0.8]])
    return FixedPoint(lambda z, t: torch.where(z > limit, torch.nan, torch.tanh(a * z) + 0.5))


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["picard", "anderson"])
@pytest.mark.parametrize(
    "stop", [Residual(1e-9, max_steps=200, best=False), FixedSteps(12)], ids=["residual", "fixed"]
)
def test_a_row_that_goes_nan_keeps_its_last_finite_value_and_disturbs_nobody(solver, stop):
    z0 = START
    sick = solve(affine((0.5, 3.0, -0.7, 0.9), limit=100.0), z0, solver=solver, stop=stop, reduce=PER_SAMPLE)
    well = solve(affine((0.5, 0.2, -0.7, 0.9), limit=100.0), z0, solver=solver, stop=stop, reduce=PER_SAMPLE)
    others = [0, 2, 3]
    assert torch.equal(sick.value[others], well.value[others])
    assert torch.equal(sick.field[others], well.field[others])
    assert torch.equal(sick.stats.steps[others], well.stats.steps[others])
    assert torch.equal(sick.status[others], well.status[others])
    if isinstance(solver, Picard):
        assert sick.status[1] == Status.NONFINITE
        # 1 + 3^k: 2 4 10 28 82 244, and f(244) is NaN: the fifth step ends it
        assert sick.value[1].tolist() == [82.0] * D
        F = affine((0.5, 3.0, -0.7, 0.9), limit=100.0)
        best = solve(F, z0, solver=solver, stop=Residual(1e-9), reduce=PER_SAMPLE)
        assert (best.status[1], best.value[1].tolist()) == (Status.NONFINITE, [2.0] * D)  # the start was its best
        assert sick.field[1].tolist() == [(3 * 82.0 - 2) - 82] * D
        assert (int(sick.stats.steps[1]), int(sick.stats.nfe[1])) == (5, 6)
    else:  # Anderson solves a row of one rate, expansive or not
        assert sick.status[1] == well.status[1]


def test_a_nan_row_does_not_spread_through_andersons_small_systems():
    F = FixedPoint(
        lambda z, t: torch.where(z > 6, torch.nan, torch.tanh(0.9 * z) + z * torch.tensor([[0.0], [1.0], [0.0]]))
    )
    z0 = f64([[1.0, 2.0], [5.0, 5.5], [0.5, 0.1]])
    stop = Residual(1e-8, max_steps=100)
    s = solve(F, z0, solver=Anderson(), stop=stop, reduce=PER_SAMPLE)
    benign = torch.cat([z0[:1], torch.zeros(1, 2).double(), z0[2:]])
    alone = solve(F, benign, solver=Anderson(), stop=stop, reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert bool(s.value.isfinite().all())
    assert torch.equal(s.value[[0, 2]], alone.value[[0, 2]])


def test_a_batch_that_is_one_system_ends_as_one():
    """With one norm for the batch a NaN anywhere ends all of it; no row may then blame the step cap."""
    s = solve(affine((0.5, 3.0), limit=100.0), START[:2], solver=Picard(),
              stop=Residual(1e-9, max_steps=200, best=False), reduce=BATCH)  # fmt: skip
    assert s.status.tolist() == [Status.NONFINITE] * 2
    assert s.stats.steps.tolist() == [5, 5]
    assert s.value[1].tolist() == [82.0] * D
    assert s.value[0].tolist() == [1 + 0.5**4] * D  # of the same, last finite step


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
@pytest.mark.parametrize("norm", ["rel", "abs"])
@pytest.mark.parametrize("rate", [1.5, 3.0])
def test_divergence_is_never_called_convergence(reduce, norm, rate):
    """In float32 both norms overflow to infinity together, and inf <= inf."""
    s = solve(affine((rate, rate)), torch.full((2, 4), 2.0), solver=Picard(), stop=Residual(1e-3, norm, max_steps=500),
              reduce=reduce)  # fmt: skip
    assert s.status.tolist() == [Status.NONFINITE] * 2
    assert bool(s.value.isfinite().all())
    assert bool(s.field.isfinite().all())


class Quarters(Solver):
    """A solver that takes what it gets: Euler steps of a quarter, NaN or not."""

    def step(self, F, state, reduce):
        z, t = state.z + 0.25 * state.F, state.t + 0.25
        return State(z, F(z, t), t)


def test_a_nan_on_the_way_to_an_end_time_ends_its_row():
    """An end time looks at the clock alone, so it is the loop that must stop the row."""
    until = f64([[9.0], [0.6]])

    def F(z, t):
        return torch.where(t[:, None] > until, torch.nan, torch.ones_like(z))

    s = solve(F, f64([[0.0], [0.0]]), solver=Quarters(), stop=EndTime(2.0), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.REACHED_END, Status.NONFINITE]
    assert s.value.tolist() == [[2.0], [0.5]]
    assert (s.stats.steps.tolist(), s.stats.nfe.tolist(), s.stats.calls) == ([8, 3], [9, 4], 9)


def test_a_start_with_nan_ends_at_once():
    z0 = f64([[2.0], [math.nan]])
    s = solve(affine((0.5, 0.5)), z0, solver=Picard(), stop=Residual(1e-6), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert s.stats.steps[1] == 0


def test_large_half_precision_states_are_finite():
    """40,000 numbers near 4 sum to more than float16 can hold: sums are taken wider."""
    z0 = torch.full((1, 40_000), 3.9, dtype=torch.float16)
    s = solve(FixedPoint(lambda z, t: 0.5 * z + 2), z0, solver=Picard(), stop=Residual(1e-3), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Tsit5(1e-8, 1e-8)], ids=["picard", "anderson", "tsit5"])
def test_per_sample_a_batch_is_its_rows_alone(solver):
    W, ctx = contraction(5, 0.9), random(6, 5, seed=2) * torch.tensor([[0.01], [0.1], [0.5], [1], [2], [10]])
    stop = Residual(1e-5, max_steps=300)
    batch = solve(tanh_map(W, ctx), torch.zeros_like(ctx), solver=solver, stop=stop, reduce=PER_SAMPLE)
    assert len(set(batch.stats.steps.tolist())) > 2
    for i in range(6):
        row = solve(
            tanh_map(W, ctx[i : i + 1]), torch.zeros(1, 5).double(), solver=solver, stop=stop, reduce=PER_SAMPLE
        )
        close(batch.value[i : i + 1], row.value, 1e-11)
        assert (batch.stats.steps[i], batch.stats.nfe[i], batch.status[i]) == (
            row.stats.steps,
            row.stats.nfe,
            row.status,
        )
        close(batch.stats.residual[i], row.stats.residual[0], 1e-11)


def test_batch_wide_stopping_uses_one_norm():
    """sum_i (1 - r_i)^2 r_i^2k falls to tol^2 at one k for all rows, between the rows' own ones."""
    tol = 1e-4
    s = solve(affine(RATES), START, solver=Picard(), stop=Residual(tol, "abs", max_steps=500),
              reduce=BATCH)  # fmt: skip
    k = next(k for k in range(500) if D * sum(((1 - r) * r**k) ** 2 for r in RATES) <= tol**2)
    assert s.stats.steps.tolist() == [k] * 4
    assert s.stats.nfe.tolist() == [k + 1] * 4
    assert s.status.tolist() == [Status.CONVERGED] * 4
    assert geometric_steps(0.1, tol, "abs") < k
    close(s.value[3], f64([1 + 0.9**k] * D), 1e-12)


def test_without_a_reduction_the_batch_is_one_system():
    s = solve(affine(RATES), START, solver=Picard(), stop=Residual(1e-4, max_steps=500))
    assert len(set(s.stats.steps.tolist())) == 1


def test_gradients_do_not_steer_the_loop():
    """With grad the same numbers come out, and the graph reaches what the field closes over."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    F = FixedPoint(lambda z, t: w * z + 1)
    z0 = torch.zeros(2, D).double()
    tracked = solve(F, z0, solver=Anderson(), stop=Residual(1e-6))
    with torch.no_grad():
        plain = solve(F, z0, solver=Anderson(), stop=Residual(1e-6))
    assert torch.equal(tracked.value, plain.value)
    assert not tracked.status.requires_grad
    assert not tracked.stats.residual.requires_grad
    assert not plain.value.requires_grad
    (g,) = torch.autograd.grad(tracked.fixed_point.sum(), w)
    close(g, f64(2 * D / 0.5**2), 1e-3)  # z* = 1 / (1 - w)


def test_relative_residual_of_low_precision_is_float32():
    z, F = torch.full((1, 4096), 2.0, dtype=torch.bfloat16), torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    r = relative_residual(z, F)
    assert (r.dtype, r.tolist()) == (torch.float32, [1.0])


def test_a_foreign_equilibrium_solve_evaluates_its_end():
    """z + F is what an equilibrium layer puts out, whoever integrated it."""
    watched = Watched(affine((0.5,)).f)
    z0 = START[:1]
    s = solve(FixedPoint(watched), z0, solver=TorchDiffeq(rtol=1e-9, atol=1e-9), stop=EndTime(3.0))
    z = 1 + math.exp(-0.5 * 3)
    close(s.value, f64([[z] * D]), 1e-7)
    close(s.fixed_point, f64([[0.5 * z + 0.5] * D]), 1e-7)
    close(s.stats.residual, f64([0.5 * (z - 1) / (0.5 * z + 0.5)]), 1e-7)
    assert watched.calls == s.stats.calls == int(s.stats.nfe)
    assert s.status.tolist() == [Status.REACHED_END]


def test_a_map_that_is_zero_somewhere_is_no_overflow():
    """relu(10 - 2 z) is 0 at its second iterate, where the relative residual is a division by it; z* = 10 / 3."""
    F, z0, stop = FixedPoint(lambda z, t: torch.relu(10 - 2 * z)), torch.zeros(1, 1), Residual(1e-3)
    s = solve(F, z0, solver=Picard(0.5), stop=stop)
    assert s.status.tolist() == [Status.CONVERGED]
    assert abs(float(s.value) - 10 / 3) < 1e-2
    assert solve(F, z0, solver=Picard(), stop=stop).status.tolist() == [Status.MAX_STEPS]


@pytest.mark.parametrize("patience", [0, 3])
def test_without_a_best_iterate_too_the_last_finite_one_comes_back(patience):
    stop = Residual(1e-3, norm="abs", best=False, patience=patience)
    s = solve(FixedPoint(lambda z, t: 1e37 - 5 * z), torch.zeros(1, 1), solver=Picard(), stop=stop)
    assert s.status.tolist() == [Status.NONFINITE]
    assert bool(s.value.isfinite().all())
    assert s.stats.calls < 10


def test_a_solver_that_gives_up_has_not_done_its_fixed_steps():
    s = solve(lambda z, t: torch.where(z > 1.5, torch.nan, z), f64([[1.0]]), solver=Tsit5(), stop=FixedSteps(300))
    assert s.status.tolist() == [Status.STEP_TOO_SMALL]


def test_the_time_reached_is_told():
    s = solve(lambda z, t: -z, f64([[1.0], [1.0]]), solver=Tsit5(1e-6, 1e-6), stop=EndTime(1.0, max_steps=3))
    assert s.status.tolist() == [Status.MAX_STEPS] * 2
    torch.testing.assert_close(s.value, torch.exp(-s.stats.t).unsqueeze(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Vcab3(1e-6, 1e-6), Homotopy()])
def test_autocast_is_for_f_alone(solver):
    """Its norms, inner products and small systems stay in float32: the same bits where f has no matrix product."""
    rates = torch.linspace(-0.9, 0.97, 64)
    F, z0, stop = FixedPoint(lambda z, t: rates * z.sin() + 1), torch.zeros(2, 64), Residual(1e-4, max_steps=1000)
    plain = solve(F, z0, solver=solver, stop=stop)
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        watched = FixedPoint(lambda z, t: seen.append(torch.is_autocast_enabled("cpu")) or F.f(z, t))
        s = solve(watched, z0, solver=solver, stop=stop)
    assert all(seen)
    assert torch.equal(s.value, plain.value)
    assert s.status.tolist() == plain.status.tolist() == [Status.CONVERGED] * 2
