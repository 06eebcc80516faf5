from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    name: str
    passed: bool
    sentence: str  # what was found, in figures

    def __bool__(self) -> bool:
        return self.passed


class Fault(Exception):
    """What a check found wrong, in a sentence."""


def require(holds: Any, sentence: str) -> None:
    if not bool(holds):
        raise Fault(sentence)


def check(run: Callable[..., str]) -> Callable[..., Result]:
    """A check returns its sentence or raises it. It draws the same numbers each time and leaves the generator alone."""

    @functools.wraps(run)
    def guarded(*given: Any) -> Result:
        name = run.__name__.replace("_", " ")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            try:
                return Result(name, True, run(*given))
            except Fault as fault:
                return Result(name, False, str(fault))
            except Exception as error:
                said = str(error).strip().partition("\n")[0]
                at = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(at.filename).name}:{at.lineno}, in {at.name}"
                return Result(name, False, f"it raised {type(error).__name__} ({where}){': ' if said else ''}{said}")

    return guarded


def tuned(component: T, **settings: float) -> T:
    """A copy with other settings, as far as it has them."""
    component = copy.copy(component)
    for name, value in settings.items():
        if hasattr(component, name):
            object.__setattr__(component, name, value)  # frozen dataclasses too
    return component
