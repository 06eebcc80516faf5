"""Picard's and Anderson's steps against their formulas, and what theory says of Anderson on linear problems."""

import numpy as np
import pytest
import torch
from problems import BATCH, PER_SAMPLE, affine, close, contraction, f64, random, tanh_map, with_spectrum

from implicit_bench.adjoints import Solve, Unroll
from implicit_bench.core import FixedPoint, FixedSteps, Reduce, Residual, Status, solve
from implicit_bench.solvers import Anderson, Picard

W, CTX = contraction(4, 0.9), random(3, 4, seed=1)


def reference(f, z, steps, window, damping):
    """Walker & Ni, type II, by least squares: z + damping F - (dZ + damping dF) gamma, one flat system."""
    zs, Fs = [z], [f(z) - z]
    for _ in range(steps):
        m = min(window, len(zs) - 1)
        step = damping * Fs[-1]
        if m:
            dZ = np.stack([zs[-i] - zs[-i - 1] for i in range(m, 0, -1)], 1)
            dF = np.stack([Fs[-i] - Fs[-i - 1] for i in range(m, 0, -1)], 1)
            step = step - (dZ + damping * dF) @ np.linalg.lstsq(dF, Fs[-1], rcond=None)[0]
        zs.append(zs[-1] + step)
        Fs.append(f(zs[-1]) - zs[-1])
    return zs[-1]


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_anderson_is_walker_and_nis_type_two(window, damping, steps):
    solver, stop = Anderson(window, damping, ridge=0.0), FixedSteps(steps + 1)
    per_sample = solve(tanh_map(W, CTX), torch.zeros_like(CTX), solver=solver, stop=stop, reduce=PER_SAMPLE)
    for i in range(3):
        row = reference(lambda z, i=i: np.tanh(z @ W.numpy() + CTX[i].numpy()), np.zeros(4), steps, window, damping)
        close(per_sample.value[i], torch.from_numpy(row), 1e-7)
    batch = solve(tanh_map(W, CTX), torch.zeros_like(CTX), solver=solver, stop=stop, reduce=BATCH)
    flat = reference(
        lambda z: np.tanh(z.reshape(3, 4) @ W.numpy() + CTX.numpy()).ravel(), np.zeros(12), steps, window, damping
    )
    close(batch.value, torch.from_numpy(flat.reshape(3, 4)), 1e-7)


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_damped_picard(damping):
    s = solve(affine((0.5, -0.8)), f64([[2.0], [2.0]]), solver=Picard(damping), stop=FixedSteps(8), reduce=PER_SAMPLE)
    close(s.value, f64([[1 + (1 - damping * 0.5) ** 7], [1 + (1 - damping * 1.8) ** 7]]), 1e-13)


def test_damping_rescues_picard_where_the_slope_is_below_minus_one():
    def run(damping):
        return solve(affine((-1.5,)), f64([[2.0]]), solver=Picard(damping), stop=Residual(1e-8, max_steps=200))

    assert run(1.0).status.tolist() == [Status.MAX_STEPS]
    assert run(0.5).status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_linear_problem_of_n_eigenvalues_takes_n_plus_one_steps(n):
    """Anderson with a window of n is GMRES: n differences determine the solution, one step more goes there."""
    A = with_spectrum([0.9, 0.5, -0.6, 0.2][:n] + [0.9] * (6 - n))
    b = random(2, 6, seed=3)
    s = solve(FixedPoint(lambda z, t: z @ A + b), torch.zeros_like(b), solver=Anderson(window=6, ridge=0.0),
              stop=Residual(1e-8), reduce=PER_SAMPLE)  # fmt: skip
    assert s.stats.steps.tolist() == [n + 1] * 2
    assert s.stats.nfe.tolist() == [n + 2] * 2
    assert s.stats.calls == n + 2
    close(s.value, torch.linalg.solve(torch.eye(6) - A, b.T).T, 1e-6)


def test_a_window_too_small_needs_more_steps():
    A = with_spectrum([0.9, 0.5, -0.6, 0.2, 0.7, -0.3])
    b = random(2, 6, seed=3)
    F = FixedPoint(lambda z, t: z @ A + b)
    steps = [
        int(
            solve(
                F, torch.zeros_like(b), solver=Anderson(m, ridge=0.0), stop=Residual(1e-8), reduce=PER_SAMPLE
            ).stats.steps.max()
        )
        for m in (1, 6)
    ]
    assert steps[0] > steps[1] == 7


def test_batch_wide_anderson_mixes_the_batch_as_one_vector():
    """Two rows of one rate each: two eigenvalues for the batch, one for a row."""
    for reduce, steps in ((PER_SAMPLE, 2), (BATCH, 3)):
        s = solve(
            affine((0.9, 0.2)), f64([[2.0, 3.0]] * 2), solver=Anderson(ridge=0.0), stop=Residual(1e-9), reduce=reduce
        )
        assert s.stats.steps.tolist() == [steps] * 2


def test_the_ridge_is_relative_to_the_problem():
    """A problem scaled by 1e-6 or 1e6 takes the same iterates, scaled; with an absolute ridge it would not."""

    def run(c, ridge):
        F = FixedPoint(lambda z, t: c * torch.tanh(z / c @ W + CTX))
        s = solve(F, torch.zeros_like(CTX), solver=Anderson(ridge=ridge), stop=FixedSteps(6), reduce=PER_SAMPLE)
        return s.value / c

    for c in (1e-6, 1e6):
        close(run(c, 1e-3), run(1.0, 1e-3), 1e-12)
    assert float((run(1.0, 0.0) - run(1.0, 1e-3)).abs().max()) > 1e-6  # it does something


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_a_singular_row_falls_back_to_picard_alone(ridge):
    """f(z) = z + c has one and the same F everywhere: every difference is zero, and the step is Picard's."""
    c = f64([[0.0], [0.25], [0.0]])
    rate = f64([[0.5], [1.0], [0.9]])
    F = FixedPoint(lambda z, t: rate * z + torch.where(rate == 1, c, 1 - rate))
    z0 = f64([[2.0, 3.0]] * 3)
    s = solve(F, z0, solver=Anderson(ridge=ridge), stop=Residual(1e-5, max_steps=12), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.CONVERGED]
    assert s.value[1].tolist() == [2.0 + 12 * 0.25, 3.0 + 12 * 0.25]
    close(s.value[[0, 2]], f64([[1.0, 1.0]] * 2), 1e-4)
    assert s.stats.steps[[0, 2]].max() <= 4  # accelerated all the same


def test_parallel_differences_without_a_ridge_stay_finite():
    """One rate in every direction makes all differences parallel: a Gram matrix of rank one."""
    s = solve(affine((0.9, 0.5)), f64([[2.0, 3.0]] * 2), solver=Anderson(window=4, ridge=0.0),
              stop=Residual(1e-30, "abs", max_steps=30), reduce=PER_SAMPLE)  # fmt: skip
    assert bool(s.value.isfinite().all())
    close(s.value, f64([[1.0, 1.0]] * 2), 1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("norm", [0.5, 0.9, 0.97])
def test_on_contractions_anderson_is_never_behind_picard(seed, norm):
    ctx = random(4, 6, seed=seed + 100, scale=0.3)
    F, stop = tanh_map(contraction(6, norm, seed), ctx), Residual(1e-6, max_steps=2000)
    steps = [solve(F, torch.zeros_like(ctx), solver=s, stop=stop, reduce=PER_SAMPLE) for s in (Anderson(), Picard())]
    assert all(s.status.tolist() == [Status.CONVERGED] * 4 for s in steps)
    assert bool((steps[0].stats.steps <= steps[1].stats.steps).all())


def test_anderson_is_far_ahead_where_picard_is_slow():
    F, z0 = FixedPoint(lambda z, t: z @ with_spectrum([0.99, 0.98, -0.95, 0.5]) + 1), torch.zeros(1, 4).double()
    fast, slow = (
        solve(F, z0, solver=s, stop=Residual(1e-6, max_steps=5000)).stats.steps for s in (Anderson(), Picard())
    )
    assert int(fast) < int(slow) / 20


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Picard(0.0), r"solver.damping=0.0 must lie in \(0, 1\]"),
        (lambda: Anderson(damping=1.5), r"solver.damping=1.5 must lie in \(0, 1\]"),
        (lambda: Anderson(window=0), "solver.window=0 must be at least 1"),
        (lambda: Anderson(ridge=-1.0), "solver.ridge=-1.0 must not be negative"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_row_at_rest_leaves_the_others_their_gradient(checkpoint):
    """Its differences are nought, and so is its Gram matrix, of which an unroll must not differentiate the factor."""
    p = f64([[0.0, 0.0], [0.5, 0.8]]).requires_grad_()
    F = FixedPoint(lambda z, t: p * torch.tanh(z) + 1)
    grads = []
    for solver in (Anderson(), Picard()):
        problem = Solve(solver, Residual(tol=1e-10), Reduce(per_sample=True))
        z, solution, _ = Unroll(checkpoint=checkpoint)(F, f64([[0.0, 0.0], [0.0, 0.0]]), problem, ())
        assert (solution.status == Status.CONVERGED).all()
        grads += torch.autograd.grad(z.sum(), p)
    close(*grads, 1e-8)
