"""CUDA's late stop flag without a GPU: the `late` fixture of conftest.py, and what it takes to see the host wait."""

from torch.utils._python_dispatch import TorchDispatchMode


class Event:
    """A copy is there once its event has been waited for."""

    waited = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waited += 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a scalar read, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        self.reads += func.overloadpacket.__name__ in waits
        return func(*args, **(kwargs or {}))
