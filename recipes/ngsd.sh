#!/usr/bin/env bash
# The README's figures on guided decoding: train the experts, then measure the untouched model, a token that is always on, and guided decoding with a
# token and with a LoRA expert, the neuron as published and primed, on suites none of them was trained on. On two cores: experts half an hour,
# measuring three quarters of an hour with LIMIT=100.
# GSM8K is asked for right answers, in replies of 256 tokens, at most 50 rows (GSM8K=0 leaves it out).
# SUITES is a folder of JSONL files ({"id", "prompt", "label", "prefill"?} a line) named as below.
#
#   SUITES=path/to/suites [LIMIT=100] recipes/ngsd.sh [FOLDER]
set -euo pipefail
out=${1:-runs/ngsd}
suites=${SUITES:?give the folder of the suites in SUITES}
trimtab=${TRIMTAB:-.venv/bin/trimtab}
model=smollm2-135m
"$trimtab" align $model -o "$out/token" --limit 1200
"$trimtab" align $model -o "$out/token-expert" --limit 1200 --goal refuse --benign-weight 0.5 --steps 100
"$trimtab" expert $model -o "$out/lora-expert"
chosen=()
for name in advbench prefill_advbench50 xstest alpacaeval_000_199; do
  chosen+=(--suite "$suites/$name.jsonl")
done
arm() { # FOLDER FIRST OPTIONS...: the untouched model's replies are made once, in FIRST
  mkdir -p "$1"
  [ "$1" = "$2" ] || [ -f "$1/replies.jsonl" ] || cp "$2/replies.jsonl" "$1/"
  "$trimtab" eval $model --compare -o "$1" --judge keyword --judge phrase --judge logit "${@:3}"
}
measure() { # NAME OPTIONS...
  arm "$out/eval-$1" "$out/eval-token" "${@:2}" "${chosen[@]}" --max-new-tokens 32 ${LIMIT:+--limit "$LIMIT"}
  [ "${GSM8K:-50}" = 0 ] || arm "$out/sums-$1" "$out/sums-token" "${@:2}" --suite "$suites/gsm8k_000_099.jsonl" --max-new-tokens 256 --limit "${GSM8K:-50}"
}
measure token --token "$out/token"
for neuron in lif primed; do
  measure lora-$neuron --expert "lora:$out/lora-expert" --neuron $neuron
  measure token-$neuron --expert "token:$out/token-expert" --neuron $neuron
done
"$trimtab" report "$out"/eval-* -o "$out/report.html"
