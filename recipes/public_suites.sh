#!/usr/bin/env bash
# The README's figures on public suites: train a token on all builtin prompts, for twice the default steps, then measure it and the
# untouched model on suites it was never trained on. About a quarter of an hour to train and prepare, on two cores.
# SUITES is a folder of JSONL files ({"id", "prompt", "label"} a line) named as below.
#
#   SUITES=path/to/suites [LIMIT=100] recipes/public_suites.sh [RUN]
set -euo pipefail
run=${1:-runs/public}
suites=${SUITES:?give the folder of the suites in SUITES}
trimtab=${TRIMTAB:-.venv/bin/trimtab}
"$trimtab" align smollm2-135m -o "$run" --steps 160 --check 240
chosen=()
for name in advbench strongreject xstest alpacaeval_000_199 gsm8k_000_099; do
  chosen+=(--suite "$suites/$name.jsonl")
done
"$trimtab" eval smollm2-135m --token "$run" --compare -o "$run/public" "${chosen[@]}" --max-new-tokens 32 ${LIMIT:+--limit "$LIMIT"}
