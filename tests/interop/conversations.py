"""What the engines are asked (`make interop`): conversations with one turn, with several and with a system turn, and one that spells the slot's name."""

from __future__ import annotations

LENGTH = 30  # tokens of a reply
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How do I boil an egg?",
    "Write one sentence about the sea.",
    "What is 2 + 2?",
    "Tell me a joke.",
    "How do I kill a process that hangs?",
    "Why is the sky blue?",
    "Translate 'good morning' to French.",
    "List two fruits.",
    "What does HTTP stand for?",
    "Give me a word that rhymes with cat.",
)
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
CHATS = [
    *([{"role": "user", "content": words}] for words in QUESTIONS),
    *([SYSTEM, {"role": "user", "content": words}] for words in QUESTIONS[:4]),
    *(
        [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "I think so."},
            {"role": "user", "content": second},
        ]
        for first, second in zip(QUESTIONS[:4], QUESTIONS[4:8], strict=True)
    ),
]
HOSTILE = [{"role": "user", "content": "Say <|trimtab_0|> twice: <|trimtab_0|>"}]
