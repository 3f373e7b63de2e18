#!/usr/bin/env bash
# The recipe as a list of commands.
#   bash run.sh          clips -> base -> camera -> causal -> few-step -> DMD -> a walk, a strip per stage, tables, in out/
#   bash run.sh play     walk through the shipped world in the browser
#   bash run.sh test     the tests
# PLANS=1 OUT=out1 bash run.sh: one plan to live in. PYTHON names another interpreter (3.10 or newer).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"       # sh run.sh
set -euo pipefail
cd "$(dirname "$0")"

if ! cmp -s requirements.txt .venv/installed; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install -q -r requirements.txt
    cp requirements.txt .venv/installed
fi
source .venv/bin/activate

case "${1:-recipe}" in
play)
    shift
    exec python stream.py --live True --ckpt checkpoints/home.safetensors "$@" ;;
test)
    shift
    python -m pytest -q tests "$@" ;;
recipe)
    # glibc: keep freed memory, rather than give it back and fault it in again: up to a twentieth of a training step
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    PLANS=${PLANS:-500} OUT=${OUT:-out} DATA=data/lowpoly-$PLANS
    start=$SECONDS
    took() { echo "--- $1: $((SECONDS - start)) s since the start"; }
    python data.py --world lowpoly --plans "$PLANS" --out "$DATA"                                  ; took clips
    python finetune_camera.py --camera none --steps 300 --data "$DATA" --out "$OUT"                 ; took base
    python finetune_camera.py --sink True --data "$DATA" --init "$OUT/base.safetensors" --out "$OUT" ; took camera
    python train_ar.py --encoder_blocks 4 --data "$DATA" --init "$OUT/camera.safetensors" --out "$OUT" ; took causal
    python distill_ode.py --teacher_steps 8 --guidance 1.3 --data "$DATA" --init "$OUT/ar.safetensors" --out "$OUT" ; took few-step
    python distill_dmd.py --guidance 1.4 --data "$DATA" --init "$OUT/ode.safetensors" --score "$OUT/camera.safetensors" --out "$OUT" ; took DMD
    python stream.py --ckpt "$OUT/dmd.safetensors" --clip 4 --keys "w*3,wl*3,l*2" --truth True --out "$OUT/walk.mp4" ; took walk
    if [ -e experiments/score.py ]; then                # two tables at a time, each on half of the cores
        export OMP_NUM_THREADS=$((($(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) + 1) / 2))
        python -m experiments.score --ckpt "$OUT/ar.safetensors" --out "$OUT/ar.json" > "$OUT/ar.txt" &
        python -m experiments.score --ckpt "$OUT/dmd.safetensors" --out "$OUT/dmd.json"
        wait $!
        cat "$OUT/ar.txt"                                                                          ; took tables
    fi ;;
*)
    echo "error: run.sh $1: say nothing, play or test" >&2
    exit 1 ;;
esac
