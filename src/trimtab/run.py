"""A run folder: files written whole or not at all, records that only grow, and what the work cost."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimtab.errors import PathError, RunError

# Progress and notes; results go to stdout.
console = Console(stderr=True, highlight=False)
PACKAGES = ("trimtab", "torch", "transformers", "tokenizers", "safetensors")


def screen(as_json: bool) -> Console:
    """Where results for people go: stdout, which they leave to programs that asked for JSON."""
    return Console(stderr=as_json, highlight=False)


def tell(people: Console, line: str) -> None:
    """Print a line as it is: a path in it is not wrapped, and its brackets are no markup."""
    people.print(line, soft_wrap=True, markup=False)


def existing(folder: Path) -> Path:
    """Raises PathError where there is no such folder."""
    if not folder.is_dir():
        raise PathError(f"no folder {folder}.", "Give the folder of a finished run.")
    return folder


def create(folder: Path, what: str = "the run folder", mend: str = "Give another folder with -o.") -> Path:
    """Make a folder and prove that it can be written.

    Raises:
        RunError: it is a file, read-only, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise RunError(f"cannot write to {what} {folder}: {error.strerror or error}", mend) from None
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder that no other process or thread works in; who works there already may enter again. A lock that a killed process held is free again.

    Raises:
        RunError: another process is at work there.
    """
    lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"another process is at work in {folder}.", "Wait until it is done, or give another folder with -o."
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, key: str) -> None:
    """Mark a folder as the run's that `key` stands for; the same command may come back to it, another one may not.

    Raises:
        RunError: another run is there.
    """
    mark = folder / "run.json"
    if mark.exists() and read_json(mark)["key"] != key:
        raise RunError(
            f"{folder} holds another run (other model, data or settings).",
            "Give another folder with -o, or delete this one.",
        )
    write_json(mark, {"key": key})


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole: a reader sees the old file or the new one, whatever kills us between.

    Raises:
        RunError: the disk is full or the folder read-only; the old file is untouched.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror or error}", "Free some room and run the same command again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises RunError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing.", "Give the folder of a finished run.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", "The run is damaged: run it again.") from None


class Records:
    """An append-only JSONL file keyed by `key`: what is there is not done again.

    A line torn by a kill is dropped when the file is opened; its work is simply repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            for line in whole.splitlines():
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (ValueError, KeyError, TypeError):
                    raise RunError(
                        f"{path} holds a line that is no record: {line[:80]!r}", "Delete the file; it is made again."
                    ) from None
            if torn:
                write(path, whole + b"\n" if whole else b"")

    def add(self, key: str, **fields: Any) -> None:
        """Append one record; when this returns it outlives the process, though not the machine."""
        row = {"key": key, **fields}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}", "Free some room and rerun."
            ) from None
        self.rows[key] = row

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]


def digest(*parts: Any) -> str:
    """16 hex digits of some JSON-able values: the key of a record made from them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Cost:
    """Wall time and peak memory of a piece of work (law 8)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def record(self, device: str) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return {
            "seconds": round(time.perf_counter() - self._start, 2),
            "peak_memory_gb": round(peak_bytes / 1e9, 2),
            "device": device,
        }


def environment() -> dict[str, Any]:
    """Versions and platform, for the manifest."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "unknown"
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """While open, Ctrl-C only fills the list: whoever works in whole steps stops between two of them."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield asked
        return
    previous = signal.signal(signal.SIGINT, lambda number, _frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """A progress bar with an estimate on stderr; yields `advance(n=1)`. Plain lines where stderr is no terminal."""
    if not console.is_terminal:
        yield _PlainProgress(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title.ljust(28), total=total)
        yield lambda n=1: bar.advance(task, n)


class _PlainProgress:
    """One line every ten seconds, for logs."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.last = time.monotonic()

    def __call__(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= 10 or (self.done >= self.total and now - self.start > 2):
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            console.print(f"{self.title}: {self.done}/{self.total}, {now - self.start:.0f} s, {left:.0f} s left")
