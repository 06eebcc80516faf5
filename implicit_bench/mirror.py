"""What W&B has of a run, under which name, and whether it can be asked: all that needs no wandb."""

from __future__ import annotations

import contextlib
import hashlib
import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MARKER = "wandb.json"  # in a run's folder
MIRRORED = ("record.json", "metrics.jsonl", "table.md", "speedup.svg", "report.html")


def run_name(record: Mapping[str, Any]) -> str:
    """W&B's id of a run: its own, and of a bench or a comparison each attempt's."""
    attempt = record.get("attempt") or 1
    return record["run_id"] if record["command"] == "train" or attempt == 1 else f"{record['run_id']}-{attempt}"


def sweep() -> str | None:
    """The W&B sweep whose agent started this process."""
    return os.environ.get("WANDB_SWEEP_ID") or None


def marker(folder: Path) -> dict[str, Any]:
    """What W&B has of the run in this folder, as last noted; empty if nothing.

    id, project, entity, state (online or offline), place (its page, or its folder within this one), the sweep that it
    belongs to or None, and content, as the function of that name gave it then.
    """
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = {"id", "project", "entity", "state", "place", "sweep", "content"}
    return found if isinstance(found, dict) and keys <= found.keys() else {}


def content(folder: Path) -> str:
    """A hash of the files that are mirrored."""
    hashed = hashlib.sha256()
    for name in MIRRORED:
        data = (folder / name).read_bytes() if (folder / name).is_file() else b""
        hashed.update(f"{name} {len(data)}\n".encode() + data)
    return hashed.hexdigest()[:16]


def key_source() -> str:
    """Where a key for W&B is configured, empty if nowhere: looks at environment and netrc, asks no server."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    for path in map(os.path.expanduser, places):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts = netrc.netrc(path).hosts
            if any(host == server if server else "wandb" in host or "coreweave" in host for host in hosts):
                return path
    return ""
