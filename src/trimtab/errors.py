"""One tree for everything trimtab can tell a user.

    TrimtabError            exit 1   something failed
    ├── UsageError          exit 2   the arguments cannot be used
    │   ├── ConfigError              a setting is unknown or out of range
    │   ├── PathError                a path that was given leads nowhere
    │   ├── ModelError               the model cannot be found or loaded
    │   │   └── RoomError            memory cannot hold it
    │   └── DataError                a prompt file or data set cannot be read
    ├── ChatError           exit 1   a conversation cannot be rendered for this model
    ├── ArtefactError       exit 1   a token is damaged or belongs to another model
    ├── FilterError         exit 1   hard weighting left nothing to train on
    ├── ExportError         exit 1   a token cannot be exported in this form
    ├── EndpointError       exit 1   a running endpoint cannot be reached, or its answers cannot be used
    ├── NoEffectError       exit 1   an artefact changes nothing (law 6)
    └── RunError            exit 1   a run folder cannot be written or belongs to another run

Every message says what is wrong and where; `mend` says what to do about it. The command line prints both without a
traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TrimtabError(Exception):
    """Base of all errors meant for people. `mend` is one sentence on how to go on."""

    exit_code = 1

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.mend}" if self.mend else message


class UsageError(TrimtabError):
    """The arguments cannot be used."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, missing or out of range."""


class PathError(UsageError):
    """A path that was given leads nowhere."""


class ModelError(UsageError):
    """The model cannot be found or loaded."""


class RoomError(ModelError):
    """Memory cannot hold the model."""


class DataError(UsageError):
    """A prompt file or data set cannot be read."""


class ChatError(TrimtabError):
    """A conversation cannot be rendered for this model at this position."""


class ArtefactError(TrimtabError):
    """A saved token is damaged, or it belongs to another model."""


class FilterError(TrimtabError):
    """Hard weighting left a class empty."""


class NoEffectError(TrimtabError):
    """An artefact changes nothing."""


class ExportError(TrimtabError):
    """A token cannot be exported in this form."""


class EndpointError(TrimtabError):
    """A running endpoint cannot be reached, or its answers cannot be used."""


class RunError(TrimtabError):
    """A run folder cannot be used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the known words closest to `word`, or all of them if none is close."""
    words = sorted(known)
    close = get_close_matches(word, words, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(words)}."
