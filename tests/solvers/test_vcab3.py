"""Adams-Bashforth of order 3 with variable steps: its formula and error, order, start, counts, rows, gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Event, Reads
from numpy.polynomial import Polynomial
from ode import PROBLEMS, RATES, Spy, beside_nan, decay, decayed, exact_at, exp_sin, march
from problems import BATCH, PER_SAMPLE, Watched, close, contraction, f64, random, tanh_map

from implicit_bench.core import EndTime, FixedPoint, Residual, Status, solve
from implicit_bench.solvers import Bosh3, Picard, Vcab3

both = pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])


def kicked(z, t):
    """Quiet at first, so that the first step is too long, then two kicks, so that later ones are."""
    early, late = (t > 0.02) & (t < 0.1), t > 1
    return -z + torch.where(early, 30 * torch.cos(200 * t), torch.where(late, torch.sin(40 * t), 0.0)).unsqueeze(1)


def mixed(rows):
    """Of four rows, each at its own rate, some are kicked: they start late, and are rejected when others are not."""
    late = f64([[0.0], [1.0], [0.0], [1.0]])[rows]
    return lambda z, t: decay(RATES[rows])(z, t) + late * (kicked(z, t) + z)


# ---------------------------------------------------------------------------------------------------- formula and order


def test_a_step_integrates_the_polynomial_through_the_last_three_slopes():
    """And its error is what the third of them adds, in units of atol + rtol |z|, at whatever steps there were."""
    (F, z0, _), hs, rtol, atol = PROBLEMS["network"], [0.1, 0.07, 0.12, 0.2, 0.05, 0.06], 1e-1, 1e-2
    seen, errors, old = [(0.0, F(z0, f64([0.0] * 3)))], [], None
    for k, state in enumerate(march(Vcab3(rtol, atol), F, z0, hs, reduce=BATCH)):
        t = sum(hs[: k + 1])
        if k >= 2:
            slopes = np.stack([s.flatten().numpy() for _, s in seen[-3:]])
            times = np.array([s for s, _ in seen[-3:]]) - (t - hs[k])
            step, correction = np.empty(24), np.empty(24)
            for i in range(24):
                third, second = (Polynomial.fit(times[-n:], slopes[-n:, i], n - 1).integ() for n in (3, 2))
                step[i] = third(hs[k]) - third(0)
                correction[i] = step[i] - (second(hs[k]) - second(0))
            close(state.z, old.z + torch.from_numpy(step).view(3, 8), 1e-14)
            scaled = correction / (atol + rtol * old.z.abs().flatten().numpy())
            errors.append(math.sqrt((scaled**2).mean()))
            if k >= 3:
                factor = 0.86 * errors[-1] ** (-0.7 / 3) * max(errors[-2], 1e-4) ** (0.4 / 3)
                assert math.isclose(float(state.mem.dt), hs[k] * min(2.0, max(0.2, factor)), rel_tol=1e-9)
        assert torch.equal(state.F, F(state.z, state.t))
        close(state.t, f64([t] * 3), 1e-15)
        seen.append((t, state.F))
        old = state
    assert max(errors) < 1


@pytest.mark.parametrize("shape", [(1.0,), (1.0, 2.0), (1.0, 0.4, 1.6)], ids=["equal", "alternating", "uneven"])
def test_the_error_falls_with_the_third_power_start_included(shape):
    F, z0, _ = PROBLEMS["network"]
    errors = []
    for n in (24, 48, 96):
        weights = list(itertools.islice(itertools.cycle(shape), n))
        watched = Watched(F)
        *_, end = march(Vcab3(1e9, 1e9), watched, z0, [w / sum(weights) for w in weights])
        assert watched.calls == 3 + 3 * 2 + (n - 2)  # one more to start by hand
        errors.append(float((end.z - exact_at("network", 1.0)).norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert 2.7 < math.log2(coarse / fine) < 3.5


@given(hs=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=12))
@settings(max_examples=30, deadline=None)
def test_slopes_of_degree_two_are_integrated_exactly(hs):
    """z' = 3 t^2 - t + 1, whatever the steps: the start and the coefficients are of order 3."""
    z0, t = torch.zeros(1, 1).double(), sum(hs)
    *_, end = march(Vcab3(1e9, 1e9), lambda z, t: (3 * t * t - t + 1)[:, None].expand_as(z), z0, hs)
    close(end.z, f64([[t**3 - t * t / 2 + t]]), 1e-12 * (1 + t**3))


def test_an_adams_step_is_never_more_than_twice_the_one_before():
    stop = Spy(50.0)
    s = solve(lambda z, t: 1 - z, f64([[0.0]]), solver=Vcab3(controller="i"), stop=stop)
    assert s.status.tolist() == [Status.REACHED_END]
    steps = np.diff([float(state.t) for state in stop.seen])
    steps = steps[steps > 0]
    assert steps[0] == pytest.approx(1e-4)  # a start at 0 tells no scale
    assert steps[1] == pytest.approx(1e-3)  # Runge-Kutta steps may grow tenfold, the step after the last of them too
    assert steps[2] == pytest.approx(1e-2)
    ratios = steps[3:] / steps[2:-1]
    assert 1.99 < ratios.max() < 2.0 + 1e-9


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("rows", [1, 3])
def test_one_call_an_accepted_step_none_a_rejected_one_three_while_starting(rows):
    watched, stop = Watched(kicked), Spy(3.0)
    s = solve(watched, f64([[1.0, 2.0]] * rows), solver=Vcab3(1e-4, 1e-4), stop=stop, reduce=BATCH)
    times = [float(state.t[0]) for state in stop.seen]
    moved = [b > a for a, b in itertools.pairwise(times)]
    start = [i for i, m in enumerate(moved, 1) if m][1]  # attempts until two were accepted
    starting = [state.mem.past.starting > 0 for state in stop.seen]
    again = [not a and b for a, b in itertools.pairwise(starting)]  # evaluated, then rejected for a discontinuity
    assert starting[:start + 1] == [True] * start + [False]
    assert start > 2, "none of the start's attempts was rejected"
    assert any(again), "no discontinuity was met"
    plain = [m for m, s, a in zip(moved, starting, again) if not s and not a]
    assert not all(plain), "no later attempt was rejected"
    assert watched.calls == s.stats.calls == 2 + 3 * sum(starting) + sum(again) + sum(plain)
    assert s.stats.nfe.tolist() == [s.stats.calls] * rows
    assert s.stats.steps.tolist() == [len(moved)] * rows  # attempts are what max_steps counts
    capped = solve(kicked, f64([[1.0, 2.0]] * rows), solver=Vcab3(1e-4, 1e-4), stop=EndTime(3.0, start + 5))
    assert capped.status.tolist() == [Status.MAX_STEPS] * rows
    assert torch.equal(capped.value, stop.seen[start + 5].z)


def test_where_rows_differ_one_call_serves_all():
    """A step costs three calls while a row is starting, else one if a row accepts, else none."""
    watched, stop = Watched(decay(RATES)), Spy(2.0)
    s = solve(watched, f64([[1.0, 2.0]] * 4), solver=Vcab3(1e-4, 1e-4), stop=stop, reduce=PER_SAMPLE)
    t = torch.stack([state.t for state in stop.seen])
    moved = t[1:] > t[:-1]
    starting = (moved.cumsum(0).roll(1, 0).index_fill(0, torch.tensor([0]), 0) < 2).any(1)
    assert watched.calls == s.stats.calls == 2 + int(torch.where(starting, 3, moved.any(1).long()).sum())
    assert bool((moved.any(1) & ~moved.all(1)).any())


def test_a_row_is_evaluated_only_where_it_goes():
    """A rejected one where it stands, and one that has started while others start: a graph through the calls then
    holds no number that the row never had."""
    asked, seen, solver = [], set(), Vcab3(1e-4, 1e-4)
    F = mixed(slice(0, 4))
    state = solver.init(F, f64([[1.0, 2.0]] * 4), 2.0, PER_SAMPLE)
    for _ in range(60):
        asked.clear()
        new = solver.step(lambda z, t: asked.append(z) or F(z, t), state, PER_SAMPLE)
        starting = (state.mem.past.accepted.squeeze(1) < 2) & (state.mem.past.starting > 0)
        again = (new.mem.past.accepted.squeeze(1) == 0) & ~starting  # rejected for what was found there
        still = (new.t == state.t) & ~starting & ~again
        for z in asked[:-1]:
            assert torch.equal(z[~starting], state.z[~starting])
        if asked:
            assert torch.equal(asked[-1][still], state.z[still])
        seen.add((len(asked), bool(starting.any()) and not bool(starting.all()), bool(still.any())))
        state = new
    assert {(3, True, True), (1, False, True)} <= seen


# ----------------------------------------------------------------------------------------------------------------- rows


def test_per_sample_each_row_steps_as_if_alone():
    """Some rows start while others run: one has its first attempts rejected."""
    z0, everyone, stop = f64([[1.0, 2.0]] * 4), slice(0, 4), Spy(2.0)
    batch = solve(mixed(everyone), z0, solver=Vcab3(1e-4, 1e-4), stop=stop, reduce=PER_SAMPLE)
    phases = torch.stack([state.mem.past.accepted.squeeze(1) for state in stop.seen])
    assert bool(((phases < 2).any(1) & (phases >= 2).any(1)).any()), "all rows started together"
    for i in range(4):
        row = slice(i, i + 1)
        alone = solve(mixed(row), z0[row], solver=Vcab3(1e-4, 1e-4), stop=EndTime(2.0), reduce=PER_SAMPLE)
        assert torch.equal(batch.value[row], alone.value)
        assert torch.equal(batch.stats.steps[row], alone.stats.steps)
    close(batch.value[[0, 2]], decayed(RATES[[0, 2]], z0[[0, 2]], 2.0), 1e-3)


@pytest.mark.parametrize("controller", ["pi", "i"])
def test_a_slow_row_grows_its_step_as_if_alone_while_another_is_starting(controller):
    def slow(z, t):
        return -1e-4 * z

    def beside(z, t):
        return torch.where((f64([[0.0], [1.0]]) > 0) & (z != 1), torch.nan, slow(z, t))  # never gets off its start

    solver, stop = Vcab3(1e-6, 1e-6, controller=controller), EndTime(50.0)
    alone = solve(slow, f64([[1.0]]), solver=solver, stop=stop, reduce=PER_SAMPLE)
    both = solve(beside, f64([[1.0]] * 2), solver=solver, stop=stop, reduce=PER_SAMPLE)
    assert torch.equal(both.value[:1], alone.value)
    assert int(both.stats.steps[0]) == int(alone.stats.steps)


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5])
def test_a_discontinuity_is_met_with_small_steps(tol):
    """z' = -z until t = 1, then 5 - 3z; without a new start the error is 18 tol at 1e-5."""
    jump = Watched(lambda z, t: torch.where(t[:, None] < 1, -z, 5 - 3 * z))
    s = solve(jump, f64([[1.0]]), solver=Vcab3(tol, tol), stop=EndTime(3.0))
    assert abs(float(s.value) - (5 / 3 + (math.exp(-1) - 5 / 3) * math.exp(-6))) < tol
    assert s.status.tolist() == [Status.REACHED_END]
    assert jump.calls < 300


def test_batch_wide_all_rows_share_one_step():
    stop = Spy(2.0)
    s = solve(decay(RATES), f64([[1.0, 2.0]] * 4), solver=Vcab3(), stop=stop, reduce=BATCH)
    assert len(set(s.stats.steps.tolist())) == 1
    assert {tuple(state.mem.dt.shape) for state in stop.seen} == {(1, 1)}
    close(s.value, decayed(RATES, f64([[1.0, 2.0]]), 2.0), 1e-2)


@settings(max_examples=8, deadline=None)
@given(nan=st.integers(0, 3), when=st.sampled_from([-1.0, 0.0, 1e-3, 0.3]))
def test_a_nan_row_never_disturbs_its_neighbours(nan, when):
    """Whether it is lost at once, in its start or later; it costs no more than calls."""
    good, s = beside_nan(Vcab3(), nan, when)
    for i in set(range(4)) - {nan}:
        assert s.stats.steps[i] == good.stats.steps[i]
    assert s.stats.calls < good.stats.calls + 200
    if when < 0:  # known to be lost from its first slope
        assert s.stats.calls <= good.stats.calls


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_field_that_ends_before_its_time_makes_the_step_too_small(reduce, dtype):
    F = Watched(lambda z, t: torch.where(t[:, None] > 0.5, torch.nan, torch.cos(7 * t)[:, None].expand_as(z)))
    s = solve(F, torch.zeros(2, 1, dtype=dtype), solver=Vcab3(), stop=EndTime(1.0), reduce=reduce)
    assert s.status.tolist() == [Status.STEP_TOO_SMALL] * 2
    torch.testing.assert_close(s.value, torch.full((2, 1), math.sin(3.5) / 7, dtype=dtype), rtol=0, atol=2e-3)
    assert F.calls < 300


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("controller", ["pi", "i"])
def test_error_follows_the_tolerance(controller):
    for tol in (1e-3, 1e-5, 1e-7):
        s = solve(exp_sin, f64([[1.0]]), solver=Vcab3(tol, tol, controller), stop=EndTime(5.0, 10_000))
        assert float((s.value - math.exp(math.sin(5.0))).abs()) < 20 * tol


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t1", [1e-5, 0.1, 0.7, 9.9])
def test_lands_on_the_end_time_exactly_and_never_looks_beyond(t1, dtype):
    """Within its start, too."""
    watched, stop = Watched(lambda z, t: exp_sin(z, t).to(z.dtype)), Spy(t1)
    z0 = torch.tensor([[1.0], [30.0]], dtype=dtype)
    s = solve(watched, z0, solver=Vcab3(), stop=stop, reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.REACHED_END] * 2
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(stop.seen[-1].t, torch.full((2,), t1, dtype=wide))
    assert stop.seen[-1].mem.dt.dtype == wide
    assert max(float(t.max()) for t in watched.times) <= float(torch.tensor(t1, dtype=wide)) * (1 + 1e-6)
    rtol = 5e-2 if dtype == torch.bfloat16 else 5e-3
    torch.testing.assert_close(s.value, z0 * math.exp(math.sin(t1)), rtol=rtol, atol=1e-3)


@both
def test_the_flow_reaches_picards_fixed_point(reduce):
    F = tanh_map(contraction(4, 0.8), random(3, 4, seed=1))
    z0, stop = torch.zeros(3, 4).double(), Residual(1e-6, max_steps=2000)
    flow, picard = (solve(F, z0, solver=s, stop=stop, reduce=reduce) for s in (Vcab3(1e-7, 1e-7), Picard()))
    assert flow.status.tolist() == [Status.CONVERGED] * 3
    close(flow.value, picard.value, 1e-5)


def test_to_an_equilibrium_it_needs_fewer_calls_than_bosh3():
    F = tanh_map(contraction(16, 0.9), random(4, 16, seed=1))
    stop = Residual(1e-2, max_steps=200)
    z0 = torch.zeros(4, 16).double()
    adams, bosh3 = (solve(F, z0, solver=s, stop=stop, reduce=BATCH, trace=True) for s in (Vcab3(), Bosh3()))
    assert adams.status.tolist() == bosh3.status.tolist() == [Status.CONVERGED] * 4
    assert adams.stats.calls < 0.8 * bosh3.stats.calls
    assert adams.stats.trace.shape == (int(adams.stats.steps[0]) + 1, 4)
    assert torch.equal(adams.stats.trace[-1], adams.stats.residual)


# ------------------------------------------------------------------------------------------------------------ gradients


@both
def test_the_gradient_through_the_steps_is_exact(reduce):
    z0, w = random(2, 3, seed=1).requires_grad_(), random(3, 3, seed=2, scale=0.5).requires_grad_()

    def end(z0, w):
        F = lambda z, t: torch.tanh(z @ w) * torch.cos(t)[:, None]  # noqa: E731
        *_, last = march(Vcab3(1e9, 1e9), F, z0, [0.3, 0.5, 0.2, 0.35, 0.15], reduce=reduce)
        return last.z

    assert torch.autograd.gradcheck(end, (z0, w))


@pytest.mark.parametrize(("t1", "tol", "least", "most"), [(0.5, 1e-3, 3, 49), (0.005, 1e-6, 1, 5), (0.01, 1e-6, 2, 11)])
def test_a_rows_gradient_is_its_own_whatever_the_others_do(t1, tol, least, most):
    """Rows start, reject and land at their own times, in their start too; none leaves a NaN in what they share."""
    w = f64([[1.0, 0.7]]).requires_grad_()

    def gradient(rows):
        F = lambda z, t: torch.sin(w * decay(RATES[rows])(z, t))  # noqa: E731
        z0, solver = f64([[1.0, 2.0]] * 4)[rows], Vcab3(tol, tol)
        s = solve(F, z0, solver=solver, stop=EndTime(t1), reduce=PER_SAMPLE)
        return torch.autograd.grad(s.value.square().sum(), w)[0], s.stats.steps

    together, steps = gradient(slice(0, 4))
    assert (int(steps[0]), int(steps[3])) == (least, most)
    close(together, sum(gradient(slice(i, i + 1))[0] for i in range(4)), 1e-13)


# ----------------------------------------------------------------------------------------------------------------- CUDA


@both
@pytest.mark.parametrize(
    ("F", "stop"),
    [(decay(RATES), EndTime(2.0)), (lambda z, t: decay(RATES)(z, t) + kicked(z, t), EndTime(2.0)),
     (FixedPoint(lambda z, t: torch.tanh(1 - z)), Residual(1e-3, max_steps=200))],
    ids=["decay", "kicked", "equilibrium"],
)  # fmt: skip
def test_as_on_cuda_the_same_numbers_without_waiting(F, stop, reduce, late):
    """The host reads nothing but counts of a step ago. A rejected attempt costs a masked call, the start two more."""
    z0 = f64([[1.0, 2.0]] * 4)
    now = solve(F, z0, solver=Vcab3(), stop=stop, reduce=reduce)
    late()
    Event.waited = 0
    with Reads() as seen:
        later = solve(F, z0, solver=Vcab3(), stop=stop, reduce=reduce)
    assert seen.reads == Event.waited
    assert torch.equal(now.value, later.value)
    assert torch.equal(now.field, later.field)
    assert torch.equal(now.stats.steps, later.stats.steps)
    steps = int(now.stats.steps.max())
    if reduce is BATCH:  # start attempts, and one more at which the host does not know yet that they are over
        start = (later.stats.calls - 2 - (steps + 1)) // 2
        assert later.stats.calls == 2 + (steps + 1) + 2 * start
        assert 3 <= start <= 8
