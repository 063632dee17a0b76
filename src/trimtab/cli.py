"""The command line: thin verbs over the API. Progress goes to stderr; `--json` ends stdout with one JSON object.

Exit codes: 0 done, 1 failed, 2 unusable arguments, 130 interrupted. Nothing heavy is imported before a verb runs, so `--help` is
quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import TrimtabError

app = typer.Typer(
    help="Refine the safety behaviour of a language model with one token, and prove what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a hub id, a folder or a .gguf file")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with the same settings as these options")]
Json = Annotated[bool, typer.Option("--json", help="end stdout with one JSON object")]
Token = Annotated[Path | None, typer.Option("--token", metavar="RUN", help="folder of an align run")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; chosen for the device")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; the first accelerator there is")]
Revision = Annotated[str | None, typer.Option("--revision", help="commit or tag of a hub model")]
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
def align(
    model: ModelName,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="run folder")],
    data: Annotated[str | None, typer.Option(help="builtin, a .jsonl file or hf:owner/name@revision:split")] = None,
    limit: Annotated[int | None, typer.Option(help="train on at most so many prompts, in proportion")] = None,
    tokens: Annotated[int | None, typer.Option(help="number of soft tokens [1]")] = None,
    position: Annotated[
        str | None, typer.Option(help="start, after_bos, system, user, assistant, reply; auto tries them all")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    seed: Annotated[int | None, typer.Option(help="of batches and initial vector [0]")] = None,
    radius: Annotated[float | None, typer.Option(help="step size, in nats of loss")] = None,
    batch: Annotated[int | None, typer.Option(help="harmful, and as many benign, requests in a step")] = None,
    reply_tokens: Annotated[int | None, typer.Option(help="k: reply tokens the loss sees")] = None,
    benign_weight: Annotated[float | None, typer.Option(help="lambda: share of the benign loss, 0 to 1")] = None,
    gamma: Annotated[float | None, typer.Option(help="focal exponent; 0 is plain training")] = None,
    focal: Annotated[str | None, typer.Option(help="which samples count most: hard or easy")] = None,
    check: Annotated[int | None, typer.Option(help="held-out prompts compared before and after; 0 for none")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Train one soft token; the model stays frozen. The same command goes on with a run that was interrupted."""
    _align(_given(locals()), config, as_json)


@app.command("eval")
def evaluate(
    model: ModelName,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="run folder")],
    suite: Annotated[list[str] | None, typer.Option(help="a .jsonl file or builtin:test; may be repeated")] = None,
    token: Token = None,
    judge: Annotated[list[str] | None, typer.Option(help="keyword, logit; both if not given")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many rows a suite, in proportion")] = None,
    compare: Annotated[bool | None, typer.Option("--compare", help="also measure the model without the token")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="length of a reply")] = None,
    batch: Annotated[int | None, typer.Option(help="replies generated together")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure refusals on suites of labelled prompts. The same command again does only what is missing."""
    given = _given(locals())
    from trimtab.config import EvalSettings, settle
    from trimtab.evaluation.run import evaluate as run
    from trimtab.report.build import build
    from trimtab.report.summary import print_results

    settings = settle(EvalSettings, given, config)
    loaded, guidance = _load(settings)
    result = run(
        loaded,
        settings.suite,
        token=guidance,
        out=settings.out,
        compare=settings.compare,
        judges=settings.judge,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch,
    )
    print_results(result)
    report_path = build([settings.out], settings.out / "report.html")
    _finish(as_json, {**result, "report": str(report_path)})


@app.command()
def generate(
    model: ModelName,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='lines {"id", "prompt" | "messages", "prefill"?}')],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.jsonl", help="replies, in the same order")],
    token: Token = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="length of a reply [256]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [0]")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus; 1 is off")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling [0]")] = None,
    batch: Annotated[int | None, typer.Option(help="replies generated together")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Reply to every prompt of a file: {"id", "reply", "tokens", "stop"} a line, in input order."""
    given = _given(locals())
    from trimtab.config import GenerateSettings, settle
    from trimtab.decoding.generate import generate as run
    from trimtab.prompts.sources import read_chats
    from trimtab.run import create, progress, write

    settings = settle(GenerateSettings, given, config)
    chats = read_chats(settings.source)
    create(settings.out.parent)
    loaded, guidance = _load(settings)
    with progress("replies", len(chats)) as advance:
        replies = run(
            loaded,
            [chat.messages for chat in chats],
            token=guidance,
            prefills=[chat.prefill for chat in chats],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            batch_size=settings.batch,
            progress=advance,
        )
    lines = [
        {"id": chat.id, "reply": reply.text, "tokens": len(reply.ids), "stop": reply.stop}
        for chat, reply in zip(chats, replies, strict=True)
    ]
    write(settings.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    _finish(as_json, {"out": str(settings.out), "n": len(lines)})


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="folders of align or eval runs")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="report.html")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained page on one run, or comparing several."""
    from trimtab.report.build import build

    path = build(runs, out)
    typer.echo(f"report: {path}", err=True)
    _finish(as_json, {"report": str(path)})


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and why not."""
    from trimtab.doctor import examine, print_findings

    findings = examine()
    print_findings(findings)
    _finish(as_json, {"findings": findings})


def main() -> None:
    """Run a verb; a user's mistake is told without a traceback."""
    try:
        app()
    except TrimtabError as error:
        typer.echo(f"error: {error}", err=True)
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(error.exit_code)


def _align(given: dict[str, Any], config: Path | None, as_json: bool) -> None:
    from trimtab.config import AlignCommand, settle
    from trimtab.models import load
    from trimtab.prompts.sources import load_prompts
    from trimtab.report.summary import check_and_report
    from trimtab.run import console
    from trimtab.softtoken.align import align as run

    settings = settle(AlignCommand, given, config)
    records = load_prompts(settings.data)
    model = load(settings.model, dtype=settings.dtype, device=settings.device, revision=settings.revision)
    console.print(f"{model.name}: {model.reason}")
    try:
        token = run(model, records, out=settings.out, settings=settings.align())
        result = check_and_report(model, token, records, settings.out, settings.check)
    except KeyboardInterrupt:
        console.print(f"interrupted; run the same command again to go on ({settings.out} is kept)")
        raise
    _finish(as_json, result)


def _load(settings: Any) -> tuple[Any, Any]:
    """The model and, if named, the token made for it."""
    from trimtab.models import load
    from trimtab.run import console
    from trimtab.softtoken.artifact import SoftToken

    token = SoftToken.load(settings.token) if settings.token else None  # a bad path is told before the model loads
    model = load(settings.model, dtype=settings.dtype, device=settings.device, revision=settings.revision)
    console.print(f"{model.name}: {model.reason}")
    if token:
        token.check(model)
    return model, token


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, of a verb's arguments: `None` means "not given"; the rest is not a setting."""
    return {k: v for k, v in arguments.items() if v is not None and k not in ("config", "as_json")}


def _finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, default=str))
