"""The words of a command line, sorted: overrides, flags, folders. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .schema import UsageError, nearest


class Words(NamedTuple):
    overrides: list[str]
    search: list[str]  # --config-dir
    multirun: bool
    flags: list[str]  # that only Hydra answers: --cfg job, --info searchpath, ...
    plan: bool = False  # plan=true


SHOWN = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
HYDRA_FLAGS: dict[str, tuple[str, ...] | None] = {  # with the words that may follow; None: none does
    "--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"), "--info": SHOWN, "-i": SHOWN,
    "--package": (), "-p": (), "--resolve": None, "--hydra-help": None,
}  # fmt: skip
OURS = ("--multirun", "-m", "--config-dir", "-cd", "--help", "--quiet", "-q")


LISTS = ("eval.steps", "eval.noise", "eval.blur", "eval.tolerances", "eval.solvers", "rows", "at", "peers",
         "runs")  # of which a comma makes no sweep  # fmt: skip
NAMES = ("rows", "runs")  # lists of
TEXTS = ("run",)  # an id such as 12345e1 is no number


def as_meant(word: str) -> str:
    """What Hydra would take for a sweep or a number, quoted."""
    key, _, value = word.partition("=")
    if key in NAMES and (names := value.strip("[]")):
        return f"{key}=[{','.join(map(_as_text, names.split(',')))}]"
    if key in LISTS and not value.startswith("["):
        return f"{key}=[{value}]"
    return f"{key}={_as_text(value)}" if key in TEXTS else word


def _as_text(text: str) -> str:
    return text if (text := text.strip())[:1] in ("'", '"') else quoted(text, always=True)


def quoted(text: str, always: bool = False) -> str:
    """As Hydra reads it for text, in quotes where it has signs of Hydra's grammar in it."""
    plainly = not always and re.fullmatch(r"[\w./~-]+", text)
    return text if plainly else "'" + text.replace("'", "\\'") + "'"


def of_hydra(overrides: Sequence[str]) -> list[str]:
    """Those that choose or change Hydra's own parts."""
    return [o for o in overrides if o.lstrip("+").startswith(("hydra.", "hydra/"))]


def split(args: Sequence[str]) -> Words:
    overrides: list[str] = []
    search: list[str] = []
    flags: list[str] = []
    multirun = plan = False
    rest = iter(args)
    for a in rest:
        flag, equals, value = a.partition("=")
        if flag == "plan":
            if value not in ("true", "false"):
                raise UsageError(f"plan={value!r} is not possible{nearest(value, ('true', 'false'))}")
            plan = value == "true"
        elif not a.startswith("-"):
            overrides.append(as_meant(a))
        elif a in ("-m", "--multirun"):
            multirun = True
        elif flag in ("-cd", "--config-dir"):
            search.append(value if equals else next(rest, ""))
        elif flag not in HYDRA_FLAGS:
            raise UsageError(f"no flag {flag!r}{nearest(flag, (*OURS, *HYDRA_FLAGS))}")
        elif (words := HYDRA_FLAGS[flag]) is None:
            flags.append(a)
        else:
            value = value if equals else next(rest, "")
            if words and value not in words:
                raise UsageError(f"no {flag} {value!r}{nearest(value, words)}")
            flags += [flag, value]
    asked = {flag.partition("=")[0] for flag in flags}
    if (how := asked & {"--resolve", "--package", "-p"}) and not asked & {"--cfg", "-c", "--info", "-i"}:
        raise UsageError(f"{min(how)} says how to show a configuration; add --cfg job")
    if len(search) > 1 or any(not folder or "=" in folder for folder in search):
        raise UsageError("--config-dir wants one folder, such as --config-dir my-configs")
    return Words(overrides, search, multirun, flags, plan)


def plain(args: Sequence[str], command: str, flags: Sequence[str] = (),
          **lists: str) -> tuple[list[str], set[str], dict[str, list[str]]]:  # fmt: skip
    """Plain words, the flags among them, and key=a,b,c lists with their defaults, of a command that composes nothing.

    key=value with a key that the command does not have stays a word.
    """
    words, given, options = [], set(), {key: default.split(",") for key, default in lists.items()}
    for a in args:
        key, equals, value = a.partition("=")
        if a.startswith("-"):
            if a not in flags:
                raise UsageError(f"{command} has no flag {a!r}{nearest(a, [*flags, '-q', '--help'])}")
            given.add(a)
        elif equals and key in options:
            options[key] = [v for v in value.strip("[]").split(",") if v]
            if not options[key]:
                such = f", such as {key}={lists[key]}" if lists[key] else ""
                raise UsageError(f"{key}= wants one value or more{such}")
        else:
            words.append(a)
    return words, given, options
