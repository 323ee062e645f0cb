#!/usr/bin/env bash
# The 70M comparison from text to table: baseline and Nexus order 2, the same tokens in the same
# order, then six tasks with a paired test. If interrupted, the same command continues.
#
#   OUT=out/70m experiments/reproduce_70m.sh                            # 2 billion tokens of FineWeb-Edu
#   OUT=out/70m TEXT='books/*.txt.xz' STEPS=600 experiments/reproduce_70m.sh       # or your own text
#   OUT=out/70m experiments/reproduce_70m.sh --nexus_inner self                # the paper's inner step
#   OUT=out/70m GPUS=8 experiments/reproduce_70m.sh --micro_batch 32    # the rest goes to train.py
#
# STEPS: of 524,288 tokens each (default 3000); the learning rate is decayed over all of them.
# DATA: a folder with the tasks' files, for a machine without access to the hub. TASKS: default all six.
# TOKENIZER (gpt2), PRESET (pythia-70m): to try the script with `bytes` and `tiny` in a minute.
set -euo pipefail
: "${OUT:?give a folder: OUT=out/70m experiments/reproduce_70m.sh}"
: "${STEPS:=3000}" "${GPUS:=1}" "${TASKS:=all}" "${TOKENIZER:=gpt2}" "${PRESET:=pythia-70m}"
root=$(cd "$(dirname "$0")/.." && pwd)

if [ ! -e "$OUT/tokens/meta.json" ]; then
    if [ -n "${TEXT:-}" ]; then source=(--dataset text --input "$TEXT")
    else source=(--dataset fineweb-edu --max_tokens 2e9); fi
    python "$root/prepare_data.py" "${source[@]}" --tokenizer "$TOKENIZER" --out "$OUT/tokens"
fi
launch=(python)
if [ "$GPUS" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$GPUS"); fi
for order in 1 2; do
    folder="$OUT/order$order"
    if [ -e "$folder/ckpt.pt" ]; then resume=(--resume); else resume=(); fi
    "${launch[@]}" "$root/train.py" --preset "$PRESET" --dataset "$OUT/tokens" \
        --nexus_order "$order" --max_steps "$STEPS" --out "$folder" "${resume[@]}" --no-sample "$@"
done
python "$root/eval_sciq.py" --checkpoint "$OUT/order1/ckpt.pt" --versus "$OUT/order2/ckpt.pt" \
    --tasks "$TASKS" ${DATA:+--data "$DATA"} --json "$OUT/scores.json" --plot "$OUT/scores.png"
