#!/usr/bin/env bash
# The first hours on a GPU, in order: is it correct, is it fast, what does it learn. A finished part is
# not repeated and an interrupted one continues, so on a machine that is available for minutes at a
# time, simply repeat the command.
#
#   TOKENS=tokens/openstax OUT=out/gpu experiments/gpu.sh                 # all parts
#   TOKENS=tokens/openstax OUT=out/gpu BUDGET=540 experiments/gpu.sh      # at most nine minutes
#   PARTS="tests speed" TOKENS=... OUT=... experiments/gpu.sh
#
# TOKENS: a token set (GPT-2's tokenizer for the shapes of Pythia), or TOKENS.tar.xz next to it, which
# is quick to copy: tar -cJf tokens/openstax.tar.xz -C tokens openstax
# PARTS: tests (of backends and loss, CUDA's included), curve (200 steps, bfloat16 against float32), speed
# (cost.py, NANOGPT: a copy of nanoGPT's model.py), profile (the ten longest
# kernels), train (VARIANTS of compare.py x SEEDS at PRESET, STEPS of 524,288 tokens), scores (TASKS of each, paired
# with the baseline's; DATA: a folder with their files), suite (all tests).
# DEVICE=cpu PRESET=tiny tries the script without a GPU. Results: OUT/*.json, OUT/*.log and a table.
set -euo pipefail
: "${OUT:?give a folder: OUT=out/gpu}" "${TOKENS:?give a token set: TOKENS=tokens/openstax}"
: "${PARTS:=tests curve speed profile train scores suite}" "${BUDGET:=1000000}" "${SEEDS:=0 1}"
: "${PRESET:=pythia-70m}" "${DEVICE:=cuda}" "${STEPS:=600}" "${CONTEXT:=2048}"
: "${VARIANTS:=baseline cross self key-shift}" "${TASKS:=all}"
root=$(cd "$(dirname "$0")/.." && pwd)
end=$((SECONDS + BUDGET))
mkdir -p "$OUT"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUT/inductor} PYTHONUNBUFFERED=1
[ -e "$TOKENS/meta.json" ] || tar -xJf "$TOKENS.tar.xz" -C "$(dirname "$TOKENS")"

left() { echo $((end - SECONDS)); }
# part NAME COMMAND...: run it once, output in OUT/NAME.log; its limit is what is left of the budget
part() {
    local name=$1; shift
    [ -e "$OUT/$name.done" ] && return
    if [ "$(left)" -lt 30 ]; then echo "$name: no time left, repeat the command"; exit 0; fi
    echo "== $name: $*"
    if timeout --signal=TERM --kill-after=60 "$(left)" "$@" 2>&1 | tee -a "$OUT/$name.log"; then
        touch "$OUT/$name.done"
    else
        echo "$name: failed, or was cut short; see $OUT/$name.log"
    fi
}
# reached FOLDER: the last step that a training run has logged
reached() { tail -qn 1 "$1/log.jsonl" 2>/dev/null | grep -o '"step": [0-9]*' | grep -o '[0-9]*' || echo 0; }
# flags VARIANT: those of train.py, of one of compare.py's variants
flags() {
    python - "$root" "$1" <<'PY'
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/experiments"]
from compare import read_variant
from nanonexus.cli import run_script
run_script(lambda: print(*read_variant(sys.argv[2])))
PY
}
# training NAME VARIANT STEPS FLAGS...: train.py until STEPS; saved when time runs out
training() {
    local name=$1 variant=$2 steps=$3 flags resume=(); shift 3
    flags=$(flags "$variant")
    if [ -e "$OUT/$name/ckpt.pt" ]; then resume=(--resume); fi
    if [ "$(reached "$OUT/$name")" -lt "$steps" ]; then rm -f "$OUT/$name.done"; fi
    part "$name" python "$root/train.py" --dataset "$TOKENS" --preset "$PRESET" --device "$DEVICE" \
        --out "$OUT/$name" --no-sample --max_steps "$steps" $flags "${resume[@]}" \
        --max_minutes $(((($(left) - 60) / 60) > 0 ? ($(left) - 60) / 60 : 1)) "$@"
}

for name in $PARTS; do case $name in
    tests) part tests python -m pytest -q -n 4 "$root/tests/test_backends.py" "$root/tests/test_loss.py" ;;
    curve) for dtype in float32 bfloat16; do
            training "curve-$dtype" cross 200 --dtype "$dtype"
        done ;;
    speed) neox=(); if python -c "import transformers" 2>/dev/null; then neox=(--neox); fi
        part speed python "$root/experiments/cost.py" --presets "$PRESET" --contexts "$CONTEXT" \
            --tokens $((32 * CONTEXT)) --orders 1,2,3 --device "$DEVICE" --out "$OUT/speed" \
            ${NANOGPT:+--nanogpt "$NANOGPT"} "${neox[@]}"
        part speed-variants python "$root/experiments/cost.py" --presets "$PRESET" \
            --contexts "$CONTEXT" --tokens $((32 * CONTEXT)) --device "$DEVICE" \
            --variants "${VARIANTS// /,}" ;;
    profile) part profile python "$root/experiments/cost.py" --profile --presets "$PRESET" \
            --contexts "$CONTEXT" --tokens $((32 * CONTEXT)) --orders 1,2 --device "$DEVICE" \
            --out "$OUT/profile" ;;
    train) for seed in $SEEDS; do for variant in $VARIANTS; do
            training "$variant-$seed" "$variant" "$STEPS" --seed "$seed" --eval_interval 50 \
                --save_interval 100
        done; done ;;
    scores) for seed in $SEEDS; do for variant in $VARIANTS; do
            [ "$(reached "$OUT/$variant-$seed")" -ge "$STEPS" ] || continue
            part "scores-$variant-$seed" python "$root/eval_sciq.py" --tasks "$TASKS" ${DATA:+--data "$DATA"} \
                --checkpoint "$OUT/$variant-$seed/ckpt.pt" --device "$DEVICE" \
                --json "$OUT/scores-$variant-$seed.json" --save_docs
            [ "$variant" = baseline ] || part "paired-$variant-$seed" python "$root/eval_sciq.py" \
                --tasks "$TASKS" ${DATA:+--data "$DATA"} --checkpoint "$OUT/scores-baseline-$seed.json" \
                --versus "$OUT/scores-$variant-$seed.json" --json "$OUT/paired-$variant-$seed.json" \
                --plot "$OUT/paired-$variant-$seed.svg"
        done; done ;;
    suite) part suite python -m pytest -q -n 4 "$root/tests" ;;
    *) echo "no part $name: choose from tests curve speed profile train scores suite" >&2; exit 2 ;;
esac; done

python - "$OUT" <<'PY'
import glob, json, os, sys
print(f"{'run':24}{'step':>8}{'tokens':>14}{'val loss':>10}{'tokens/s':>12}{'MFU':>8}")
for path in sorted(glob.glob(os.path.join(sys.argv[1], "*", "log.jsonl"))):
    events = [json.loads(line) for line in open(path)]
    last = next((e for e in reversed(events) if e["val_loss"] is not None), events[-1])
    speeds = sorted(e["tokens_per_sec"] for e in events if e["tokens_per_sec"])
    mfus = sorted(e["mfu"] for e in events if e["mfu"])
    middle = lambda xs, form: form.format(xs[len(xs) // 2]) if xs else "-"
    print(f"{os.path.basename(os.path.dirname(path)):24}{last['step']:>8}{last['tokens']:>14,}"
          f"{last['val_loss']:>10.4f}{middle(speeds, '{:,.0f}'):>12}{middle(mfus, '{:.1%}'):>8}")
PY
