"""Files whole or not at all, records that only grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab import run
from trimtab.errors import RunError
from trimtab.run import Cost, Records, alone, create, digest, environment, read_json, write, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.txt"
    write(path, "old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), no_room)
    with pytest.raises(RunError, match=r"cannot write .*a\.txt: No space left on device\n  Free some room"):
        write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_write_killed_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.txt"
    write(path, b"old")
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"new")
    assert path.read_text() == "old"


def test_write_replaces_text_and_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", "ä")
    write(tmp_path / "a", "ö".encode())
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ö"
    assert names(tmp_path) == ["a"]


json_values = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\u2028"), inner, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_json_round_trip(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_a_run_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_create_makes_parents_and_leaves_nothing(tmp_path: Path) -> None:
    folder = create(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert create(folder) == folder
    assert names(folder) == []


def test_a_file_in_the_way_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"cannot write to the run folder .*file.*\n  Give another folder"):
            create(folder)
    with pytest.raises(RunError, match=r"cannot write .*below"):
        write(tmp_path / "file" / "below", "x")


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("method", ["mkdir", "touch"])
def test_a_read_only_disk_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(Path, method, read_only)
    with pytest.raises(RunError, match=r"cannot write to .*: Read-only file system\n  Give another folder"):
        create(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_run_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        create(tmp_path)


def test_records_are_on_disk_at_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.add("a", reply="one\n\u2028two")
    records.add("b", reply="ä")
    again = Records(path)
    assert "a" in again
    assert "c" not in again
    assert again["a"] == {"key": "a", "reply": "one\n\u2028two"}
    assert list(again.rows) == ["a", "b"]
    assert path.read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("torn", ['{"key": "c", "rep', '{"key": "c"}', "\ud83d".encode("utf-8", "surrogatepass")])
def test_a_torn_last_line_is_dropped_and_its_work_repeated(tmp_path: Path, torn: str | bytes) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.add("a", n=1)
    records.add("b", n=2)
    whole = path.read_bytes()
    path.write_bytes(whole + (torn.encode() if isinstance(torn, str) else torn))
    records = Records(path)
    assert list(records.rows) == ["a", "b"]
    assert path.read_bytes() == whole
    records.add("c", n=3)
    assert [row["n"] for row in Records(path).rows.values()] == [1, 2, 3]


def test_every_cut_loses_at_most_the_line_it_is_in(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path)
    for key in ("a", "b", "c"):
        records.add(key, reply="ä")
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert len(Records(path).rows) == whole[:cut].count(b"\n")


@pytest.mark.parametrize("line", ["{", "[]", '{"n": 1}', '{"key": []}', ""])
def test_a_damaged_line_that_was_whole_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{line}\n{{"key": "a"}}\n')
    with pytest.raises(RunError, match=r"r\.jsonl holds a line that is no record"):
        Records(path)


def test_a_record_that_cannot_be_written_is_not_remembered(tmp_path: Path) -> None:
    records = Records(tmp_path / "nowhere" / "r.jsonl")
    with pytest.raises(RunError, match="cannot write"):
        records.add("a")
    assert "a" not in records


def test_digest_is_pinned_and_sees_every_part() -> None:
    # Pinned: another value would throw away every reply kept on disk.
    assert digest([1, 2], 16) == "98d83828d4a6ef92"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest(1, 2), digest(12), digest("1", 2), digest([1, 2]), digest(2, 1)}) == 5


def test_cost_and_environment_are_plain_data() -> None:
    cost = Cost().record("here")
    assert cost["device"] == "here"
    assert 0 <= cost["seconds"] < 5
    assert 0.01 < cost["peak_memory_gb"] < 100
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["trimtab"] != "unknown"


def test_progress_is_quiet_for_short_work_and_prints_lines_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run.console, "print", said.append)
    with run.progress("working", 4) as advance:
        for seconds in (1, 9.5, 3):
            now[0] += seconds
            advance()
        advance(1)
    assert said[0] == "working: 2/4, 10 s, 10 s left"
    assert said[-1] == "working: 4/4, 14 s, 0 s left"
    assert len(said) == 2


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """And a killed one leaves no lock behind."""
    code = "import sys; from pathlib import Path; from trimtab.run import alone\nwith alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"in\n"
        with pytest.raises(RunError, match="another process is at work in"), alone(tmp_path):
            raise AssertionError("two at once")
        first.kill()
    with alone(tmp_path):
        pass
    with (
        alone(tmp_path),
        alone(tmp_path / "." / ""),
        ThreadPoolExecutor(1) as pool,
    ):  # who is in may enter again, and is still in
        with alone(tmp_path):
            pass

        def enter() -> None:
            with alone(tmp_path):
                pass

        with pytest.raises(RunError, match="another process is at work in"):
            pool.submit(enter).result()
