"""From words on the command line to objects. Only this file and cli.py import Hydra; no component reads a config."""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

GROUPS = ("network", "init", "solver", "stop", "adjoint", "penalty", "recipe", "gpu", "logger", "dataset", "model",
          "protocol", "experiment", "length")  # fmt: skip


class UsageError(Exception):
    """A user's mistake, told in one sentence; the process ends with exit code 2."""


def config_dir() -> Path:
    """The shipped configs: inside an installed wheel, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UsageError(f"no configs beside {here}: the installation is incomplete, install implicit-bench again")


@dataclass
class Composed:
    """One job: the resolved config as a plain dict, and which file of each group it was composed from."""

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str] = field(default_factory=list)


def compose(command: str, overrides: Sequence[str], search: Sequence[str] = ()) -> Composed:
    """Compose one job. Raises UsageError naming the offending word and the nearest right one."""
    with _hydra(search):
        return _compose(command, overrides)


def compose_all(command: str, jobs: Sequence[Sequence[str]], search: Sequence[str] = ()) -> list[Composed]:
    with _hydra(search):
        return [_compose(command, job) for job in jobs]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep, `model=a,b seed=0,1` -> four lists, by Hydra's own grammar; the last axis runs fastest."""
    axes: list[list[str]] = []
    for o in parse(overrides):
        if o.is_sweep_override():
            name = o.get_key_element()
            axes.append([f"{name}={value}" for value in o.sweep_string_iterator()])
        else:
            axes.append([o.input_line])
    return [list(job) for job in itertools.product(*axes)]


def parse(overrides: Sequence[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        try:
            parsed.extend(OverridesParser.create().parse_overrides([text]))
        except HydraException as error:
            raise UsageError(f"cannot read {text!r}: write key=value ({_first_line(error)})") from None
    return parsed


def resolved(cfg: Any, choices: dict[str, str], overrides: Sequence[str] = ()) -> Composed:
    """A DictConfig that Hydra composed -> Composed, checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"cannot resolve the configuration: {_first_line(error)}") from None
    assert isinstance(config, dict)
    config.pop("hydra", None)
    check(config)
    return Composed(config, choices, list(overrides))


def save(config: dict[str, Any], path: Path) -> None:
    """The resolved config as YAML, for a reader's eyes and for `--config-dir`."""
    from omegaconf import OmegaConf

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")


def _compose(command: str, overrides: Sequence[str]) -> Composed:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    for o in parse(overrides):
        if o.is_sweep_override():
            raise UsageError(f"{o.input_line!r} names several values: add -m to `train` for one run each")
    try:
        cfg = hydra.compose(command, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(command, overrides, error)) from None
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra/") and v is not None}
    with open_dict(cfg):
        del cfg["hydra"]
    return resolved(cfg, choices, overrides)


class _hydra:
    """hydra.initialize_config_dir with a search path, which the compose API takes as an override of Hydra's own."""

    def __init__(self, search: Sequence[str]):
        self.search = [Path(s).resolve() for s in search]

    def __enter__(self) -> None:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        for folder in self.search:
            if not folder.is_dir():
                raise UsageError(f"no folder {folder} for --config-dir")
        GlobalHydra.instance().clear()
        self.context = initialize_config_dir(str(config_dir()), version_base="1.3", job_name="implicit-bench")
        self.context.__enter__()
        path = GlobalHydra.instance().config_loader().get_search_path()
        for folder in self.search:
            path.append("command-line", f"file://{folder}")

    def __exit__(self, *exc: Any) -> None:
        self.context.__exit__(*exc)


# ---------------------------------------------------------------------------------------------------- mistakes


def nearest(word: str, options: Sequence[str]) -> str:
    """`; nearest: x`, or the options themselves when nothing is near and they are few."""
    near = difflib.get_close_matches(word, options, 1, 0.5)
    if near:
        return f"; nearest: {near[0]}"
    return f"; there are: {', '.join(options)}" if 0 < len(options) <= 12 else ""


def _explain(command: str, overrides: Sequence[str], error: Exception) -> str:
    """Which of the overrides Hydra stumbled over, in one sentence."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    groups, rest = [], []
    for o in parse(overrides):
        name = o.key_or_group
        options = [g.removesuffix(".yaml") for g in loader.get_group_options(name)] if "." not in name else []
        options += [f"{sub}/{g}" for sub in loader.list_groups(name) for g in loader.get_group_options(f"{name}/{sub}")]
        if not options:
            rest.append(o)
            continue
        groups.append(o.input_line)
        value = o.value()
        for choice in value if isinstance(value, list) else [value]:
            if str(choice) not in options:
                what = f"{name}s" if not name.endswith("y") else f"{name[:-1]}ies"
                return f"no {name} {str(choice)!r}{nearest(str(choice), options)} (implicit-bench list {what})"
    try:
        known = hydra.compose(command, groups, return_hydra_config=True)
    except Exception:
        return _first_line(error)
    keys = list(_keys(known))
    for o in rest:
        if o.key_or_group not in keys and not o.is_add():
            return f"no key {o.key_or_group!r}{nearest(o.key_or_group, [k for k in keys if not k.startswith('hydra')])}"
    return _first_line(error)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig, OmegaConf

    for key in node:
        yield f"{prefix}{key}"
        if not OmegaConf.is_interpolation(node, key) and isinstance(node._get_node(key), DictConfig):
            child = node._get_node(key)
            if not child._is_none() and not child._is_missing():
                yield from _keys(child, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()


# --------------------------------------------------------------------------------- components, by their own schema


def check(config: Any, path: str = "", allow: Sequence[str] = ()) -> None:
    """Check every component of a resolved config against the signature of its class: keys and plain types."""
    if not isinstance(config, dict):
        return
    if path == "":
        allow = [*(config.get("allow_targets") or ())]
    if "_target_" in config:
        _check_component(config, path, allow)
    for key, value in config.items():
        check(value, f"{path}.{key}" if path else key, allow)


def _check_component(node: dict[str, Any], path: str, allow: Sequence[str]) -> None:
    cls = locate(node["_target_"], path, allow)
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_POSITIONAL}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    hints = typing.get_type_hints(cls.__init__)
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in parameters:
            raise UsageError(f"no key {f'{path}.{key}'!r}{nearest(key, list(parameters))}")
        if key in hints and not _fits(value, hints[key]):
            options = [str(a) for a in typing.get_args(hints[key])] if "Literal" in str(hints[key]) else []
            wanted = nearest(str(value), options) if options else f"; it wants {_spell(hints[key])}"
            raise UsageError(f"{path}.{key}={value!r} is not possible{wanted}")


def locate(target: str, path: str = "", allow: Sequence[str] = ()) -> Any:
    """The class behind a `_target_`: ours, a user's own (allow_targets), or a torch Module, Optimizer, LRScheduler."""
    module, _, name = str(target).rpartition(".")
    own = any(target == a or str(target).startswith(f"{a}.") for a in ("implicit_bench", *allow))
    if not own and not str(target).startswith("torch."):
        raise UsageError(f"{path}._target_={target!r} is not one of implicit-bench's; to use your own package add "
                         f"'+allow_targets=[{str(target).split('.')[0]}]'")  # fmt: skip
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path}._target_={target!r} cannot be imported: {_first_line(error)}") from None
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
    if origin is typing.Literal:
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


def _spell(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint) or str(
        hint).replace("typing.", "").replace("NoneType", "null").replace("None", "null")  # fmt: skip


def make(node: dict[str, Any], path: str, **given: Any) -> Any:
    """Instantiate one component; a ValueError of its constructor is the user's mistake and becomes a UsageError."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise UsageError(_first_line(cause)) from None
        raise UsageError(f"cannot make {path}: {_first_line(cause or error)}") from None


@dataclass
class Parts:
    """The objects of one job. The model is made under the job's seed; nothing is on a device yet."""

    model: Any  # models.Classifier
    penalties: list[Any]
    recipe: Any  # train.Recipe
    dataset: Any  # data.ImageData


def build(config: dict[str, Any]) -> Parts:
    """Make every component of a resolved config. Raises UsageError where two of them do not go together."""
    import torch

    from .models import Classifier, ImplicitLayer

    dataset = make(config["dataset"], "dataset")
    torch.manual_seed(config["seed"])
    network = make(config["network"], "network", shape=dataset.shape, classes=dataset.classes)
    init = make(config["init"], "init", network=network)
    parts = {name: make(config[name], name) for name in ("solver", "stop", "adjoint")}
    try:
        layer = ImplicitLayer(network.cell, init, field=config["field"], **parts)
    except ValueError as error:
        raise UsageError(str(error)) from None
    penalties = [make(node, f"penalty.{name}") for name, node in (config["penalty"] or {}).items()]
    return Parts(Classifier(network, layer), penalties, make(config["recipe"], "recipe"), dataset)
