"""One exception tree: exit codes, messages, nearest names."""

from __future__ import annotations

import pytest

from trimtab import errors
from trimtab.errors import TrimtabError, UsageError, nearest

KINDS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, TrimtabError)]
USAGE = {"UsageError", "ConfigError", "PathError", "ModelError", "RoomError", "DataError"}


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_is_2_for_unusable_arguments_and_1_for_failures(kind: type[TrimtabError]) -> None:
    assert kind("x").exit_code == (2 if kind.__name__ in USAGE else 1)
    assert issubclass(kind, UsageError) == (kind.__name__ in USAGE)


def test_every_kind_of_the_docstring_exists() -> None:
    assert {k.__name__ for k in KINDS} == {word for word in errors.__doc__.split() if word.endswith("Error")}


def test_the_mend_stands_on_its_own_line_and_only_if_there_is_one() -> None:
    assert str(TrimtabError("no file x.", "Give a file.")) == "no file x.\n  Give a file."
    assert str(TrimtabError("no file x.")) == "no file x."


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trian", "Did you mean train?"),
        ("tests", "Did you mean test?"),
        ("zzz", "Known: test, train, validation."),
    ],
)
def test_nearest(word: str, sentence: str) -> None:
    assert nearest(word, ["validation", "train", "test"]) == sentence


def test_nearest_names_several() -> None:
    assert nearest("lr_", ["lr_a", "lr_b"]) == "Did you mean lr_b or lr_a?"
