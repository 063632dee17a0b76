"""A Modelfile for Ollama, whose templates are Go's, not Jinja.

Only ChatML is translated, and only where the translation is the model's own template to the letter: `said` renders in Python what the Go template says,
and is compared with the model's for many conversations. Any other model gets a Modelfile that says what is left to do by hand.
"""

from __future__ import annotations

from itertools import pairwise

from trimtab.chat import POSITION_MEANING, Position, default_system, rendered_text
from trimtab.errors import ChatError
from trimtab.exporters.plan import Plan
from trimtab.exporters.template import Turns, conversations
from trimtab.models import Model
from trimtab.softtoken.artifact import SoftToken


def modelfile(model: Model, token: SoftToken, found: Plan) -> str:
    """The Modelfile of an exported GGUF file, in full; where the template is not known here, it says so."""
    head = f"FROM ./{found.files[0][0]}\n"
    slot = "".join(found.names)
    default = default_system(model)
    nowhere = token.position == "after_bos" or (token.position == "system" and default is None)
    if nowhere or not is_chatml(model):
        return (
            f"# Ollama's templates are Go's, and the chat template of this model was not translated: until a TEMPLATE is written here by hand, Ollama does not say\n"
            f"# the token and this model is the untouched one. Take the TEMPLATE of the base model (ollama show --template BASE) and put\n"
            f"#   {slot}\n"
            f"# into it once a conversation: {POSITION_MEANING[token.position]}.\n{head}"
        )
    template = chatml(slot, token.position, default)
    return (
        f"# The slot {slot}: {POSITION_MEANING[token.position]}. Its place was checked against the model's own template; Ollama itself was not tried.\n"
        f"# Go's templates cannot take the slot's name apart where a user spells it: filter it from messages before they come here.\n"
        f'{head}TEMPLATE """{template}"""\nPARAMETER stop "<|im_end|>"\n'
    )


def chatml(slot: str, position: Position, default: str | None) -> str:
    """ChatML as a Go template, with `slot` at `position`; `default` is said as system where no turn is one."""
    at = {each: slot if each == position else "" for each in ("start", "system", "user", "assistant", "reply")}
    system = f"<|im_start|>system\n{default}{at['system']}<|im_end|>\n" if default is not None else ""
    last = '{{- $user := -1 }}{{- range $i, $m := .Messages }}{{- if eq $m.Role "user" }}{{- $user = $i }}{{- end }}{{- end }}\n'
    begun = (
        f'{{{{- if ne (index .Messages 0).Role "system" }}}}{{{{ "{_go(system)}" }}}}{{{{- end }}}}\n' if system else ""
    )
    user = f"{{{{ if eq $i $user }}}}{at['user']}{{{{ end }}}}" if at["user"] else ""
    end = f'{{{{ if and (eq $i 0) (eq $m.Role "system") }}}}{at["system"]}{{{{ end }}}}' if at["system"] else ""
    return (
        (last if user else "")
        + (f'{{{{- "{at["start"]}" }}}}\n' if at["start"] else "")
        + begun
        + "{{- range $i, $m := .Messages }}\n"
        + "{{- $last := eq (len (slice $.Messages $i)) 1 }}<|im_start|>{{ $m.Role }}\n"
        + user
        + "{{ $m.Content }}"
        + end
        + '{{ if or (ne $m.Role "assistant") (not $last) }}<|im_end|>\n{{ end }}'
        + f'{{{{- if and $last (ne $m.Role "assistant") }}}}{{{{ "{_go(at["assistant"])}<|im_start|>assistant\\n{_go(at["reply"])}" }}}}'
        + "{{- end }}\n{{- end }}"
    )


def is_chatml(model: Model) -> bool:
    """Whether the model's own template is the ChatML that `chatml` writes, in every conversation that Ollama can hold: turns alternate, no tools."""
    default = default_system(model)
    for turns, _, extra in conversations():
        if any(a["role"] == b["role"] for a, b in pairwise(turns)) or extra or turns[-1]["role"] != "user":
            continue  # Ollama joins neighbours of one role, and leaves a last reply open
        try:
            if rendered_text(model, turns, header=True) != said(turns, default):
                return False
        except ChatError:
            return False
    return True


def said(turns: Turns, default: str | None) -> str:
    """What `chatml` renders without a slot: the text that the Go program gives, in Python."""
    if default is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": default}, *turns]
    return "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns) + "<|im_start|>assistant\n"


def _go(text: str) -> str:
    """As the inside of a Go string."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
