#!/usr/bin/env bash
# The README's figures on public suites: train one token, and five, on all builtin prompts, for twice the default steps, then measure them and the
# untouched model on suites they were never trained on. On two cores and 10 GB: half an hour to train and prepare, a quarter to measure.
# SUITES is a folder of JSONL files ({"id", "prompt", "label"} a line) named as below.
#
#   SUITES=path/to/suites [LIMIT=100] recipes/public_suites.sh [RUN]
set -euo pipefail
run=${1:-runs/public}
suites=${SUITES:?give the folder of the suites in SUITES}
trimtab=${TRIMTAB:-.venv/bin/trimtab}
chosen=()
for name in advbench strongreject xstest alpacaeval_000_199 gsm8k_000_099; do
  chosen+=(--suite "$suites/$name.jsonl")
done
for tokens in 1 5; do
  "$trimtab" align smollm2-135m -o "$run/$tokens" --tokens $tokens --steps 160
  mkdir -p "$run/suites-$tokens"
  # The untouched model's replies need not be made again.
  [ $tokens = 1 ] || [ -f "$run/suites-$tokens/replies.jsonl" ] || cp "$run/suites-1/replies.jsonl" "$run/suites-$tokens/"
  "$trimtab" eval smollm2-135m --token "$run/$tokens" --compare -o "$run/suites-$tokens" "${chosen[@]}" --judge keyword --judge strict --judge logit --max-new-tokens 24 ${LIMIT:+--limit "$LIMIT"}
done
"$trimtab" report "$run"/suites-* -o "$run/report.html"
