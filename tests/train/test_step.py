import math

import jobs
import pytest
import torch
from torch.nn import functional as nnf

from implicit_bench import config
from implicit_bench.device import Device
from implicit_bench.train import NonFinite, Step, Tally, count_flops


@pytest.fixture
def make(tmp_path):
    def made(*words):
        tol = [] if "model=neural_ode" in words else ["stop.tol=1e-5"]
        job = config.compose("train", jobs.words(tmp_path, *tol, *words))
        parts = config.build(job.config)
        return Step(parts.model, parts.penalties, parts.recipe, Device("cpu", threads=1), 10)

    return made


def batch(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g)


def test_a_step_moves_weights_along_the_loss_and_penalty_gradient(make):
    x, y = batch()
    step = make("model=skip_deq", "penalty.skip.weight=2.0", "recipe.optimizer=sgd", "recipe.momentum=0.0",
                "recipe.schedule=constant", "recipe.lr=0.1")  # fmt: skip
    other = make("model=skip_deq")
    other.model.load_state_dict(step.model.state_dict())
    out = other.model(x)
    loss = nnf.cross_entropy(out.logits, y) + 2.0 * (out.layer.z - out.layer.start).abs().mean()
    loss.backward()
    expected = {k: p.detach() - 0.1 * p.grad for k, p in other.model.named_parameters()}
    task, _ = step(x, y)
    assert float(task) == pytest.approx(float(nnf.cross_entropy(out.logits, y).detach()), rel=1e-6)
    for k, p in step.model.named_parameters():
        assert torch.allclose(p, expected[k], atol=1e-6), k


@pytest.mark.parametrize(("dtype", "words"), [
    ("float32", ("model=cdeq", "penalty=[skip,init_fit,jacobian,correction,local_error]")),
    ("bfloat16", ("model=cdeq", "solver=bosh3", "penalty=[local_error,jacobian]")),
    ("bfloat16", ("model=neural_ode", "penalty=[local_error,jacobian]")),
    ("bfloat16", ("model=deq", "penalty=[correction,jacobian,init_fit]", "init=skip_net")),
])  # fmt: skip
def test_penalties_train_and_their_evaluations_are_counted(make, dtype, words):
    """Also in pretraining, where no ODE solver is at work, and under autocast."""
    step = make(*words, "recipe.pretrain_steps=1", "recipe.pretrain_depth=4")
    step.device = Device("cpu", dtype, threads=1)
    calls = []
    step.model.layer.cell.register_forward_pre_hook(lambda *_: calls.append(None))
    for taken in range(3):
        calls.clear()
        weights = [p.detach().clone() for p in step.parameters]
        task, out = step(*batch())
        assert task.isfinite()
        assert all(p.isfinite().all() for p in step.parameters)
        assert any(not torch.equal(a, b) for a, b in zip(weights, step.parameters))
        assert len(calls) == out.layer.calls(step.start_calls) + out.layer.backward.calls
        assert len(out.layer.iterates) > taken


def test_clip_bounds_the_update(make):
    step = make("model=deq", "recipe.optimizer=sgd", "recipe.momentum=0.0", "recipe.lr=1.0", "recipe.clip=0.01")
    before = torch.cat([p.detach().flatten().clone() for p in step.parameters])
    step(*batch())
    moved = torch.cat([p.detach().flatten() for p in step.parameters]) - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_constant_decay_takes_the_same_share_off_at_every_learning_rate(make):
    """w -= Adam's step at the cosine's lr + .01 w, written out; AdamW itself takes lr * .01 w."""
    words = ("model=deq", "recipe.optimizer=adamw", "recipe.weight_decay=0.01", "recipe.lr=1e-2", "recipe.lr_min=1e-4")
    for constant in (True, False):
        step = make(*words, f"recipe.constant_decay={constant}")
        step.model.double()
        x, y = batch()
        first, second = ([torch.zeros_like(p) for p in step.parameters] for _ in range(2))
        for k in range(1, 9):
            lr = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * (k - 1) / 10)) / 2
            before = [p.detach().clone() for p in step.parameters]
            step(x.double(), y)
            for p, w, m, v in zip(step.parameters, before, first, second):
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad**2, 0.001)
                moved = lr * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
                expected = w - moved - 0.01 * w * (1 if constant else lr)
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_pretraining_applies_the_cell_depth_times_then_solves(make):
    step = make("model=deq", "recipe.pretrain_steps=2", "recipe.pretrain_depth=3")
    calls = []
    for _ in range(3):
        _, out = step(*batch())
        calls.append(out.layer.solution.stats.calls)
    assert calls[:2] == [3, 3]
    assert calls[2] > 3


def test_each_part_of_a_step_is_timed_once(make):
    step = make("model=deq")
    for _ in range(3):
        step(*batch())
    laps = step.timer.drain()
    assert list(laps) == ["forward", "backward", "optimizer"]
    assert all(len(v) == 3 and min(v) > 0 for v in laps.values())


def test_a_nonfinite_loss_raises_and_names_the_step(make):
    step = make("model=deq")
    x, y = batch()
    step(x, y)
    with pytest.raises(NonFinite, match=r"at step 2; lower recipe.lr"):
        step(x * float("nan"), y)
    assert step.nonfinite == 1


def test_skip_step_leaves_weights_and_optimiser_alone_and_counts(make):
    step = make("model=deq", "recipe.on_nonfinite=skip_step")
    x, y = batch()
    step(x, y)
    before = [p.detach().clone() for p in step.parameters]
    moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
    step(x * float("inf"), y)
    assert step.nonfinite == 1
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, step.optimizer.state.values()))
    step(x, y)
    assert step.nonfinite == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters))


def test_vanishing_gradients_stay_finite(make):
    """A sample learned perfectly has a cotangent that underflows: its linear system must not spoil the others'."""
    step = make("model=deq")
    x, y = batch()
    with torch.no_grad():
        logits = step.model(x).logits
        y = logits.argmax(1)
        for scale in (1e2, 1e3, 1e4):
            step.model.head.weight.mul_(scale)
            step.model.head.bias.mul_(scale)
            with torch.enable_grad():
                step(x, y)  # raises NonFinite if it is not


def test_the_work_of_a_step_has_the_penalties_in_it(make):
    plain, with_jacobian = (count_flops(make(*words), *batch()) for words in ((), ("penalty=[jacobian]",)))
    assert with_jacobian > 1.01 * plain


def test_tally_means_are_means_over_samples_and_batches(make):
    step, tally = make("model=deq"), Tally()
    losses, right, n = [], 0, 0
    nfe, vjps = [], []
    for k, size in enumerate((16, 8)):
        x, y = batch(size, k)
        task, out = step(x, y)
        tally.add(task, y, out, 5)
        losses.append(float(task) * size)
        right += int((out.logits.argmax(1) == y).sum())
        n += size
        nfe.append(out.layer.solution.stats.calls + 1 + 5)  # the solve's, the re-attaching one, the start's
        vjps.append(out.layer.backward.vjps)
    means = tally.means()
    assert means["loss"] == pytest.approx(sum(losses) / n)
    assert means["acc"] == pytest.approx(right / n)
    assert means["nfe_forward"] == sum(nfe) / 2
    assert means["nfe_backward"] == sum(vjps) / 2
    assert means["converged_fraction"] == 1.0
    assert tally.status_counts() == {"CONVERGED": n}
    again = Tally(tally.sums)
    assert again.means() == means


def test_a_penalty_on_other_states_leaves_the_heads_statistics_alone(make):
    x, y = batch()
    step = make("model=deq", "network=mdeq_small", "penalty=[correction]", "stop.max_steps=6")
    step(x.expand(-1, 1, -1, -1), y)
    counts = [b for name, b in step.model.head.named_buffers() if name.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [1] * len(counts) != []


@pytest.mark.parametrize("init", ["zero", "f_zero", "skip_net", "shared"])
def test_under_autocast_a_solve_keeps_its_state_in_float32(tmp_path, init):
    words = ["model=deq", f"init={init}", "stop.max_steps=5", "gpu.dtype=bfloat16"]
    job = config.compose("train", jobs.words(tmp_path, *words))
    parts = config.build(job.config)
    with Device("cpu", threads=1, dtype="bfloat16").autocast():
        out = parts.model(batch()[0]).layer
    assert out.solution.value.dtype == torch.float32


def test_a_backward_that_did_not_converge_is_told(make):
    x, y = batch()
    for words, share in (([], 1.0), (["adjoint.max_iter=1", "adjoint.rtol=1e-6"], 0.0)):
        step, tally = make("model=deq", *words), Tally()
        task, out = step(x, y)
        tally.add(task, y, out, step.start_calls)
        assert tally.means()["backward_converged"] == share


def test_a_skipped_step_leaves_no_statistics_behind(make):
    """Whose numbers are finite, but not its gradient."""
    x, y = batch()
    step = make("model=deq", "init=data_mean", "recipe.on_nonfinite=skip_step", "stop.max_steps=5")
    step(x, y)
    before = {name: buffer.clone() for name, buffer in step.model.named_buffers()}
    head = next(step.model.head.parameters())
    hook = head.register_hook(lambda g: g * torch.nan)
    step(x + 1, y)
    assert step.nonfinite == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in step.model.named_buffers())
    hook.remove()
    step(x + 1, y)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in step.model.named_buffers())
