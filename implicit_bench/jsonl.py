"""metrics.jsonl: rows of a run while it goes on. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .record import RecordError, plain


class Jsonl:
    """Append-only rows, one JSON object a line, with the system when `append` returns: a killed process loses none.

    `offset()` goes into a checkpoint and syncs to disk first, so a checkpoint never counts rows that a power cut took.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # drops a line that SIGKILL cut short

    def append(self, row: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(plain(row), allow_nan=False).encode() + b"\n")
        start = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as problem:  # disk full: the next row must not continue half a line
            self._file.truncate(start)
            raise OSError(problem.errno, problem.strerror or str(problem), str(self.path)) from None

    def offset(self) -> int:
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, offset: int) -> None:
        """Drop the rows after a checkpoint's offset."""
        content = self.path.read_bytes()
        if not 0 <= offset <= len(content) or (offset and content[offset - 1 : offset] != b"\n"):
            raise RecordError(f"{self.path} is not the checkpoint's (no row ends at byte {offset}); start afresh")
        self._file.truncate(offset)

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; none if there is no file, and without a last line that is still being written."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise RecordError(f"{path} line {number} is no valid JSON; delete that line") from None
