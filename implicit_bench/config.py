"""From words on the command line to objects. No component reads a config."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mistakes import check_word, explain, keys_of
from .schema import PLAIN, UsageError, check, config_dir, first_line, no_key, sources

# our file of this name has the keys of the plugin's own, and defaults that its jobs need
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")


@dataclass
class Composed:
    """One job: the resolved config as a plain dict, and which file of each group it was composed from."""

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str] = field(default_factory=list)
    table: Any = None  # papers.Table, of which it is a row, and the row's name there
    label: str = ""
    trained: Path | None = None  # the folder of a run, at whose last weights it is timed
    alike: dict[str, Any] | None = None  # match=time not measured yet: the config of the model that it is matched to


def compose(command: str, overrides: Sequence[str], search: Sequence[str] = ()) -> Composed:
    """Compose one job. Raises UsageError naming the offending word and the nearest right one."""
    with _hydra(search):
        return _compose(command, overrides)


def compose_all(command: str, jobs: Sequence[Sequence[str]], search: Sequence[str] = ()) -> list[Composed]:
    with _hydra(search):
        return [_compose(command, job) for job in jobs]


def expand(overrides: Sequence[str], search: Sequence[str] = ()) -> list[list[str]]:
    """The jobs of a sweep, `model=a,b seed=0,1` -> four lists, by Hydra's own grammar; the last axis runs fastest."""
    return [list(job) for job in itertools.product(*_axes(overrides, search))]


def each_value(overrides: Sequence[str], search: Sequence[str] = ()) -> list[list[str]]:
    """Few jobs that between them name every value of a sweep: one axis moves while the others stand still."""
    axes = _axes(overrides, search)
    first = [axis[0] for axis in axes]
    return [first, *([*first[:i], value, *first[i + 1 :]] for i, axis in enumerate(axes) for value in axis[1:])]


def _axes(overrides: Sequence[str], search: Sequence[str]) -> list[list[str]]:
    from hydra.core.global_hydra import GlobalHydra

    with _hydra(search):
        axes = []
        parsed = parse(overrides, GlobalHydra.instance().config_loader())  # which glob() looks names up in
        keys = [o.get_key_element() for o in parsed]
        for o in parsed:
            if o.is_sweep_override() and keys.count(o.get_key_element()) > 1:
                raise UsageError(f"{o.input_line!r} lists values of a key that is given twice; give it once")
            if not o.is_sweep_override():
                axes.append([o.input_line])
            elif not o.is_discrete_sweep():
                raise UsageError(f"{o.input_line!r} has no list of values; write them, or range(start,stop,step)")
            else:
                try:
                    axes.append([f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()])
                except ValueError as error:
                    raise UsageError(f"{o.input_line!r} cannot be read as values: {first_line(error)}") from None
            if not axes[-1]:
                raise UsageError(f"{o.input_line!r} names no value")
        return axes


def parse(overrides: Sequence[str], loader: Any = None) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        if not text.partition("=")[0].strip("+~ ") or ("=" not in text and not text.startswith("~")):
            raise UsageError(f"cannot read {text!r} as key=value, such as model=deq")
        try:
            parsed.extend(OverridesParser.create(loader).parse_overrides([text]))
        except HydraException:
            raise UsageError(f"cannot read {text!r} as key=value; a value with commas, brackets or other signs in it "
                             "needs quotes inside the shell's: \"key='a,b'\"") from None  # fmt: skip
    return parsed


def resolved(cfg: Any, choices: dict[str, str], overrides: Sequence[str] = ()) -> Composed:
    """A DictConfig that Hydra composed -> Composed, checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"cannot resolve the configuration: {first_line(error)}") from None
    config.pop("hydra", None)
    if "recipe" in config:
        config.setdefault("penalty", {})  # penalty=[] is penalty=[none]
    check(config)
    if own := sources(config):
        config["sources"] = own  # part of what names a run: after an edit it is another
    return Composed(config, choices, list(overrides))


def launcher(overrides: Sequence[str], search: Sequence[str] = ()) -> dict[str, Any]:
    """hydra.launcher, as the words that are Hydra's own choose and change it."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _hydra(search):
        try:
            cfg = hydra.compose("train", list(overrides), return_hydra_config=True).hydra.launcher
            return dict(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(f"{' '.join(overrides)} cannot be: {first_line(error)}") from None


def save(config: dict[str, Any], path: Path) -> None:
    """The resolved config as YAML, for a reader's eyes."""
    from omegaconf import OmegaConf

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")


def alone(path: Path, resolve: bool = True) -> dict[str, Any]:
    """What one file says with nothing composed around it. Raises UsageError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return dict(OmegaConf.to_container(OmegaConf.load(path), resolve=resolve))  # type: ignore[arg-type]
    except (YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no YAML of keys and values: {' '.join(str(error).split())}") from None


def _compose(command: str, overrides: Sequence[str]) -> Composed:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = parse(overrides)
    for o in words:
        check_word(o)
    try:
        cfg = hydra.compose(command, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(command, words, error)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"a file of --config-dir is no YAML: {' '.join(str(error).split())}") from None
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra/") and v is not None}
    with open_dict(cfg):
        del cfg["hydra"]
    job = resolved(cfg, choices, overrides)
    for o in words:  # components and top-level keys have been checked, but who would read +protocol.foo?
        if o.key_or_group.startswith("hydra."):  # which Hydra's own parts read
            continue
        head = job.config.get(o.key_or_group.partition(".")[0])
        if o.is_add() and o.key_or_group not in PLAIN and "_target_" not in (head if isinstance(head, dict) else ()):
            raise UsageError(no_key(o.key_or_group, keys_of(command)))
    return job


class _hydra:
    """hydra.initialize_config_dir with the folders of --config-dir."""

    def __init__(self, search: Sequence[str]):
        self.search = [Path(s).resolve() for s in search]

    def __enter__(self) -> None:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        from .known import know

        for folder in self.search:
            if not folder.is_dir():
                raise UsageError(f"no folder {folder} for --config-dir")
            for file in folder.rglob("*.yaml"):  # Hydra would take ours in silence
                if (config_dir() / file.relative_to(folder)).exists():
                    raise UsageError(f"{file} has the name of one of implicit-bench's own; give it another")
        self.around = GlobalHydra.instance().hydra  # of a sweep, one of whose jobs asks
        GlobalHydra.instance().clear()
        self.context = initialize_config_dir(str(config_dir()), version_base="1.3", job_name="implicit-bench")
        self.context.__enter__()
        loader: Any = GlobalHydra.instance().config_loader()
        for folder in self.search:
            loader.get_search_path().prepend("command-line", f"file://{folder}", "schema")
        loader.repository.initialize_sources(loader.get_search_path())
        know(loader)

    def __exit__(self, *exc: Any) -> None:
        from hydra.core.global_hydra import GlobalHydra

        self.context.__exit__(*exc)
        GlobalHydra.instance().hydra = self.around


# ------------------------------------------------------------------------------------------------- components


def make(node: dict[str, Any], path: str, **given: Any) -> Any:
    """Instantiate one component; a ValueError of its constructor is the user's mistake and becomes a UsageError."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise UsageError(first_line(cause)) from None
        why = first_line(cause or error)
        if path == "network" and "unexpected keyword argument" in why:
            why += "; a network's __init__ takes shape=(C, H, W) and classes="
        raise UsageError(f"cannot make {path}: {why}") from None


def make_alone(cfg: dict[str, Any]) -> None:
    """Every component that can be made without the others: a value out of its range is found before a sweep begins.
    Parts that do not go together are left to their job: the rest of the sweep may still be wanted."""
    for name in ("gpu", "dataset", "solver", "stop", "adjoint", "recipe"):
        make(cfg[name], name)
    for name, node in cfg["penalty"].items():
        make(node, f"penalty.{name}")


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

    from .models import Classifier, ImplicitLayer, prepare

    dataset = make(config["dataset"], "dataset")
    torch.manual_seed(config["seed"])
    network = make(config["network"], "network", shape=dataset.shape, classes=dataset.classes)
    init = make(config["init"], "init", network=network)
    parts = {name: make(config[name], name) for name in ("solver", "stop", "adjoint")}
    penalties = {name: make(node, f"penalty.{name}") for name, node in (config["penalty"] or {}).items()}
    try:
        layer = ImplicitLayer(network.cell, init, field=config["field"], **parts)
        prepare(layer, penalties)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    twice = [name for name, penalty in penalties.items() if getattr(penalty, "twice", False)]
    if twice and config.get("gpu", {}).get("compile"):
        raise UsageError(f"penalty=[{twice[0]}] differentiates the cell twice, which torch.compile does not; use "
                         "gpu.compile=false")  # fmt: skip
    return Parts(Classifier(network, layer), [*penalties.values()], make(config["recipe"], "recipe"), dataset)
