"""What a resolved config may say. A component's schema is its `__init__`; the few other keys are listed here."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

COMPONENTS = ("network", "init", "solver", "stop", "adjoint", "recipe", "gpu", "logger", "dataset")
LABELS = ("model", "protocol", "experiment", "tune", "length")  # what they say is resolved into the rest
GROUPS = ("network", "init", "solver", "stop", "adjoint", "penalty", "recipe", "gpu", "logger", "dataset", "model",
          "protocol", "experiment", "length")  # fmt: skip
LISTED = (*GROUPS, "table")  # folders of configs/ to choose a name from; a table is no part of a config
PLAIN: dict[str, tuple[Any, float]] = {  # the keys of no component: their type, and the least a number may be
    "seed": (int, 0), "force": (bool, 0), "field": (Literal["equilibrium", "ode", "ode_then_f"], 0),
    "allow_targets": (list[str], 0),
    "progress.log_steps": (int, 1), "progress.save_s": (float, 0), "paths.runs": (str, 0), "paths.data": (str, 0),
    "loader.workers": (int | Literal["auto"], 0), "match": (Literal["params", "time"] | None, 0), "match_to": (str, 0),
    "run": (str, 0), "plot": (bool, 0), "eval.split": (Literal["train", "val", "test"], 0),
    "eval.images": (int | None, 1), "eval.batch": (int | None, 1), "eval.steps": (list[int], 0),
    "eval.noise": (list[float], 0), "eval.blur": (list[float], 0), "eval.tolerances": (list[float], 0),
    "eval.solvers": (list[str], 0), "eval.radius_images": (int, 0),
    "rounds": (Any, 0), "time": (Any, 0),  # bench says more of these two than a type
    "at": (list[int] | None, 0), "memory": (bool, 0), "peers": (list[str], 0),
}  # fmt: skip


class UsageError(Exception):
    """A user's mistake, told in one sentence; the process ends with exit code 2."""


def config_dir() -> Path:
    """The shipped configs: inside an installed wheel, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UsageError(f"no configs beside {here}: the installation is incomplete, install implicit-bench again")


class Launcher(NamedTuple):
    """What runs the jobs of a sweep elsewhere, of a package that not everybody has."""

    extra: str
    plugin: str  # a file of hydra/launcher that its package brings


LAUNCHERS = {"joblib": Launcher("joblib", "joblib"), "submitit_local": Launcher("submitit", "submitit_local"),
             "submitit_slurm": Launcher("submitit", "submitit_slurm"), "slurm": Launcher("submitit", "submitit_slurm"),
             "ray": Launcher("ray", "ray_aws")}  # fmt: skip


def files(group: str, search: Sequence[str | Path] = ()) -> dict[str, Path]:
    """Every file of a group by the name to choose it with, ours and those of --config-dir. Raises UsageError."""
    if lost := next((folder for folder in search if not Path(folder).is_dir()), None):
        raise UsageError(f"no folder {lost} for --config-dir")
    folders = [folder / group for folder in (config_dir(), *map(Path, search))]
    found = {path.relative_to(top).with_suffix("").as_posix(): path for top in folders for path in top.rglob("*.yaml")}
    return dict(sorted(found.items()))


def plural(group: str) -> str:
    return f"{group[:-1]}ies" if group.endswith("y") else f"{group}s"


def nearest(word: str, options: Sequence[str], most: int = 16) -> str:
    """`; nearest: x`, or the options themselves when nothing is near and they are not too many."""
    near = difflib.get_close_matches(word, options, 1, 0.5) or difflib.get_close_matches(word.lower(), options, 1, 0.5)
    if near:
        return f"; nearest: {near[0]}"
    return f"; there are: {', '.join(options)}" if 0 < len(options) <= most else ""


def no_key(key: str, known: Sequence[str]) -> str:
    """`epochs` is recipe.epochs; else the nearest."""
    known = [k for k in known if not k.endswith("_target_")]
    head, dot, leaf = key.rpartition(".")
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == head]
    if dot and beside:
        if key == "stop.tol" and "t1" in beside:
            return f"no key {key!r} of an ODE that ends at stop.t1; its tolerance is solver.rtol"
        near = difflib.get_close_matches(leaf, beside, 1, 0.5)  # of what stands beside it: the head is right
        return f"no key {key!r}; " + (f"nearest: {head}.{near[0]}" if near else f"{head} has {', '.join(beside)}")
    ends = [k for k in known if k.endswith(f".{key}")]
    return f"no key {key!r}" + (f"; nearest: {', '.join(ends[:3])}" if ends else nearest(key, known))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def check(config: dict[str, Any]) -> None:
    """Check a resolved config: every component against the signature of its class, every other key against PLAIN."""
    allow: Sequence[str] = ()
    for key, value in _plain(config):
        if key not in PLAIN:
            raise UsageError(no_key(key, [*PLAIN, *GROUPS]))
        hint, least = PLAIN[key]
        _check_type(key, value, hint)
        if hint is not Any and type(value) in (int, float) and not least <= value < 2**63:
            raise UsageError(f"{key}={value} {f'must be at least {least}' if value < least else 'is too large'}")
        allow = value if key == "allow_targets" else allow
    for path, node in _components(config):
        _check_component(node, path, allow)
    if "recipe" in config and "field" not in config:
        raise UsageError("the model says no field; its file wants a line `field: equilibrium` or `field: ode`")
    if "recipe" in config and not (isinstance(label := config.get("model"), dict) and label.get("name")):
        raise UsageError("the model has no name; its file wants a line such as `model: {name: mine}`")


def _plain(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key not in (*COMPONENTS, *LABELS, "penalty"):
            yield from ((f"{key}.{k}", v) for k, v in value.items()) if isinstance(value, dict) else [(key, value)]


def _components(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    penalties = config.get("penalty", {})
    for path, node in [*((f"penalty.{k}", v) for k, v in penalties.items()), *config.items()]:
        if path not in COMPONENTS and "." not in path:
            continue
        if not (isinstance(node, dict) and "_target_" in node):
            raise UsageError(f"{path} has no _target_, the class to make it from")
        yield path, node
        yield from _nested(node, path)


def _nested(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in node.items():
        if isinstance(value, dict):
            if "_target_" in value:
                yield f"{path}.{key}", value
            yield from _nested(value, f"{path}.{key}")


def _check_component(node: dict[str, Any], path: str, allow: Sequence[str]) -> None:
    cls = locate(node["_target_"], path, allow)
    try:
        parameters = inspect.signature(cls).parameters
        hints = typing.get_type_hints(cls.__init__)
    except (ValueError, TypeError, NameError):  # a class that says nothing of itself, or only to a type checker
        return
    named = [f"{path}.{k}" for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if f"{path}.{key}" not in named and not open_ended:
            raise UsageError(no_key(f"{path}.{key}", named))
        _check_type(f"{path}.{key}", value, hints.get(key, Any))
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError(f"{path}.{key}={value} is too large")


def sources(config: dict[str, Any]) -> dict[str, str]:
    """The modules that a checked config's own components stand in, each with a hash of its file: what a run computes
    changes with them. What those modules import is not looked at."""
    homes = {str(node["_target_"]).rpartition(".")[0] for _, node in _components(config)}
    files = {home: getattr(sys.modules.get(home), "__file__", None) for home in homes}
    return {home: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:10] for home, file in sorted(files.items())
            if file and home.partition(".")[0] not in ("implicit_bench", "torch")}  # fmt: skip


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        words = _words(hint)
        shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)  # null and true, as in YAML
        wanted = nearest(shown.strip("'"), words) if words else f"; it wants {_spell(hint)}"
        if isinstance(value, str) and typing.get_origin(hint) is list:
            wanted = f"; write {key}=[{value}]"
        raise UsageError(f"{key}={shown} is not possible{wanted}")


def locate(target: Any, path: str, allow: Sequence[str] = ()) -> Any:
    """The class behind a `_target_`: ours, a user's own (allow_targets), or a torch Module, Optimizer, LRScheduler."""
    module, _, name = str(target).rpartition(".")
    own = any(target == a or str(target).startswith(f"{a}.") for a in ("implicit_bench", *allow))
    if not own and not str(target).startswith("torch."):
        package = str(target).split(".")[0]
        near = difflib.get_close_matches(package, allow, 1, 0.7)
        add = f"to use your own package add 'allow_targets=[{package}]'"
        remedy = f"allow_targets has {near[0]!r}" if near else add
        raise UsageError(f"{path}._target_={target!r} is not one of implicit-bench's; {remedy}")
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        raise UsageError(f"{path}._target_={target!r} cannot be imported: {first_line(error)}") from None
    found = getattr(home, name, None)
    if found is None:
        classes = [n for n in dir(home) if inspect.isclass(getattr(home, n))]
        raise UsageError(f"{path}._target_={target!r} is not there{nearest(name, classes, 0)}")
    if not inspect.isclass(found):
        raise UsageError(f"{path}._target_={target!r} is not a class")
    if not own:
        import torch

        bases = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        if not issubclass(found, bases):
            raise UsageError(f"{path}._target_={target!r} is not a Module, an Optimizer or an LRScheduler")
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Is a YAML value of an annotated type? An int is a float; anything unannotated or exotic passes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args and type(value) in {type(a) for a in args}
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if hint is str:
        return isinstance(value, str)
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(v, args[0]) for v in value if args)
    return True


def _words(hint: Any) -> list[str]:
    """The words to choose from, where a type is a choice of words (true and false among them)."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [_words(a) for a in typing.get_args(hint)]
        return [word for part in parts for word in part] if all(parts) else []
    if typing.get_origin(hint) is Literal:
        return [str(word) for word in typing.get_args(hint)]
    return {bool: ["true", "false"], type(None): ["null"]}.get(hint, [])


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(_spell(a) for a in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (list, tuple, Sequence) and args:
        return f"a list in brackets, each {_spell(args[0])}"
    plain = {int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return plain.get(hint) or str(hint).replace("typing.", "")
