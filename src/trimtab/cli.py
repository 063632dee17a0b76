"""The command line: thin verbs over the API. Progress goes to stderr, results to stdout; with `--json` stdout ends with one JSON object, and what is
for people goes to stderr.

Exit codes: 0 done, 1 failed, 2 unusable arguments, 130 interrupted. Nothing heavy is imported before a verb runs, so `--help` is
quick.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import ConfigError, TrimtabError, UsageError
from trimtab.options import COMMON, GUIDANCE, REPLY, Check, Data, FailOnHarm, Json, ModelName, Out, Seed, with_options

# What typer raises for arguments that it cannot read; the class has no public name.
ParseError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Refine the safety behaviour of a language model with one token, and prove what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEMO_MODEL = "smollm2-135m"
DEMO_LIMIT = 1200  # training prompts; reading all of them would take longer than the training


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="run folder")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """The whole main job on the embedded model: train a token, compare before and after, write the report."""
    _align({"model": DEMO_MODEL, "out": out, "limit": DEMO_LIMIT}, None, as_json)


@app.command()
@with_options(COMMON)
def align(
    model: ModelName,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="run folder")],
    data: Data = None,
    limit: Annotated[int | None, typer.Option(help="train on at most so many prompts, in proportion [all]")] = None,
    tokens: Annotated[int | None, typer.Option(help="number of soft tokens [1]")] = None,
    goal: Annotated[
        str | None, typer.Option(help="balance, or refuse: an expert for guided decoding [balance]")
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(help="start, after_bos, system, user, assistant, reply; auto tries them all [assistant]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="training steps [72]")] = None,
    seed: Annotated[int | None, typer.Option(help="of batches and initial vector [0]")] = None,
    radius: Annotated[float | None, typer.Option(help="step size, in nats of loss [0.2]")] = None,
    batch: Annotated[int | None, typer.Option(help="harmful, and as many benign, requests in a step [24]")] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(help="k: first tokens of a refusal that the loss sees [16]")
    ] = None,
    benign_weight: Annotated[float | None, typer.Option(help="lambda: share of the benign loss, 0 to 1 [0.8]")] = None,
    gamma: Annotated[float | None, typer.Option(help="focal exponent; 0 is plain training [0]")] = None,
    focal: Annotated[str | None, typer.Option(help="which samples count most: hard or easy [hard]")] = None,
    check: Check = None,
    fail_on_harm: FailOnHarm = False,
    **shared: Any,
) -> None:
    """Train one soft token; the model stays frozen. The same command goes on with a run that was interrupted."""
    _align(_given(locals()), shared["config"], shared["as_json"], fail_on_harm)


@app.command("eval")
@with_options(GUIDANCE, COMMON)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="smollm2-135m, a hub id, a folder, a .gguf file, or an endpoint: URL#MODEL"
        ),
    ],
    out: Out,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="xstest, advbench, or_bench_hard, ... (named suites), a .jsonl file or builtin:test; may be repeated [builtin:test]"
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="keyword (begins by declining), strict (and says that it cannot), phrase (declines anywhere), logit, guard:MODEL, guard:URL#MODEL, llm:URL#MODEL, majority:A+B+C; may be repeated [keyword, logit]"
        ),
    ] = None,
    taxonomy: Annotated[
        str | None,
        typer.Option(
            help="categories that guards judge by: builtin or a .json file, name to description [the guard's own]"
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="also measure harmful rows under an attack: prefill:10, past, base64, many_shot, role_play, ..., soft_prompt:40 (trained against it) or file:PATH; may be repeated"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many rows a suite, in proportion [all]")] = None,
    compare: Annotated[bool | None, typer.Option("--compare", help="also measure the model without the token")] = None,
    externality: Annotated[
        bool | None,
        typer.Option(
            "--externality",
            help="compare, under every fixed attack there is and on sums and questions with one answer: what does it break?",
        ),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="loss of a rate that is a harm, if clear of chance [0.02]")
    ] = None,
    fail_on_harm: FailOnHarm = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="length of a reply, in tokens [64]")] = None,
    batch: Annotated[int | None, typer.Option(help="replies generated together [32]")] = None,
    **shared: Any,
) -> None:
    """Measure refusals on suites of labelled prompts. The same command again does only what is missing."""
    given = _given(locals())
    from trimtab.config import EvalSettings, settle
    from trimtab.evaluation.attacks import apply
    from trimtab.evaluation.externality import FULL
    from trimtab.evaluation.guard import load_taxonomy
    from trimtab.evaluation.judges import asked
    from trimtab.evaluation.run import evaluate as run
    from trimtab.guidance import load_guided
    from trimtab.prompts.sources import ANSWERS
    from trimtab.report.build import build
    from trimtab.report.summary import print_results
    from trimtab.run import screen, tell

    settings = settle(EvalSettings, given, shared["config"])
    categories = load_taxonomy(settings.taxonomy) if settings.taxonomy else None
    asked(settings.judge, categories)  # a bad name is told before the model loads
    for name in settings.attack:
        apply(name, [])
    if fail_on_harm and not ((settings.compare or settings.externality) and (settings.token or settings.expert)):
        raise ConfigError(
            "--fail-on-harm compares, and here is nothing to compare.", "Add --compare, and --token or --expert."
        )
    loaded, guidance = (
        _load_endpoint(settings) if settings.model.startswith(("http://", "https://")) else load_guided(settings)
    )
    with _resumable(settings.out):
        result = run(
            loaded,
            tuple(dict.fromkeys((*settings.suite, *((ANSWERS,) if settings.externality else ())))),
            **guidance,
            out=settings.out,
            compare=settings.compare or settings.externality,
            judges=settings.judge,
            taxonomy=categories,
            attacks=tuple(dict.fromkeys((*settings.attack, *(FULL if settings.externality else ())))),
            margin=settings.margin,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch,
        )
    people = screen(shared["as_json"])
    print_results(result, people)
    report_path = build([settings.out], settings.out / "report.html")
    tell(people, f"Report: {report_path}")
    _finish(shared["as_json"], {**result, "report": str(report_path)})
    _exit_on_harm(result, fail_on_harm)
    if result["failed"] or any(judge["failed"] for judge in result.get("judging", {}).values()):
        raise typer.Exit(1)


@app.command()
@with_options(REPLY, GUIDANCE, COMMON)
def generate(
    model: ModelName,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='lines {"id", "prompt" | "messages", "prefill"?}')],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.jsonl", help="replies, in the same order")],
    trace: Annotated[
        Path | None, typer.Option(metavar="TRACE.jsonl", help="what the neuron did, a line a token")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="replies generated together [16]")] = None,
    **shared: Any,
) -> None:
    """Reply to every prompt of a file: {"id", "reply", "tokens", "stop"} a line, in input order."""
    given = _given(locals())
    from trimtab.config import GenerateSettings, settle
    from trimtab.decoding.generate import generate as run
    from trimtab.decoding.generate import traces
    from trimtab.guidance import load_guided
    from trimtab.prompts.sources import read_chats
    from trimtab.run import console, create, progress, screen, tell, write_jsonl

    settings = settle(GenerateSettings, given, shared["config"])
    _require_neuron(settings)
    chats, broken = read_chats(settings.source)
    for file in filter(None, (settings.out, settings.trace)):
        create(file.parent)
    loaded, guidance = load_guided(settings)
    with progress("replies", len(chats)) as advance:
        replies = run(
            loaded,
            [chat.messages for chat in chats],
            **guidance,
            prefills=[chat.prefill for chat in chats],
            streams=[chat.line for chat in chats],  # mending one line draws no other anew
            **settings.sampling(),
            batch_size=settings.batch,
            progress=advance,
        )
    lines = {
        chat.line: {
            **{"id": chat.id, "reply": reply.text, "tokens": len(reply.ids), "stop": reply.stop},
            **({"error": reply.error} if reply.error else {}),
        }
        for chat, reply in zip(chats, replies, strict=True)
    }
    lines |= {n: {"id": f"line-{n}", "reply": "", "tokens": 0, "stop": "error", "error": e} for n, e in broken.items()}
    write_jsonl(settings.out, [lines[n] for n in sorted(lines)])
    if settings.trace:
        write_jsonl(settings.trace, traces(loaded, [chat.id for chat in chats], replies))
    failed = [line["error"] for line in lines.values() if "error" in line]
    for error in failed:
        console.print(f"left out: {error}", markup=False)
    unrated = sum(bool(r.rating and not r.rating.parsed and not r.error) for r in replies)
    if unrated:
        console.print(
            f"{unrated} of {len(chats)} requests could not be rated; the expert was at its strongest for them"
        )
    tell(screen(shared["as_json"]), f"{len(lines) - len(failed)} replies: {settings.out}")
    _finish(shared["as_json"], {"out": str(settings.out), "n": len(lines), "failed": len(failed), "unrated": unrated})
    if failed:
        raise typer.Exit(1)


@app.command()
@with_options(REPLY, GUIDANCE, COMMON)
def chat(
    model: ModelName,
    trace: Annotated[
        bool | None, typer.Option("--trace", help="colour what the expert chose, draw the membrane")
    ] = None,
    **shared: Any,
) -> None:
    """Talk to a model, guided or not; an empty line ends it."""
    given = _given(locals())
    from trimtab.config import ChatSettings, settle
    from trimtab.guidance import load_guided
    from trimtab.run import console, screen
    from trimtab.terminal import converse

    settings = settle(ChatSettings, given, shared["config"])
    _require_neuron(settings)
    loaded, guidance = load_guided(settings)
    console.print("an empty line ends the conversation")
    turns = converse(loaded, guidance, settings.sampling(), settings.trace, screen(shared["as_json"]))
    _finish(shared["as_json"], {"messages": turns})


@app.command()
@with_options(COMMON)
def expert(
    model: ModelName,
    out: Out,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(help="train on at most so many prompts, in proportion [1600]")] = None,
    rank: Annotated[int | None, typer.Option(help="of the adapter's matrices [8]")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps [200]")] = None,
    batch: Annotated[int | None, typer.Option(help="harmful, and as many benign, requests in a step [8]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of AdamW [0.002]")] = None,
    prefix_share: Annotated[
        float | None, typer.Option(help="share of refusals trained behind a compliant opening [0.5]")
    ] = None,
    max_prefix: Annotated[
        int | None, typer.Option(help="tokens of an opening, at most, but for words of an attack [12]")
    ] = None,
    benign_weight: Annotated[float | None, typer.Option(help="lambda: share of the benign loss, 0 to 1 [0.7]")] = None,
    check: Check = None,
    fail_on_harm: FailOnHarm = False,
    seed: Seed = None,
    **shared: Any,
) -> None:
    """Train a safety expert for guided decoding: a LoRA adapter that refuses even after a compliant beginning."""
    given = _given(locals())
    from trimtab.config import ExpertCommand, ExpertSettings, settle
    from trimtab.guidance import load_model
    from trimtab.neuron.deep_alignment import train_expert
    from trimtab.prompts.sources import load_prompts
    from trimtab.report.summary import check_expert
    from trimtab.run import screen

    settings = settle(ExpertCommand, given, shared["config"])
    _require_check(settings.check, fail_on_harm)
    records = load_prompts(settings.data)
    loaded = load_model(settings)
    fields = settings.model_dump(include=set(ExpertSettings.model_fields))
    with _resumable(settings.out):
        train_expert(loaded, records, out=settings.out, settings=ExpertSettings(**fields))
        result = check_expert(loaded, records, settings.out, settings.check, screen(shared["as_json"]))
    _finish(shared["as_json"], result)
    _exit_on_harm(result.get("check", {}), fail_on_harm)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of an align run")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder of the checkpoint")],
    format: Annotated[
        str | None,
        typer.Option(
            help="hf: a Hugging Face checkpoint; gguf: the model's own GGUF file with a row more; peft: a prompt-tuning adapter, for tokens at the start [hf]"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model it was trained on, if it has moved since")] = None,
    untie: Annotated[
        bool | None,
        typer.Option("--untie/--keep-tied", help="a tied head as a table of its own [where the slot would be said]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export in DIR")] = False,
    verify: Annotated[bool, typer.Option(help="compare the result with the token on its model")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same settings as these options")] = None,
    as_json: Json = False,
) -> None:
    """Write the model with the token in it, for engines that know nothing of trimtab; verified."""
    given = _given(locals())
    from trimtab.config import ExportSettings, settle
    from trimtab.exporters.export import export_run
    from trimtab.run import screen

    settings = settle(ExportSettings, given, config)
    _finish(as_json, export_run(settings, screen(as_json)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="folders of align or eval runs")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="report.html")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained page on one run, or comparing several."""
    from trimtab.report.build import build
    from trimtab.run import screen, tell

    path = build(runs, out)
    tell(screen(as_json), f"Report: {path}")
    _finish(as_json, {"report": str(path)})


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and why not."""
    from trimtab.doctor import examine, print_findings
    from trimtab.run import screen

    findings = examine()
    print_findings(findings, screen(as_json))
    _finish(as_json, {"findings": findings})


def main() -> None:
    """Run a verb; a user's mistake is told without a traceback."""
    failure = None
    try:
        code = app(standalone_mode=False) or 0  # of typer.Exit
        if code == 130:
            failure = {"error": "interrupted", "kind": "KeyboardInterrupt"}
    except TrimtabError as error:
        typer.echo(f"error: {error}", err=True)
        code, failure = error.exit_code, {"error": str(error), "kind": type(error).__name__}
    except ParseError as error:
        error.show()
        code, failure = error.exit_code, {"error": error.format_message(), "kind": UsageError.__name__}
    except typer.Abort:
        code, failure = 1, {"error": "input ended", "kind": "Abort"}
    except Exception as error:  # a defect of ours, or of the machine: the traceback helps
        traceback.print_exc()
        code, failure = 1, {"error": str(error), "kind": type(error).__name__}
    if failure and "--json" in sys.argv:
        typer.echo(json.dumps(failure))
    sys.exit(code)


def _align(given: dict[str, Any], config: Path | None, as_json: bool, fail_on_harm: bool = False) -> None:
    from trimtab.config import AlignCommand, settle
    from trimtab.guidance import load_model
    from trimtab.prompts.sources import load_prompts
    from trimtab.report.summary import check_and_report
    from trimtab.run import screen
    from trimtab.softtoken.align import align as run

    settings = settle(AlignCommand, given, config)
    _require_check(settings.check, fail_on_harm)
    records = load_prompts(settings.data)
    model = load_model(settings)
    with _resumable(settings.out):
        token = run(model, records, out=settings.out, settings=settings.align())
        result = check_and_report(model, token, records, settings.out, settings.check, screen(as_json))
    _finish(as_json, result)
    _exit_on_harm(result.get("check", {}), fail_on_harm)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Work in a run folder alone, and say on Ctrl-C that nothing is lost.

    Raises:
        RunError: the folder cannot be written to, or another process is at work in it.
    """
    from trimtab.run import alone, console, create

    try:
        with alone(create(folder)):
            yield
    except KeyboardInterrupt:
        console.print(f"interrupted; run the same command again to go on ({folder} is kept)")
        raise


def _require_neuron(settings: Any) -> None:
    if settings.trace and (not settings.expert or settings.neuron == "never"):
        raise ConfigError("--trace shows what a neuron did, and here is none.", "Add --expert.")


def _load_endpoint(settings: Any) -> tuple[Any, dict[str, Any]]:
    from trimtab.config import GuidanceSettings, ModelSettings
    from trimtab.evaluation.endpoint import Endpoint

    local = {*GuidanceSettings.model_fields, *ModelSettings.model_fields} - {"model"}
    if given := [name for name in sorted(local) if getattr(settings, name) is not None]:
        option = given[0].replace("_", "-")
        raise ConfigError(f"--{option} is for a model that is loaded here, and this is an endpoint.", "Leave it out.")
    return Endpoint.named(settings.model), {}


def _require_check(check: int, fail_on_harm: bool) -> None:
    if fail_on_harm and not check:
        raise ConfigError(
            "--fail-on-harm looks at the held-out check, and --check 0 leaves it out.", "Give it prompts."
        )


def _exit_on_harm(result: dict[str, Any], asked: bool) -> None:
    if asked and (not result.get("paired") or result["externality"]["harms"]):
        raise typer.Exit(1)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, of a verb's arguments: `None` means "not given"; the rest is not a setting."""
    given = {**arguments, **arguments.get("shared", {})}
    return {
        k: v for k, v in given.items() if v is not None and k not in ("config", "as_json", "shared", "fail_on_harm")
    }


def _finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, default=str))
