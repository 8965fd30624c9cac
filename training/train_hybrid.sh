#!/bin/sh
# The bundled pair: corpus, hybrid target, its drafter, a check. Resumable: run it again after an interruption.
#   OUT=out DATA= PY=python THREADS=1 TOKENS=10e6 ./train_hybrid.sh
set -eu
OUT=$(mkdir -p "${OUT:-out}" && cd "${OUT:-out}" && pwd)
DATA=${DATA:+$(cd "$DATA" && pwd)}
cd "$(dirname "$0")"
# glibc: keep large blocks on the heap instead of mapping and zeroing them every step.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 MALLOC_TOP_PAD_=268435456
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PY=${PY:-python}
THREADS=${THREADS:-1}
[ -e "$OUT/synthetic.txt" ] || "$PY" gen_synthetic.py --mb 26 --out "$OUT/synthetic.txt"
[ -e "$OUT/train.bin" ] || "$PY" prepare.py --out "$OUT" ${DATA:+--data "$DATA"}
"$PY" train_target.py --out "$OUT" --family hybrid --tokens "${TOKENS:-10e6}" --bs 24 --lr 3e-3 --adam-lr 3e-3 \
    --threads "$THREADS" --compile
"$PY" train_dflash.py --out "$OUT" --family hybrid --threads "$THREADS"
"$PY" eval_drafter.py --out "$OUT" --family hybrid --dump "$OUT/hybrid-dflash/golden.json"
