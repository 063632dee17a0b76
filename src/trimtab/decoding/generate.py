"""Replies to chats: rendering, the engine, and text again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimtab.chat import Message, as_messages, render
from trimtab.decoding.engine import Sampling, generate_ids
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken


@dataclass(frozen=True)
class Reply:
    """A reply: its text, its token ids, and why it ended (`eos` or `length`)."""

    text: str
    ids: tuple[int, ...]
    stop: str


def generate(
    model: Model,
    chats: Sequence[str | Sequence[Message]],
    *,
    token: SoftToken | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    prefills: Sequence[str] | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Reply]:
    """Reply to every chat, in order; greedy at temperature 0.

    Args:
        chats: a user's words, or turns with `role` and `content`.
        token: guidance; checked against the model.
        prefills: words each reply is made to begin with; not part of the returned text.

    Raises:
        ArtefactError: the token belongs to another model.
    """
    if token is not None:
        token.check(model)
    words = prefills or [""] * len(chats)
    prompts = [
        token.render(model, as_messages(chat), prefill=prefill) if token else render(model, chat, prefill=prefill)
        for chat, prefill in zip(chats, words, strict=True)
    ]
    replies: dict[int, Reply] = {}
    rows: Iterator[tuple[int, Reply]] = (
        (row.index, Reply(model.tokenizer.decode(row.ids, skip_special_tokens=True), tuple(row.ids), row.stop))
        for row in generate_ids(
            model,
            [p.ids for p in prompts],
            vectors=token.vectors.to(model.device) if token else None,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, seed),
            batch_size=batch_size,
        )
    )
    for index, reply in rows:
        replies[index] = reply
        if progress:
            progress()
    return [replies[i] for i in range(len(chats))]
