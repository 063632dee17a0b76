"""Verbs that train: demo, align, expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.verbs.common import exit_on_harm, finish, only_given, require_check, resumable
from trimtab.verbs.options import COMMON, Check, Data, FailOnHarm, Json, ModelName, Out, Seed, with_options

DEMO_MODEL = "smollm2-135m"
DEMO_LIMIT = 1200  # training prompts; reading all of them would take longer than the training


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="run folder")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """The whole main job on the embedded model: train a token, compare before and after, write the report."""
    _align({"model": DEMO_MODEL, "out": out, "limit": DEMO_LIMIT}, None, as_json)


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
    keep: Annotated[
        float | None,
        typer.Option(
            help="share to keep of the refusals that the model had of harmful requests; 0: balance alone [0.99]"
        ),
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="focal exponent; 0 is plain training [0]")] = None,
    focal: Annotated[str | None, typer.Option(help="which samples count most: hard or easy [hard]")] = None,
    check: Check = None,
    fail_on_harm: FailOnHarm = False,
    **shared: Any,
) -> None:
    """Train one soft token; the model stays frozen. The same command goes on with a run that was interrupted."""
    _align(only_given(locals()), shared["config"], shared["as_json"], fail_on_harm)


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
    given = only_given(locals())
    from trimtab.config import ExpertCommand, ExpertSettings, settle
    from trimtab.guidance import load_model
    from trimtab.neuron.deep_alignment import train_expert
    from trimtab.prompts.sources import load_prompts
    from trimtab.report.summary import check_expert
    from trimtab.run import screen

    settings = settle(ExpertCommand, given, shared["config"])
    require_check(settings.check, fail_on_harm)
    records = load_prompts(settings.data)
    loaded = load_model(settings)
    fields = settings.model_dump(include=set(ExpertSettings.model_fields))
    with resumable(settings.out):
        train_expert(loaded, records, out=settings.out, settings=ExpertSettings(**fields))
        result = check_expert(loaded, records, settings.out, settings.check, screen(shared["as_json"]))
    finish(shared["as_json"], result)
    exit_on_harm(result.get("check", {}), fail_on_harm)


def _align(given: dict[str, Any], config: Path | None, as_json: bool, fail_on_harm: bool = False) -> None:
    from trimtab.config import AlignCommand, settle
    from trimtab.guidance import load_model
    from trimtab.prompts.sources import load_prompts
    from trimtab.report.summary import check_and_report
    from trimtab.run import screen
    from trimtab.softtoken.align import align as run

    settings = settle(AlignCommand, given, config)
    require_check(settings.check, fail_on_harm)
    records = load_prompts(settings.data)
    model = load_model(settings)
    with resumable(settings.out):
        token = run(model, records, out=settings.out, settings=settings.align())
        result = check_and_report(model, token, records, settings.out, settings.check, screen(as_json))
    finish(as_json, result)
    exit_on_harm(result.get("check", {}), fail_on_harm)
