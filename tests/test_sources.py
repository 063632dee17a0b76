"""Reading prompts: what is accepted, and errors that name file, line and field."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import DataError
from trimtab.prompts.records import Record
from trimtab.prompts.sources import load_prompts, read_chats, read_jsonl, require_both_labels, split_records

GOOD = '{"prompt": "Hi", "label": "benign"}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def record(i: int = 0, **fields: Any) -> Record:
    return Record(**{"id": str(i), "prompt": f"prompt {i}", "label": "benign", **fields})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"line 3: not JSON"),
        ('["Hi"]', r"line 3: a list, not an object"),
        ('{"label": "benign"}', r"line 3, field prompt: missing or empty"),
        ('{"prompt": "  ", "label": "benign"}', r"line 3, field prompt: missing or empty"),
        ('{"prompt": null, "messages": [], "label": "benign"}', r"line 3, field prompt: missing or empty"),
        ('{"prompt": 7, "label": "benign"}', r"line 3, field prompt: input should be a valid string"),
        ('{"prompt": "Hi"}', r"line 3, field label: field required"),
        ('{"prompt": "Hi", "label": "safe"}', r"line 3, field label: .*\n  Labels are harmful and benign."),
        ('{"prompt": "Hi", "label": "benign", "group": "odd"}', r"line 3, field group: "),
        ('{"prompt": "Hi", "label": "benign", "split": "dev"}', r"line 3, field split: "),
        ('{"messages": ["Hi"], "label": "benign"}', r"line 3, field messages\.0: "),
        ('{"id": 4, "prompt": "Hi", "label": "benign"}', r"line 3, field id: "),
    ],
)
def test_a_bad_line_is_named_with_its_file_number_and_field(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "some.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=f"^{path}, {says}"):
        load_prompts(path)


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    rows = [json.dumps({"id": i, "prompt": i, "label": "benign"}) for i in "abcb"]
    with pytest.raises(DataError, match=r"some\.jsonl: 2 rows have the id 'b'"):
        load_prompts(write(tmp_path / "some.jsonl", *rows))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "harmful.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no file .*harmfull\.jsonl\.\n  Did you mean harmful\.jsonl\?"):
        load_prompts(tmp_path / "harmfull.jsonl")
    with pytest.raises(
        DataError, match=r"no file .*\n  A prompt file is JSON Lines; --data and --suite take builtin too\."
    ):
        load_prompts(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{"])
def test_an_empty_or_binary_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"some\.jsonl"):
        load_prompts(path)


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        load_prompts(tmp_path)


def test_what_a_line_may_leave_out(tmp_path: Path) -> None:
    lines = ['{"prompt": "A", "label": "harmful", "group": null, "target": "Sure"}', "", GOOD]
    first, second = load_prompts(write(tmp_path / "mine.jsonl", *lines))
    assert (first.id, first.group, first.chat) == ("mine-00001", "harmful", [{"role": "user", "content": "A"}])
    assert (second.id, second.group, second.split) == ("mine-00003", "plain", None)


def test_a_conversation_is_kept_whole(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (found,) = load_prompts(write(tmp_path / "a.jsonl", json.dumps({"messages": turns, "label": "benign"})))
    assert found.chat == turns
    assert found.text == "Hi"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), ascii_only=st.booleans())
def test_every_prompt_comes_back_as_it_was(tmp_path: Path, text: str, ascii_only: bool) -> None:
    line = json.dumps({"prompt": text, "label": "benign"}, ensure_ascii=ascii_only)
    assert [r.prompt for r in read_jsonl(write(tmp_path / "a.jsonl", line, GOOD))] == [text, "Hi"]


# Conversations without labels


def test_conversations_stand_in_their_lines(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}]
    rows = [
        {"prompt": "A", "label": "odd"},
        {"id": 7, "messages": turns, "prefill": "Sure"},
        {"id": "x", "prompt": "B"},
    ]
    path = write(tmp_path / "a.jsonl", json.dumps(rows[0]), "", json.dumps(rows[1]), json.dumps(rows[2]))
    found, broken = read_chats(path)
    assert [(chat.line, chat.id, chat.prefill) for chat in found] == [(1, "1", ""), (3, "7", "Sure"), (4, "x", "")]
    assert found[0].messages == ({"role": "user", "content": "A"},)
    assert list(found[1].messages) == turns
    assert broken == {}


def test_turns_in_parts_and_calls_of_tools_are_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "3"},
    ]
    (found,), broken = read_chats(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})))
    assert (list(found.messages), broken) == (turns, {})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3: not JSON"),
        ('["Hi"]', "line 3: a list, not an object"),
        ("{}", "line 3, field prompt: missing or empty"),
        ('{"prompt": 7}', "line 3, field messages.0: a turn needs a role and content"),
        ('{"messages": 7}', "line 3, field messages: input should be a valid tuple"),
        ('{"messages": "Hi"}', "line 3, field messages: input should be a valid tuple"),
        ('{"messages": {"role": "user", "content": "Hi"}}', "line 3, field messages: input should be a valid tuple"),
        ('{"messages": ["Hi"]}', "line 3, field messages.0: input should be a valid dictionary"),
        ('{"messages": [{"content": "Hi"}]}', "line 3, field messages.0: a turn needs a role and content"),
        ('{"messages": [{"role": 1, "content": "Hi"}]}', "line 3, field messages.0: a turn needs a role and content"),
        ('{"prompt": "", "messages": [{"role": "user"}]}', "line 3, field messages.0: a turn needs a role and content"),
        ('{"prompt": "Hi", "prefill": 3}', "line 3, field prefill: input should be a valid string"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "some.jsonl", GOOD, "", line, GOOD)
    found, broken = read_chats(path)
    assert [chat.line for chat in found] == [1, 4]
    assert list(broken) == [3]
    assert broken[3].startswith(f"{path}, {says}")
    # A file without one good line has nothing to say but what is wrong with its first.
    with pytest.raises(DataError, match="line 1"):
        read_chats(write(path, line, line))


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_conversations(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no prompts"):
        read_chats(tmp_path / "a.jsonl")


# Splits and hub sets


def test_builtin_splits() -> None:
    everything = load_prompts("builtin")
    parts = {split: load_prompts(f"builtin:{split}") for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(everything)
    for split, records in parts.items():
        assert {r.split for r in records} == {split}
        assert records == load_prompts("builtin", split=split)
    with pytest.raises(DataError, match=r"builtin has no split 'tset'\.\n  Did you mean test\?"):
        load_prompts("builtin:tset")


def test_splits_keep_topics_whole_and_stay_when_rows_are_added() -> None:
    records = [record(i, topic=f"topic {i % 97}") for i in range(970)]
    found = split_records(records)
    by_topic = {r.topic: r.split for r in found}
    assert all(r.split == by_topic[r.topic] for r in found)
    assert split_records(records[:50]) == found[:50]
    shares = [sum(s == split for s in by_topic.values()) / 97 for split in ("train", "validation", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.1)
    # Fixed for ever: a changed hash would leak test prompts into training.
    assert [r.split[:2] for r in found[:12]] == ["tr", "te", "te", "tr", "te", "va", "tr", "tr", "va", "te", "tr", "te"]


def test_a_given_split_is_kept_and_without_topics_the_prompt_decides() -> None:
    assert split_records([record(split="test", topic="topic 0")])[0].split == "test"
    same = split_records([record(1, prompt="same words"), record(2, prompt="same words")])
    assert same[0].split == same[1].split


@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_both_labels_are_needed(label: str) -> None:
    other = "benign" if label == "harmful" else "harmful"
    with pytest.raises(DataError, match=f"x.jsonl holds no {other} prompts .*'{label}': 3"):
        require_both_labels([record(i, label=label) for i in range(3)], "x.jsonl")
    require_both_labels([record(0, label="harmful"), record(1)], "x.jsonl")  # does not raise


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:owner/set", "names no revision"),
        ("hf:owner/set:train", "names no revision"),
        ("hf:set@1", "is no hub data set"),
        ("hf:owner/set@1:train:2", "is no hub data set"),
    ],
)
def test_a_hub_set_needs_a_revision(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_prompts(name)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=answer))


def test_a_hub_set_is_read_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, revision: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, revision, split))
        return [{"prompt": "Hi", "label": "benign", "extra": 1}]

    fake_datasets(monkeypatch, load_dataset)
    (found,) = load_prompts("hf:own-er/some.set@abc1234:test")
    load_prompts("hf:own-er/some.set@abc1234")
    assert asked == [("own-er/some.set", "abc1234", "test"), ("own-er/some.set", "abc1234", "train")]
    assert (found.id, found.prompt) == ("own-er/some.set-00000", "Hi")


def test_trouble_with_a_hub_set_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    fake_datasets(monkeypatch, unreachable)
    with pytest.raises(DataError, match="cannot load hf:a/b@c0ffee0: ConnectionError: offline"):
        load_prompts("hf:a/b@c0ffee0")
    fake_datasets(monkeypatch, lambda *_, **__: [{"prompt": "Hi"}])
    with pytest.raises(DataError, match="hf:a/b@c0ffee0, row 0, field label"):
        load_prompts("hf:a/b@c0ffee0")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets\.\n  pip install 'trimtab\[data\]'"):
        load_prompts("hf:a/b@c0ffee0")


def test_context_choices_and_turns_are_part_of_what_is_asked(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Sum it up.", "context": "A long text.", "label": "benign"},
        {"prompt": "2 + 2?", "choices": ["3", "4"], "label": "benign"},
        {"turns": ["Hi", "Hello", "And now?"], "label": "benign"},
        {"turns": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "label": "benign"},
    ]
    found = load_prompts(write(tmp_path / "a.jsonl", *map(json.dumps, lines)))
    assert [r.chat[-1]["content"] for r in found] == [
        "A long text.\n\n---\n\nSum it up.",
        "2 + 2?\nA. 3\nB. 4\nAnswer with one letter.",
        "And now?",
        "Hi",
    ]
    assert [turn["role"] for turn in found[2].chat] == ["user", "assistant", "user"]
    assert found[3].chat[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("turns", [["Hi", "Hello"], [{"role": "assistant", "content": "Hi"}]])
def test_a_conversation_that_the_user_does_not_end_is_told(tmp_path: Path, turns: list[Any]) -> None:
    with pytest.raises(DataError, match=r"line 1, field messages: .*must end in a user turn"):
        load_prompts(write(tmp_path / "a.jsonl", json.dumps({"turns": turns, "label": "benign"})))
