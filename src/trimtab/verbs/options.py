"""Options that several verbs share; `None` is "not given". Defaults live in `config.py`; the help repeats them by hand, so that it needs no settings
to be imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Verb = TypeVar("Verb", bound=Callable[..., None])

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a hub id, a folder or a .gguf file")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="run folder")]
Json = Annotated[bool, typer.Option("--json", help="end stdout with one JSON object")]
Seed = Annotated[int | None, typer.Option(help="of everything that is drawn [0]")]
Data = Annotated[str | None, typer.Option(help="builtin, a .jsonl file or hf:owner/name@revision:split [builtin]")]
Check = Annotated[int | None, typer.Option(help="held-out prompts compared before and after; 0 for none [120]")]
FailOnHarm = Annotated[
    bool, typer.Option("--fail-on-harm", help="exit 1 if something got worse by more than the margin, clear of chance")
]

COMMON: dict[str, Any] = {
    "dtype": Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; chosen for the device if not given")
    ],
    "device": Annotated[str | None, typer.Option(help="cpu, cuda, mps; the first accelerator there is if not given")],
    "revision": Annotated[str | None, typer.Option(help="commit or tag of a hub model")],
    "config": Annotated[Path | None, typer.Option(help="TOML file with the same settings as these options")],
    "as_json": Json,
}
GUIDANCE: dict[str, Any] = {
    "token": Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="a soft token, always on: folder of an align run, or of a PEFT adapter of tokens"
        ),
    ],
    "expert": Annotated[
        str | None, typer.Option(metavar="REF", help="token:RUN, lora:DIR or model:ID, heard when the neuron fires")
    ],
    "neuron": Annotated[
        str | None,
        typer.Option(
            help="lif or code (as in the published code), paper (hard reset), primed (may fire at the first token); for ablation ema, always, never, random:P [lif]"
        ),
    ],
    "threshold": Annotated[float | None, typer.Option(help="membrane potential at which the neuron fires [1]")],
    "divergence": Annotated[str | None, typer.Option(help="of base and expert: tv, js, kl or cosine [tv]")],
    "risk": Annotated[
        str | None,
        typer.Option(
            help="who rates requests from 0, harmless, to 10: expert, self, logits, guard:MODEL or const:R [expert]"
        ),
    ],
    "alpha": Annotated[
        str | None,
        typer.Option(help="strength of the expert, 0 to 1, by risk: table code or paper, or one number for all [code]"),
    ],
    "early_stop": Annotated[str | None, typer.Option(help="cut degenerate tails: off, published or corrected [off]")],
    "draft": Annotated[
        int | None, typer.Option(help="tokens a model:ID expert writes ahead; as many as pay if not given")
    ],
}
REPLY: dict[str, Any] = {
    "max_new_tokens": Annotated[int | None, typer.Option(help="length of a reply, in tokens [256]")],
    "temperature": Annotated[float | None, typer.Option(help="0 is greedy [0]")],
    "top_p": Annotated[float | None, typer.Option(help="nucleus; 1 is off [1]")],
    "top_k": Annotated[int | None, typer.Option(help="draw from the k likeliest; 0 is off [0]")],
    "min_p": Annotated[
        float | None, typer.Option(help="drop what is less likely than this share of the best; 0 is off [0]")
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help="above 1, what was said is less likely; 1 is off [1]")
    ],
    "stop": Annotated[list[str] | None, typer.Option(help="a string that ends a reply; may be repeated")],
    "seed": Seed,
}


def with_options(*groups: dict[str, Any]) -> Callable[[Verb], Verb]:
    """Give a verb the options of `groups`, which it receives as keywords."""

    def decorate(verb: Verb) -> Verb:
        hints = get_type_hints(verb, include_extras=True)
        hints |= {name: option for group in groups for name, option in group.items()}
        parameters = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in parameters} | {"return", "shared"}
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False if option is Json else None)
            for name, option in hints.items()
            if name not in taken
        ]
        signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in parameters])
        verb.__signature__ = signature  # type: ignore[attr-defined]
        verb.__annotations__ = {name: hint for name, hint in hints.items() if name != "shared"}
        return verb

    return decorate
