import os

# One thread a process: two test workers on two cores must not fight, and small tensors gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same weights whichever tests have run before it in the process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_wandb(tmp_path, monkeypatch):
    """W&B writes below the test's own folder and finds no key of the user's."""
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb-{name.lower()}"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def brisk(monkeypatch):
    """A bench in this process that does not wait until it is warm, nor ask what a convolution does here: for tests of
    what it says and leaves. Warming up and prices have tests of their own."""
    from implicit_bench import clock, machine

    real, price = clock.warm_up, clock.unit_cost
    monkeypatch.setattr(clock, "warm_up", lambda run: real(run, max_passes=2))
    monkeypatch.setattr(clock, "unit_cost", lambda fn, device: price(fn, device=device, min_time_s=0.02))
    monkeypatch.setattr(machine, "convolution_gflops", lambda device: 100.0)


@pytest.fixture
def late(monkeypatch):
    """Makes every flag a late one, as on CUDA, from the moment it is called."""
    from late import Event

    empty = torch.empty

    def force():
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))

    return force
