"""Public suites by name: where each is, at which commit, under which licence, and what it measures. Nothing of them is in this package.

Every entry names a full commit, so that a figure can be repeated. Labels are what a request asks for: `harmful` should be refused, `benign` answered; benign requests of
over-refusal suites are `borderline`. Rows of other kinds (copyright, underspecified
requests, other wordings of the same ...) are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import DataError
from trimtab.prompts.records import LETTERS, Record
from trimtab.prompts.sources import fetched
from trimtab.run import console

Row = Mapping[str, Any]
Fields = dict[str, Any] | None
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Known:
    """One suite.

    Attributes:
        source: a hub data set, or the address of a file, with `{revision}` in it. revision: full commit.
        licence, measures: for people. row: fields of a record from a row and the name of its split; `None` leaves it out.
        config, splits: of a hub data set. gated: whether the hub asks for an account.
    """

    source: str
    revision: str
    licence: str
    measures: str
    row: Callable[[Row, str], Fields]
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    gated: bool = False


def _harmful(prompt: str, category: str = "") -> Callable[[Row, str], Fields]:
    """Every row is a harmful request: its words and its category are in these columns."""
    return lambda row, _: {
        "prompt": row[prompt],
        "label": "harmful",
        "category": str(row[category]) if category else "all",
    }


def _benign(
    prompt: str, category: str = "", group: str = "borderline", reference: str = ""
) -> Callable[[Row, str], Fields]:
    """Every row is a benign request."""
    return lambda row, _: {
        "prompt": row[prompt],
        "label": "benign",
        "group": group,
        "category": str(row[category]) if category else "all",
        "reference": str(row[reference]) if reference else "",
    }


def _xstest(row: Row, _: str) -> Fields:
    safe = row["label"] == "safe"
    group = "borderline" if safe else "harmful"
    return {"prompt": row["prompt"], "label": "benign" if safe else "harmful", "group": group, "category": row["type"]}


def _phtest(row: Row, _: str) -> Fields:
    """Half of it is controversial: nobody can say what a model should do."""
    return _benign("Request")(row, "") if row["Harmfulness"] == "harmless" else None


def _coconot(row: Row, _: str) -> Fields:
    """The other categories (false presuppositions, missing details ...) are no matter of safety."""
    return _harmful("prompt", "subcategory")(row, "") if row["category"] == "Requests with safety concerns" else None


def _jbb(row: Row, split: str) -> Fields:
    return (_harmful if split == "harmful" else _benign)("Goal", "Category")(row, "")


def _harmbench(row: Row, _: str) -> Fields:
    """Copyright rows test copying."""
    if row["FunctionalCategory"] == "copyright":
        return None
    return {**(_harmful("Behavior", "SemanticCategory")(row, "") or {}), "context": row["ContextString"] or ""}


def _sorry(row: Row, _: str) -> Fields:
    """Twenty further styles say the same in other ways."""
    if row["prompt_style"] != "base":
        return None
    return {"prompt": row["turns"][0], "label": "harmful", "category": str(row["category"])}


def _gsm8k(row: Row, _: str) -> Fields:
    answer = row["answer"].rsplit("####", 1)[1].strip()
    return {"prompt": row["question"], "label": "benign", "category": "maths", "reference": answer}


def _mmlu(row: Row, _: str) -> Fields:
    letter = LETTERS[int(row["answer"])]
    return {
        "prompt": row["question"], "choices": tuple(row["choices"]), "label": "benign", "category": row["subject"], "reference": letter,
    }  # fmt: skip


CATALOGUE: dict[str, Known] = {
    "xstest": Known("Paul/XSTest", "f600c994b256f12867dfa5b3eb3d545a3e62f8b5", "CC-BY-4.0", "over-refusal on safe requests in unsafe words, with unsafe contrasts", _xstest),
    "or_bench_hard": Known("bench-llm/or-bench", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272", "CC-BY-4.0", "over-refusal on requests that many models refuse", _benign("prompt", "category"), "or-bench-hard-1k"),
    "or_bench_toxic": Known("bench-llm/or-bench", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272", "CC-BY-4.0", "refusal of their toxic counterparts", _harmful("prompt", "category"), "or-bench-toxic"),
    "oktest": Known(f"{GITHUB}/InvokerStark/OverKill/{{revision}}/data/OKTest.csv", "9551a7ff7b2cb18d178e64fb5cc95e4684311b3b", "none stated", "over-refusal on safe requests with focus words", _benign("prompt")),
    "phtest": Known("furonghuang-lab/PHTest", "4028806c1f41031ddd3d27ca1f284e566548c5d6", "MIT", "over-refusal on pseudo-harmful requests", _phtest),
    "coconot": Known("allenai/coconot", "2cbe16aabf9069f17e48c8daad8aeabc29469eb7", "ODC-BY", "refusal of requests with safety concerns", _coconot, "original", ("test",)),
    "coconot_contrast": Known("allenai/coconot", "2cbe16aabf9069f17e48c8daad8aeabc29469eb7", "ODC-BY", "over-refusal on their harmless counterparts", _benign("prompt", "subcategory"), "contrast", ("test",)),
    "falsereject": Known("AmazonScience/FalseReject", "493ba967714ea54c6f01067e1f61e389cc2c9b3e", "CC-BY-NC-4.0", "over-refusal on requests that seem harmful", _benign("prompt", "category_text"), None, ("test",)),
    "jailbreakbench": Known("JailbreakBench/JBB-Behaviors", "886acc352a31533ffbcf4ef22c744658688086fc", "MIT", "refusal and over-refusal on matched behaviours", _jbb, "behaviors", ("harmful", "benign")),
    "advbench": Known(f"{GITHUB}/llm-attacks/llm-attacks/{{revision}}/data/advbench/harmful_behaviors.csv", "098262edf85f807224e70ecd87b9d83716bf6b73", "MIT", "refusal of plainly harmful instructions", _harmful("goal")),
    "harmbench": Known(f"{GITHUB}/centerforaisafety/HarmBench/{{revision}}/data/behavior_datasets/harmbench_behaviors_text_all.csv", "c0423b952435fcc8467108d8f25962dbae5b7de2", "MIT", "refusal of harmful behaviours, some with a context", _harmbench),
    "strongreject": Known(f"{GITHUB}/alexandrasouly/strongreject/{{revision}}/strongreject_dataset/strongreject_dataset.csv", "f7cad6c17e624e21d8df2278e918ae1dddb4cb56", "MIT", "refusal of specific, answerable forbidden questions", _harmful("forbidden_prompt", "category")),
    "sorry_bench": Known("sorry-bench/sorry-bench-202503", "612a4e1f45db8adf884fa62318ddf9fa1c6e75e9", "its own, no redistribution", "refusal over 44 categories", _sorry, gated=True),
    "simple_safety_tests": Known("Bertievidgen/SimpleSafetyTests", "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5", "CC-BY-2.0", "refusal of a hundred clear-cut requests", _harmful("prompt", "harm_area"), None, ("test",)),
    "alpacaeval": Known("https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/{revision}/alpaca_eval.json", "2edc6fad8be6b14ea7230aabfd08188da6b8b814", "CC-BY-NC-4.0", "over-refusal on everyday requests", _benign("instruction", "dataset", "plain", "output")),
    "gsm8k": Known("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "MIT", "grade-school maths: what is still right", _gsm8k, "main", ("test",)),
    "mmlu": Known("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "MIT", "knowledge: what is still right", _mmlu, "all", ("test",)),
}  # fmt: skip


def fetch(name: str) -> list[Record]:
    """The rows of a suite of the catalogue, from the hub or from where its authors keep it.

    Raises:
        DataError: the package datasets is missing, or the suite cannot be had, and why.
    """
    known = CATALOGUE[name]
    what, mend = f"the suite {name}", "Check your connection; or give a .jsonl file."
    if known.gated:
        mend = "It asks for an account on the hub: accept its terms there and log in."
    records: list[Record] = []
    left_out = 0
    for split in known.splits:
        if known.source.startswith("https://"):  # one file, whose kind says how it is read
            file = known.source.format(revision=known.revision)
            rows = fetched(what, mend, file.rsplit(".", 1)[1], data_files=file, split="train")
        else:
            rows = fetched(what, mend, known.source, known.config, revision=known.revision, split=split)
        for row in rows:
            try:
                fields = known.row(row, split)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(
                    f"{name}: a row is not what it was at this commit ({type(error).__name__}: {error}).",
                    "Clear the cache of datasets, or give a .jsonl file.",
                ) from None
            if fields is None:
                left_out += 1
                continue
            fields["prompt"] = str(fields["prompt"]).strip()
            group = fields.get("group") or ("harmful" if fields["label"] == "harmful" else "plain")
            records.append(Record(**{**fields, "id": f"{name}-{len(records):04d}", "group": group}))
    if left_out:
        console.print(f"{name}: {left_out} rows of other kinds are left out")
    return records
