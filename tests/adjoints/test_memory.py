"""What a gradient costs in memory, in bytes of tensors alive, and that nothing of it is kept for longer than needed."""

import gc
import weakref

import pytest
import torch
from problems import TanhCell, close, network, random
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicit_bench.adjoints import IFT, JFB, Backsolve, Phantom, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import ImplicitLayer, Zero
from implicit_bench.solvers import Anderson, Picard, Tsit5

ROWS, SIZE = 8, 64
STATE = ROWS * SIZE * 8  # bytes


class LiveBytes(TorchDispatchMode):
    """`peak` is the most that the tensors made inside have held at one time."""

    def __enter__(self):
        gc.collect()
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class Wide(TanhCell):
    """Its activations are eight times its state: what a checkpoint saves."""

    def __init__(self):
        super().__init__(SIZE)
        self.V = torch.nn.Parameter(random(SIZE, 8 * SIZE, seed=5, scale=0.02))

    def forward(self, z, ctx, t):
        return super().forward(torch.tanh(z @ self.V) @ self.V.T, ctx, t)


def test_the_meter_counts_what_is_alive_at_one_time():
    with LiveBytes() as meter:
        for _ in range(5):
            a = torch.zeros(1000)
            b = a + 1
            c = b[:10]  # a view is no new memory
            del a, b, c
    assert 2 * 4000 <= meter.peak < 3 * 4000


def peak(adjoint, stop, solver, field="equilibrium"):
    """Of a forward and a backward, in states."""
    cell, x = Wide(), random(ROWS, SIZE, seed=7)
    layer = ImplicitLayer(cell, Zero(network(cell)), solver, stop, adjoint, field)
    with LiveBytes() as meter:
        layer(x).z.sum().backward()
    return meter.peak / STATE


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [(IFT(1e-30, max_iter=10), Picard()), (IFT(1e-30, max_iter=10), Anderson()),
     (IFT(1e-30, max_iter=10, linear="anderson"), Picard()), (IFT(1e-30, max_iter=10, linear="picard"), Picard()),
     (JFB(), Picard()), (Phantom(), Picard()), (Phantom(mode="neumann"), Picard())],
    ids=["gmres", "after_anderson", "anderson", "picard", "jfb", "phantom", "neumann"],
)  # fmt: skip
def test_at_the_fixed_point_memory_does_not_depend_on_the_steps(adjoint, solver):
    few, many = (peak(adjoint, FixedSteps(steps), solver) for steps in (10, 200))
    assert abs(many / few - 1) < 0.05
    assert many - few < 8  # states: far from one a step


def test_an_unroll_pays_for_every_step_and_a_checkpointed_one_for_its_states():
    """Activations of eight states a step and more; the states of a Picard step are z and F."""
    few, many = 10, 40
    plain, kept = ([peak(Unroll(checkpoint=c), FixedSteps(n), Picard()) for n in (few, many)] for c in (False, True))
    assert plain[1] - plain[0] > 8 * (many - few)
    close(torch.tensor(kept[1] - kept[0]), torch.tensor(2.0 * (many - few)), 1.0)


@pytest.mark.parametrize("seminorm", [False, True])
def test_integrating_back_keeps_nothing_of_the_way(seminorm):
    few, many = (peak(Backsolve(seminorm=seminorm), EndTime(), Tsit5(tol, tol), "ode") for tol in (1e-2, 1e-9))
    assert abs(many / few - 1) < 0.05


class Box:
    """What a graph keeps; a weak reference to it tells whether it still does."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def kept():
    """Counts the tensors that graphs made inside `with kept.watch()` keep. Reference counting alone must free them."""

    class Kept:
        refs = ()

        def watch(self):
            self.refs = []

            def pack(tensor):
                box = Box(tensor.detach())  # of an output itself it would be part of a cycle
                self.refs.append(weakref.ref(box))
                return box

            return torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor)

        def __call__(self):
            return sum(ref() is not None for ref in self.refs)

    gc.collect()
    gc.disable()
    yield Kept()
    gc.enable()


EVERY = [
    (IFT(), Residual()), (IFT(linear="anderson"), Residual()), (IFT(x_gradient="one_step"), Residual()),
    (JFB(), Residual()), (Phantom(), Residual()), (Phantom(mode="neumann"), Residual()), (Unroll(), Residual()),
    (Unroll(checkpoint=True), Residual()), (Backsolve(), EndTime()), (Unroll(checkpoint=True), EndTime()),
]  # fmt: skip


@pytest.mark.parametrize("steps", ["ours", "anderson"])
@pytest.mark.parametrize(("adjoint", "stop"), EVERY)
def test_no_memory_is_kept(adjoint, stop, steps, kept):
    """Of every tensor that a graph saved, and of the states themselves, with the output alive and without."""
    solver = Tsit5() if isinstance(stop, EndTime) else Anderson() if steps == "anderson" else Picard()
    cell = TanhCell()
    layer = ImplicitLayer(cell, Zero(network(cell)), solver, stop, adjoint)
    x = random(3, 4, seed=7).requires_grad_()
    states = []
    cell.register_forward_hook(lambda cell, args, z: states.append(weakref.ref(z)))
    layer(x)  # which parameters the cell uses is asked once
    states.clear()
    with kept.watch():
        out = layer(x)
    assert kept() > 0
    held = [weakref.ref(out.z), weakref.ref(out.solution.value), *states]
    del out
    assert kept() == 0, "a forward without a backward keeps its graph"
    assert all(ref() is None for ref in held)
    states.clear()
    with kept.watch():
        out = layer(x)
    out.z.sum().backward()
    assert kept() == 0, "the graph outlives its backward"
    held = [weakref.ref(out.z), weakref.ref(out.solution.value), *states]
    del out
    assert all(ref() is None for ref in held)
