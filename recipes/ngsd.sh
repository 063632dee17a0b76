#!/usr/bin/env bash
# The README's figures on guided decoding: train the experts, then measure the untouched model, a token that is always on, and guided decoding with a
# token and with a LoRA expert, on suites none of them was trained on. On two cores: experts half an hour, measuring half an hour.
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
for name in advbench prefill_advbench50 xstest alpacaeval_000_199 gsm8k_000_099; do
  chosen+=(--suite "$suites/$name.jsonl")
done
measure() { "$trimtab" eval $model "${@:2}" -o "$out/eval-$1" "${chosen[@]}" --judge keyword --judge phrase --max-new-tokens 64 ${LIMIT:+--limit "$LIMIT"}; }
measure token --token "$out/token" --compare
measure ngsd-token --expert "token:$out/token-expert" --compare
measure ngsd-lora --expert "lora:$out/lora-expert" --compare
"$trimtab" report "$out"/eval-* -o "$out/report.html"
