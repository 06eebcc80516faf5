"""Checkpoints: one file written whole or not at all, checked before it is believed, two kept."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..record import whole
from ..world import world

NAMES = ("last.pt", "previous.pt")


class CheckpointError(RuntimeError):
    """No usable checkpoint where one was expected; the message names the file and the remedy."""


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write last.pt; the one before it becomes previous.pt. A crash at any moment leaves a whole checkpoint."""
    last, previous = (folder / name for name in NAMES)

    def keep_the_one_before() -> None:
        if last.exists():
            previous.unlink(missing_ok=True)
            os.link(last, previous)

    write(last, {"rng": rng_state(), **content}, keep_the_one_before)


def write(path: Path, content: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
    """A file that is there whole or not at all; `before` as in record.whole."""
    with whole(path, before) as file:
        try:
            torch.save(content, file)
        except RuntimeError:  # torch does not say what the system said: ask it again
            file.write(bytes(2**16))
            file.flush()
            raise


def load(folder: Path, device: torch.device, say: Any) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, None if it has none. A broken one is passed over, said aloud.

    Raises CheckpointError when there are checkpoints and none can be read. Never unpickles more than plain data.
    """
    broken = []
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            content = read(path, device)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        if broken:
            say(f"{broken[0]}; going on from {path.name}, step {content['step']}")
        return content
    if broken:
        raise CheckpointError(f"{broken[0]}; delete {folder} to train afresh")
    return None


def put(model: torch.nn.Module, weights: dict[str, Any], folder: Path) -> None:
    """Load weights into a model. Raises CheckpointError where they are those of another network."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        odd = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
        has, wants = theirs.get(odd, "missing"), ours.get(odd, "nothing by that name")
        raise CheckpointError(f"the checkpoint in {folder} is another network's ({odd} is {has}, the run's {wants}); "
                              f"put the run's own there, or delete {folder} to train afresh") from None  # fmt: skip


def read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()  # torch.load does not check the members' CRCs
        if bad:
            raise CheckpointError(f"{path} is damaged ({bad} fails its checksum)")
        return torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is damaged or truncated ({reason[0][:120]})") from None


def rng_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> None:
    """That of this process, of as many as saved theirs; more processes than that begin with draws of their own."""
    rank = world().rank
    if 0 < rank <= len(others):
        state = others[rank - 1]
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if rank > len(others):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
