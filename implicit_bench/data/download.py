"""Fetching a file over HTTP: an interrupted download goes on where it stood."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from ..terminal import Bar
from .readers import DataCorrupt, DataError

PATIENCE_S = 30.0
CHUNK = 1 << 18


def download(urls: Sequence[str], folder: Path, md5: str, report: Callable[[str], None]) -> Path:
    """The file behind the first of ``urls`` that answers, as ``folder``/its name, its hash checked.

    What has come stays in NAME.part through errors, Ctrl-C and a killed process, and the next call goes on from there
    if the server can (it starts again where the server cannot). A connection that breaks is tried again for as long as
    each try brings something. Raises DataError, DataCorrupt (the part is then gone) in one sentence.
    """
    import fcntl

    target = folder / urls[0].rpartition("/")[2]
    if target.is_file() and _md5(target) == md5:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is fetching {target.name} into {folder}; wait for it") from None
        failures = []
        try:
            for url in urls:
                report(f"fetching {url}" + (f" from {_mb(file.tell())} on" if file.tell() else ""))
                if failure := _fetch(url, file):
                    failures.append(failure)
                elif (found := _md5(part)) == md5:
                    os.replace(part, target)
                    return target
                else:
                    file.truncate(0)
                    raise DataCorrupt(f"{url} gave a wrong file (md5 {found}, expected {md5}), which is deleted")
            kept = f"; {_mb(file.tell())} of it are kept, and the same command goes on from there"
            raise DataError("; ".join(failures) + (kept if file.tell() else ""))
        finally:
            if not os.fstat(file.fileno()).st_size:
                part.unlink()


def _fetch(url: str, file: IO[bytes]) -> str:
    """Append the rest of ``url`` to ``file``; returns why it is not whole, or nothing."""
    import http.client

    while True:
        before = file.tell()
        try:
            if _rest(url, file):
                return ""
            problem = "the connection broke"
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
        file.flush()
        if file.tell() <= before:
            return f"{url}: {problem}"


def _rest(url: str, file: IO[bytes]) -> bool:
    """One request; whether the file is whole after it."""
    import urllib.error
    import urllib.request

    have = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left: the hash tells whether it is the right file
            return True
        raise
    with answer:
        if have and answer.status != 206:  # it knows no ranges
            have = 0
            file.truncate(0)
            file.seek(0)
        length = answer.headers["Content-Length"]
        total = None if length is None else have + int(length)
        if total is not None:
            _need_space(Path(file.name).parent, 2 * total + int(length))  # the unpacked files are about as large
        with Bar(round((total or 0) / 1e6), "MB", round(have / 1e6)) as bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.at(round(file.tell() / 1e6))
    file.flush()
    return total is None or file.tell() >= total


def _need_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise DataError(f"{folder} has {_mb(free)} free, but this needs {_mb(wanted)}; make room or set paths.data")


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count:,} bytes"
