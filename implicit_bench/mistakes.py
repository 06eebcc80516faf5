"""An override that cannot be: which of the words it is, in one sentence, and the nearest right one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from .schema import GROUPS, LAUNCHERS, UsageError, first_line, locate, nearest, no_key, plural

LISTS = ("milestones", "mean", "std", "channels", "head", "allow_targets")  # keys whose value is one


def check_word(o: Any) -> None:
    """Refuse what Hydra would take in silence, or refuse in several lines."""
    name, shown = o.key_or_group, o.input_line.partition("=")[2]
    if name == "penalty" and o.is_sweep_override() and o.is_choice_sweep():
        raise UsageError(f"{o.input_line!r} names several values: penalty=[{shown}] is all of them together, -m is one "
                         "run each")  # fmt: skip
    if o.is_sweep_override() and name.rpartition(".")[2] in LISTS:
        raise UsageError(f"{name} is a list; write {name}=[{shown}]")
    if o.is_sweep_override():
        raise UsageError(f"{o.input_line!r} names several values: add -m for one run each, or quote a comma")
    if name == "dataset.name":
        raise UsageError(f"{o.input_line!r} would be another data set under this one's name; write dataset={shown}")
    if o.is_delete():
        raise UsageError(f"cannot leave {name!r} out; write {name}=value")
    options = _options(name)
    if (name not in (*GROUPS, "tune") and not options) or isinstance(o.value(), dict):
        return
    if o.is_add():
        raise UsageError(f"{name} is there already; write {name}={shown} without a plus sign")
    choices = o.value() if name == "penalty" and isinstance(o.value(), list) else [o.value()]
    for choice in choices:
        launcher = LAUNCHERS.get(str(choice)) if name == "hydra/launcher" else None
        if launcher and launcher.plugin not in options:
            raise UsageError(f"{name}={choice} needs an extra: pip install 'implicit-bench[{launcher.extra}]'")
        if choice not in options:
            word = choice if isinstance(choice, str) else shown
            more = f" (implicit-bench list {plural(name)})" if name in GROUPS else ""
            raise UsageError(f"no {name} {word!r}{nearest(word, options)}{more}")


def _options(group: str) -> list[str]:
    """The files of a group, those one folder down included; none if there is no such group."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    if "." in group or "@" in group:
        return []
    loader: Any = GlobalHydra.instance().config_loader()
    options = loader.repository.get_group_options  # the loader's own copies all the files' sources at every call
    below = [f"{sub}/{name}" for sub in options(group, ObjectType.GROUP) for name in options(f"{group}/{sub}")]
    return [name.removesuffix(".yaml") for name in [*options(group), *below]]


def explain(command: str, words: Sequence[Any], error: Exception) -> str:
    """Which of the overrides Hydra stumbled over, in one sentence."""
    choices = [o.input_line for o in words if _options(o.key_or_group)]
    try:
        known = keys_of(command, choices)
    except Exception:  # one of the choices, then
        known = keys_of(command)
    for o in words:
        if o.key_or_group == "table" and command == "train":
            return f"{o.input_line} is a training of each of the table's rows: write train -m {o.input_line}"
        hydras = o.key_or_group.startswith("hydra") and not o.key_or_group.startswith("hydra.launcher.")
        fine = o.is_add() or o.key_or_group in known or hydras
        fine = fine or (o.input_line in choices and f"'{o.key_or_group}'" not in str(error))  # length, experiment
        if not fine and _takes(command, choices, o.key_or_group):
            remedy = f"its class takes it, but its file does not say it: write +{o.input_line}"
            return f"no key {o.key_or_group!r}; {remedy}"
        if not fine:
            return no_key(o.key_or_group, known)
    return first_line(error)


def _takes(command: str, choices: Sequence[str], key: str) -> bool:
    """Is it an argument of the component's class, though the component's file leaves it to its default?"""
    import hydra

    group, _, argument = key.partition(".")
    try:
        node = hydra.compose(command, [*choices])[group]
        return argument in inspect.signature(locate(node["_target_"], group, [str(node["_target_"])])).parameters
    except Exception:  # nothing that could be looked into
        return False


def keys_of(command: str, overrides: Sequence[str] = ()) -> list[str]:
    import hydra
    from omegaconf import open_dict

    cfg = hydra.compose(command, list(overrides), return_hydra_config=True)
    launcher = cfg.hydra.launcher
    with open_dict(cfg):
        del cfg["hydra"]
    return [*_keys(cfg), *_keys(launcher, "hydra.launcher.")]


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig, OmegaConf

    for key in node:
        yield f"{prefix}{key}"
        if not OmegaConf.is_interpolation(node, key) and isinstance(node._get_node(key), DictConfig):
            child = node._get_node(key)
            if not child._is_none() and not child._is_missing():
                yield from _keys(child, f"{prefix}{key}.")
