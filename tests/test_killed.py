"""An evaluation that is killed, at whatever moment, and run again ends with the same files, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import vectors_for
from trimtab.evaluation.run import evaluate
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken

KILLS = 20
SAME = ("results.json", "rows.json")


def in_a_child(work: Callable[[], Any]) -> int:
    """Start `work` in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def wait_for(lines: int, path: Path) -> None:
    """Until a file has so many lines, or for a minute."""
    end = time.perf_counter() + 60
    while time.perf_counter() < end and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that a process with threads forks: none of them is needed
def test_killed_at_twenty_moments(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny("llama", "chatml")
    token = SoftToken.of(model, vectors_for(model, 1, 30.0), "user")
    rows = [
        {"id": f"{label}{i}", "prompt": f"{'Do' * (1 + i % 5)} {label} {i}.", "label": label, "category": f"c{i % 2}"}
        for i in range(10)
        for label in ("harmful", "benign")
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder: Path) -> None:
        options: dict[str, Any] = {
            "compare": True,
            "attacks": ("past", "prefill:3"),
            "max_new_tokens": 12,
            "batch_size": 4,
        }
        evaluate(model, [str(tmp_path / "suite.jsonl")], token=token, out=folder, **options)

    start = time.perf_counter()
    run(tmp_path / "whole")
    whole = time.perf_counter() - start
    wanted = [(tmp_path / "whole" / name).read_bytes() for name in SAME]
    assert b'"refusal_rate": 0' in wanted[0]
    replies_in_all = len((tmp_path / "whole" / "replies.jsonl").read_bytes().splitlines())
    rng, interrupted = random.Random(0), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        child = in_a_child(lambda folder=folder: run(folder))
        replies = folder / "replies.jsonl"
        if number % 2:  # at any time
            time.sleep(rng.uniform(0.02, whole))
        else:  # among the replies
            wait_for(rng.randrange(1, replies_in_all), replies)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        interrupted += replies.exists() and not (folder / "results.json").exists()
        run(folder)
        assert [(folder / name).read_bytes() for name in SAME] == wanted
    assert interrupted >= 5  # the others were killed before the first reply, or had them all
