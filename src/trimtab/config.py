"""Typed settings of every verb, shared by the command line, the config file and the API. Defaults live only here."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.chat import Position
from trimtab.errors import ConfigError, nearest
from trimtab.models import MAX_TOKENS

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Refuses unknown keys and checks ranges at construction. A number may stand for its words: `alpha = 0.5` in a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class ModelSettings(Settings):
    """What to load."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    revision: str | None = None


class AlignSettings(Settings):
    """How a soft token is trained. Defaults were chosen on the builtin validation split with SmolLM2-135M-Instruct."""

    data: str = "builtin"
    """`builtin`, a .jsonl file, or hf:owner/name@revision:split."""
    limit: int | None = Field(default=None, ge=2)
    """Train on at most so many prompts, groups and categories in proportion."""
    tokens: int = Field(default=1, ge=1, le=MAX_TOKENS)
    """How many soft tokens; each is one row of hidden size."""
    goal: Literal["balance", "refuse"] = "balance"
    """`balance` for a token that is always on; `refuse` for the expert of guided decoding: it also refuses after a compliant opening."""
    position: Position | Literal["auto"] = "assistant"
    """Where the token goes; `auto` tries several and keeps the best on validation."""
    steps: int = Field(default=72, ge=1)
    seed: int = 0
    radius: float = Field(default=0.2, gt=0)
    """Step size: how far the samples' losses may move in one step, in nats; the peak of a cosine schedule."""
    damping: float = Field(default=0.1, gt=0)
    """Of the Fisher matrix, relative to its mean diagonal."""
    batch: int = Field(default=24, ge=2)
    """Harmful and as many benign requests in a step."""
    reply_tokens: int = Field(default=16, ge=1, le=64)
    """k: first tokens of a refusal that the loss sees; room for a whole one, so that it also learns to end there."""
    benign_weight: float = Field(default=0.8, ge=0, le=1)
    """lambda: share of the benign loss."""
    gamma: float = Field(default=0.0, ge=0)
    """Focal exponent; 0 is plain training."""
    focal: Literal["hard", "easy"] = "hard"
    refusal: str = ""
    """The refusal to learn where the model has none of its own; of a few, the one it says no with most readily if empty."""
    margin: float = Field(default=0.0, ge=0)
    """Refusal log-odds closer to 0 than this are filtered out as ambiguous."""
    retention: float = Field(default=1.0, ge=0, le=1)
    """Share kept of borderline requests that the model already answers."""
    eval_every: int = Field(default=36, ge=1)
    """Steps between looks at the validation split; there is always one at the end."""
    calibration_steps: int = Field(default=8, ge=0)
    """Steps at the end that balance harmful against benign; 0 leaves them out."""
    keep: float = Field(default=0.99, ge=0, le=1)
    """Share to keep of the refusals of harmful validation requests that the model had before, if there is any way; 0 asks for the balance alone."""


class AlignCommand(ModelSettings, AlignSettings):
    """`trimtab align`: a model, how to train, and where to."""

    out: Path
    check: int = Field(default=120, ge=0)
    """Held-out prompts compared before and after; 0 for none."""

    def align(self) -> AlignSettings:
        """The training settings alone."""
        return AlignSettings(**self.model_dump(include=set(AlignSettings.model_fields)))


class ExpertSettings(Settings):
    """How a LoRA expert is trained. Defaults were chosen on the builtin validation split with SmolLM2-135M-Instruct."""

    data: str = "builtin"
    """`builtin`, a .jsonl file, or hf:owner/name@revision:split."""
    limit: int | None = Field(default=1600, ge=2)
    """Train on at most so many prompts, groups and categories in proportion."""
    rank: int = Field(default=8, ge=1)
    """Of each adapter matrix."""
    lora_alpha: float = Field(default=16, gt=0)
    """The adapter's output is scaled by lora_alpha / rank."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Of AdamW: the peak, after a linear warm-up, of a cosine schedule."""
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=8, ge=1)
    """Harmful and as many benign requests in a step."""
    prefix_share: float = Field(default=0.5, ge=0, le=1)
    """Chance that a refusal is trained behind a compliant opening, and share of answers behind words of a prefill attack."""
    max_prefix: int = Field(default=12, ge=1)
    """Tokens of an opening, at most; words of an attack come before these."""
    reply_tokens: int = Field(default=12, ge=1, le=64)
    """First tokens of the model's own words, answers and refusals, that the loss sees."""
    benign_weight: float = Field(default=0.7, ge=0, le=1)
    """lambda: share of the benign loss."""
    seed: int = 0
    refusal: str = ""
    """The refusal to learn where the model has none of its own; of a few, the one it says no with most readily if empty."""


class ExpertCommand(ModelSettings, ExpertSettings):
    """`trimtab expert`: a model, how to train, and where to."""

    out: Path
    check: int = Field(default=120, ge=0)
    """Held-out prompts compared before and after; 0 for none."""


class ExportSettings(Settings):
    """What becomes of a token, and where."""

    run: Path
    out: Path
    format: Literal["hf", "gguf", "peft"] = "hf"
    """hf: a Hugging Face checkpoint. gguf: the model's own GGUF file with a row more. peft: an adapter, prompt tuning for tokens at the start and trainable tokens elsewhere."""
    model: str | None = None
    """The model it was trained on, if it has moved since."""
    untie: bool | None = None
    """Write out a tied head as a table of its own; where the slot would be said, if not given."""
    force: bool = False
    """Replace an earlier export in the target folder."""
    verify: bool = True
    dry_run: bool = False


class GuidanceSettings(ModelSettings):
    """A model, and what guides it: nothing, a token that is always on, or an expert behind a neuron."""

    token: Path | None = None
    """Folder of an align run."""
    expert: str | None = None
    """token:RUN, lora:DIR or model:ID."""
    neuron: str | None = None
    """lif (or code), paper, primed, ema, always, never or random:P; lif if not given."""
    threshold: float | None = Field(default=None, gt=0)
    """Membrane potential at which the neuron fires; the neuron's own if not given."""
    divergence: Literal["tv", "js", "kl", "cosine"] | None = None
    risk: str | None = None
    """Who rates requests: expert, self, logits, guard:MODEL or const:R; the expert if not given."""
    alpha: str | None = None
    """Strength from risk: code, paper, or one number for all; code if not given."""
    early_stop: Literal["off", "published", "corrected"] | None = None
    draft: int | None = Field(default=None, ge=0, le=64)
    """Tokens that an expert with weights of its own writes ahead; adaptive if not given."""


class EvalSettings(GuidanceSettings):
    """What is measured."""

    suite: tuple[str, ...] = ("builtin:test",)
    out: Path
    judge: tuple[str, ...] = ("keyword", "logit")
    taxonomy: str | None = None
    """What guards judge by: builtin or a JSON file; their own categories if not given."""
    attack: tuple[str, ...] = ()
    """What is also done to harmful rows, see `evaluation/attacks.py`."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows a suite, stratified by label and category."""
    externality: bool = False
    """Compare, under every fixed attack there is."""
    margin: float = Field(default=0.02, ge=0, le=1)
    """A loss of a rate above this, and clear of chance, is a harm."""
    compare: bool = False
    """Also measure the model without guidance, with paired tests."""
    max_new_tokens: int = Field(default=64, ge=1)
    batch: int = Field(default=32, ge=1)
    concurrency: int = Field(default=8, ge=1)
    """Rows at a time, of an endpoint."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one answer of an endpoint."""


class ReplySettings(GuidanceSettings):
    """How replies are drawn."""

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int = 0
    stop: tuple[str, ...] = ()

    def sampling(self) -> dict[str, Any]:
        """What `generate` takes by the same name."""
        return self.model_dump(include=set(ReplySettings.model_fields) - set(GuidanceSettings.model_fields))


class ChatSettings(ReplySettings):
    """A conversation."""

    trace: bool = False


class GenerateSettings(ReplySettings):
    """What is replied to, and where to."""

    source: Path
    out: Path
    trace: Path | None = None
    """Where to write what the neuron did, a line a token."""
    batch: int = Field(default=16, ge=1)


def settle(kind: type[S], given: dict[str, Any], file: Path | None = None) -> S:
    """Settings from the defaults, a TOML file and what was given, the last word being what was given.

    Raises:
        ConfigError: unknown keys, with the nearest name; values out of range, all of them at once.
    """
    values = {**(_read_toml(file) if file else {}), **{k: v for k, v in given.items() if v is not None}}
    unknown = [key for key in values if key not in kind.model_fields]
    if unknown:
        where = f"{file}: " if file else ""
        raise ConfigError(f"{where}unknown setting {unknown[0]!r}.", nearest(unknown[0], kind.model_fields))
    try:
        return kind(**values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {_plain(e)}" for e in error.errors()]
        raise ConfigError("; ".join(wrong) + ".", "See --help for what is allowed.") from None


def _plain(error: Any) -> str:
    message = str(error["msg"])
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float) else ""
    return message[0].lower() + message[1:] + shown


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        raise ConfigError(f"no config file {file}.", "Give the path of a TOML file.") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}", "A config file is TOML: name = value.") from None
