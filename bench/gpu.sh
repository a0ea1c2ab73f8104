#!/usr/bin/env bash
# What only a GPU can tell, in ten minutes at most on one of 80 GB. Needs torch and transformers (and vLLM for sampling,
# liger-kernel for its layers), and fetches nothing.
#     bench/gpu.sh | tee gpu.md
#     bench/gpu.sh --tiny          # the same on a CPU, with tiny sizes
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
size=${1:-}
status=0

run() { # seconds command...: a part that fails does not stop the others
    timeout "$@" || { echo "FAILED: ${*:2}"; status=1; }
}

losses() { # for a GPU: flags...
    run 60 python -m bench.losses losses --device cuda --dtype bfloat16 --runs 3 "$@"
}

run 40 python -m bench.gpu head $size
run 120 python -m bench.gpu steps $size
run 180 python -m bench.gpu layers $size
run 140 python -m bench.gpu sampling $size
if [ "$size" = --tiny ]; then
    run 300 python -m bench.losses losses --device cpu --dtype bfloat16 --runs 1 --N 48 --H 16 --V 320 --K 4
else
    losses --N 16384 --H 2048 --Ht 2560 --tasks opd lsm lsm_free teacher
    losses --N 4096 --H 2048 --Ht 2560 --tasks rkl jsd # without chunks, a dozen matrices [N, V]
fi
exit $status
