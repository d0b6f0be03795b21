#!/usr/bin/env bash
# What srun starts: one process of the job (LAUNCHER=srun), or a torchrun over one node's (LAUNCHER=torchrun).
set -uo pipefail

# USR1 (the time limit) and TERM (preempted, cancelled, requeued) reach every process of the step.  The ranks save; this
# shell waits for them, and reports success for a rank that drained: with --kill-on-bad-exit the first failing task
# would cut off the others' saving.
draining=""
trap 'draining=yes' USR1 TERM

read -ra container <<<"${CONTAINER:-}"
ulimit -n "$(ulimit -H -n)" # a socket per peer that a rank talks to, times the ranks of a node

if [[ $LAUNCHER == torchrun ]]; then
    is_host=0
    ((SLURM_NODEID == 0)) && is_host=1 # the first node keeps the rendezvous, whatever its name resolves to
    "${container[@]}" torchrun \
        --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$GPUS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-id="$RENDEZVOUS_ID" \
        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-conf="is_host=$is_host,join_timeout=900" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=540 \
        -m engine train "$@"
else
    "${container[@]}" python -m engine train "$@"
fi
status=$?
if [[ -n $draining ]] || ((status == 3)); then # 3: it saved because somebody asked
    exit 0
fi
exit "$status"
