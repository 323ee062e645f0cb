#!/usr/bin/env bash
# The 70M comparison from text to table: the baseline, the readings of the paper and ours, the same
# tokens in the same order, then six tasks, paired with the baseline's. If interrupted, the same
# command continues.
#
#   OUT=out/70m experiments/reproduce_70m.sh                            # 2 billion tokens of FineWeb-Edu
#   OUT=out/70m TEXT='books/*.txt.xz' STEPS=600 experiments/reproduce_70m.sh       # or your own text
#   OUT=out/70m VARIANTS="baseline self" experiments/reproduce_70m.sh   # the baseline and `self` alone
#   OUT=out/70m GPUS=8 experiments/reproduce_70m.sh --micro_batch 32    # the rest goes to train.py
#
# VARIANTS: of compare.py, the first is the one that the others are compared with.
# STEPS: of 524,288 tokens each (default 3000); the learning rate is decayed over all of them.
# DATA: a folder with the tasks' files, for a machine without access to the hub. TASKS: default all six.
# With 65,536 tokens a step, a rate of 1e-3 and 115M tokens `self` diverged with one of two seeds
# (docs/results/gpu.md): watch `norm` in its log.
# TOKENIZER (gpt2), PRESET (pythia-70m): to try the script with `bytes` and `tiny` in a minute.
set -euo pipefail
: "${OUT:?give a folder: OUT=out/70m experiments/reproduce_70m.sh}"
: "${STEPS:=3000}" "${GPUS:=1}" "${TASKS:=all}" "${TOKENIZER:=gpt2}" "${PRESET:=pythia-70m}"
: "${VARIANTS:=baseline self shared separate tokens cross key-shift}"
root=$(cd "$(dirname "$0")/.." && pwd)

plan=$(PYTHONPATH="$root/experiments:$root" python - $VARIANTS <<'PY'
import sys  # a line for each variant: its name, its flags of train.py
from compare import read_variant
from nanonexus.cli import run_script
run_script(lambda: [print(name, *read_variant(name)) for name in sys.argv[1:]])
PY
)
first=${plan%% *}

if [ ! -e "$OUT/tokens/meta.json" ]; then
    if [ -n "${TEXT:-}" ]; then source=(--dataset text --input "$TEXT")
    else source=(--dataset fineweb-edu --max_tokens 2e9); fi
    python "$root/prepare_data.py" "${source[@]}" --tokenizer "$TOKENIZER" --out "$OUT/tokens"
fi
launch=(python)
if [ "$GPUS" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$GPUS"); fi
while read -r variant own <&3; do
    folder="$OUT/$variant"
    if [ -e "$folder/ckpt.pt" ]; then resume=(--resume); else resume=(); fi
    "${launch[@]}" "$root/train.py" --preset "$PRESET" --dataset "$OUT/tokens" $own \
        --max_steps "$STEPS" --out "$folder" "${resume[@]}" --no-sample "$@"
    python "$root/eval_sciq.py" --checkpoint "$folder/ckpt.pt" --tasks "$TASKS" \
        ${DATA:+--data "$DATA"} --json "$OUT/scores-$variant.json" --save_docs
    [ "$variant" = "$first" ] || python "$root/eval_sciq.py" \
        --checkpoint "$OUT/scores-$first.json" --versus "$OUT/scores-$variant.json" \
        --tasks "$TASKS" ${DATA:+--data "$DATA"} --json "$OUT/paired-$variant.json" \
        --plot "$OUT/paired-$variant.svg"
done 3<<< "$plan"
