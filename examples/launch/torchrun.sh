#!/bin/bash
# A run on several machines without a scheduler: run this command on each of them; HEAD is one of
# them.
#
#   HEAD=10.0.0.1 NODES=2 examples/launch/torchrun.sh CONFIG [key=value ...]
#
# run.dir, model and prompts must be at the same path on all of them.
set -euo pipefail

# the signal to save is for the ranks, which handle it; torchrun would stop them
trap '' USR1

exec torchrun --nnodes "${NODES:?how many machines}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?address of one machine}:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-megatron-prepo}" -m megatron_prepo train "$@"
