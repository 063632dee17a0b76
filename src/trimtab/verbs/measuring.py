"""Verbs that measure, and show what was measured: eval, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import ConfigError
from trimtab.verbs.common import exit_on_harm, finish, only_given, resumable
from trimtab.verbs.options import COMMON, GUIDANCE, FailOnHarm, Json, Out, with_options


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
    concurrency: Annotated[
        int | None, typer.Option(help="rows at a time, of an endpoint that replies or judges [8]")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds for one answer of an endpoint [120]")] = None,
    **shared: Any,
) -> None:
    """Measure refusals on suites of labelled prompts. The same command again does only what is missing."""
    given = only_given(locals())
    from trimtab.config import EvalSettings, settle
    from trimtab.evaluation.attacks import apply
    from trimtab.evaluation.externality import FULL, JUDGES
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
    far = settings.model.startswith(("http://", "https://"))
    compared, guided = settings.compare or settings.externality, settings.token or settings.expert
    if fail_on_harm and not (compared and guided):
        raise ConfigError(
            "--fail-on-harm compares, and here is nothing to compare.", "Add --compare, and --token or --expert."
        )
    if compared and not guided and not far:
        raise ConfigError(
            "--compare and --externality compare the untouched model with a token or an expert, and none is given.",
            "Add --token or --expert, or leave them out.",
        )
    loaded, guidance = _load_endpoint(settings) if far else load_guided(settings)
    with resumable(settings.out):
        result = run(
            loaded,
            tuple(dict.fromkeys((*settings.suite, *((ANSWERS,) if settings.externality else ())))),
            **guidance,
            out=settings.out,
            compare=compared,
            judges=tuple(dict.fromkeys((*settings.judge, *(JUDGES if settings.externality else ())))),
            taxonomy=categories,
            attacks=tuple(dict.fromkeys((*settings.attack, *(FULL if settings.externality else ())))),
            margin=settings.margin,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
        )
    people = screen(shared["as_json"])
    print_results(result, people)
    report_path = build([settings.out], settings.out / "report.html")
    tell(people, f"Report: {report_path}")
    finish(shared["as_json"], {**result, "report": str(report_path)})
    exit_on_harm(result, fail_on_harm)
    if result["failed"] or any(judge["failed"] for judge in result.get("judging", {}).values()):
        raise typer.Exit(1)


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
    finish(as_json, {"report": str(path)})


def _load_endpoint(settings: Any) -> tuple[Any, dict[str, Any]]:
    from trimtab.config import GuidanceSettings, ModelSettings
    from trimtab.evaluation.endpoint import Endpoint

    local = {*GuidanceSettings.model_fields, *ModelSettings.model_fields} - {"model"}
    if given := [name for name in sorted(local) if getattr(settings, name) is not None]:
        option = given[0].replace("_", "-")
        raise ConfigError(f"--{option} is for a model that is loaded here, and this is an endpoint.", "Leave it out.")
    return Endpoint.named(settings.model, concurrency=settings.concurrency, timeout=settings.timeout), {}
