"""One writer a run folder, also on a shared file system and after a crash. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

BEAT_S = 5.0
SILENCE_S = 60.0  # an owner on another machine that has not beaten for so long is dead

Owner = dict[str, Any]  # token, host, place, pid, process_start, since, as in the lock's JSON


class RunLocked(RuntimeError):
    """Someone else writes this run; the message is one sentence that says who."""


class RunLock:
    """`with RunLock(folder) as lock:` holds FOLDER/run.lock, or raises RunLocked.

    The file is made with O_EXCL, which NFS honours too. An owner on this machine is dead when its process is gone, or
    its number now belongs to a process with another start time; one elsewhere when its heartbeat, a daemon thread that
    touches the file each BEAT_S, is older than SILENCE_S by the file system's own clock, so that the clocks of two
    machines need not agree. As with every lease, an owner that slept for so long may wake up replaced: `held()` tells.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder, "run.lock")
        self._token: str | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._token = _take(self.path)
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def held(self) -> bool:
        """Whether the lock is still ours: ask before writing what another writer would want to write."""
        owner = _read(self.path)
        return self._token is not None and owner is not None and owner["token"] == self._token

    def release(self) -> None:
        """Give back our own lock, never another's; does nothing a second time, or in a forked child."""
        if self._token is None or self._pid != os.getpid():
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RunLocked):  # someone who took us for dead is removing it
            _remove(self.path, self._token)
        self._token = None

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a network file system may hiccup
                if not self.held():
                    return
                os.utime(self.path)


def owner(folder: str | Path) -> Owner | None:
    """Who writes this run now; None if nobody who is alive does."""
    path = Path(folder, "run.lock")
    found = _read(path)
    return found if found and _alive(path, found) else None


def _take(path: Path) -> str:
    """Create the lock file and return its token, after removing one whose owner is dead."""
    token = secrets.token_hex(8)
    busy = ""
    for _ in range(100):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            found = _read(path)
            if found is None:
                continue
            if not _alive(path, found):
                try:
                    _remove(path, found["token"])
                    continue
                except RunLocked as error:  # another one is removing it right now
                    busy = str(error)
            elif found["pid"] is not None:
                raise RunLocked(_sentence(path, found)) from None
            time.sleep(0.02)  # that one needs a moment to remove it, or to write its name into it
            continue
        pid, now = os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"token": token, "host": socket.gethostname(), "place": _place(), "pid": pid,
                   "process_start": _process(pid)[1], "since": now}  # fmt: skip
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(content))
        except BaseException:  # the disk is full: leave no lock that names nobody
            path.unlink(missing_ok=True)
            raise
        return token
    raise RunLocked(busy or f"{path} names no owner; if nothing writes that run, delete it or wait a minute")


def _remove(path: Path, token: str) -> None:
    """Remove the lock that carries this token and no other.

    Who judged a lock dead may act on it late, when someone else has replaced it. So whoever removes one first takes a
    lock on its token, which is never used twice, and then looks again: while it is held nobody else can remove that
    lock, and a lock with another token is left alone. Should the remover die, its own lock is dead in the same way.
    """
    claim = path.with_name(f"{path.name}.{token}")
    mine = _take(claim)
    try:
        found = _read(path)
        if found and found["token"] == token:
            path.unlink()
    finally:
        found = _read(claim)
        if found and found["token"] == mine:
            claim.unlink()


def _read(path: Path) -> Owner | None:
    """The owner as written; one without a pid if the file cannot be parsed; None if there is no file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # opening makes NFS forget what it had cached
            stat, text = os.fstat(file.fileno()), file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(text)
        if found["pid"] > 0 and all(isinstance(found[key], str) for key in ("token", "host", "since")):
            return {"place": None, "process_start": None, **found}
    return {"token": f"unread-{stat.st_ino}-{stat.st_mtime_ns}", "place": None, "pid": None}


def _alive(path: Path, found: Owner) -> bool:
    if found["place"] == _place() and (running := _running(found["pid"], found["process_start"])) is not None:
        return running
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    probe.touch()  # its time is the file system's now
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < SILENCE_S
    except FileNotFoundError:  # released meanwhile
        return False
    finally:
        probe.unlink()


def _place() -> str:
    """Where a process number means the same process: a host since its boot, and within it a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _running(pid: int, start: int | None) -> bool | None:
    """Whether the process that started then still runs here; None where that cannot be told."""
    if os.name != "posix":
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    state, started = _process(pid)
    return state not in ("Z", "X") and (start is None or started is None or start == started)


def _process(pid: int) -> tuple[str | None, int | None]:
    """State and start time (clock ticks since boot, field 22 of /proc/PID/stat) of a process; Nones where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, None
    return fields[0], int(fields[19])


def _sentence(path: Path, found: Owner) -> str:
    since = found["since"][11:16] if found["since"][:10] == datetime.now().isoformat()[:10] else found["since"][:16]
    run = path.parent.absolute().name.rpartition("-")[2]
    return f"run {run} is being written by pid {found['pid']} on {found['host']} since {since}; wait for it or stop it"
