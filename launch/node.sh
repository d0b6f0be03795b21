#!/usr/bin/env bash
# One node of a job: torchrun over its GPUs.  Started by `srun --ntasks-per-node=1` from run_job in launch/common.sh.
set -uo pipefail

# USR1 reaches every process of the step, torchrun too, which passes it on and waits for the ranks to save.  A node that
# drained reports success: with --kill-on-bad-exit the first failing node would cut off the others' saving.
draining=""
trap 'draining=yes' USR1

ulimit -n "$(ulimit -H -n)" # a socket per peer that a rank talks to, times the ranks of a node

is_host=0
((SLURM_NODEID == 0)) && is_host=1 # the first node keeps the rendezvous, whatever its name resolves to

# On a node whose clock is behind, torchrun starts a world of one and calls it a success: the ranks refuse that.
export OCTANT_WORLD_SIZE=$((SLURM_JOB_NUM_NODES * GPUS_PER_NODE))

torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$GPUS_PER_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-conf="is_host=$is_host,join_timeout=900" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=540 \
    -m engine train "$@"
status=$?
[[ -n $draining ]] && exit 0
exit "$status"
