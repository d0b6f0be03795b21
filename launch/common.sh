# shellcheck shell=bash
# What the batch scripts share: sourced by them on the batch host, with LAUNCH, the folder that they lie in.
#
# One task per node runs one torchrun, which starts one process per GPU.  (srun with a task per GPU and no torchrun
# works too: `srun --ntasks-per-node=8 octant train CONFIG`.  Never both.)
#
# How a job ends decides whether it comes back:
#   USR1   the time limit is near   every rank saves, the nodes exit with 0, the job is requeued
#   TERM   somebody cancelled it    never requeued
#   0      the work is done         not requeued
#   other  something broke          requeued, MAX_RESTARTS times in all
# A lost node is requeued by SLURM itself (#SBATCH --requeue).

# One port per job and restart: a predecessor's sockets may linger.  Below the range that the kernel hands out.
rendezvous_port() {
    echo $((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 10000))
}

# Settings of the network, for every process of the job.  Those of CUDA depend on the layout: `octant train` makes them.
export_settings() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export TORCH_FR_BUFFER_SIZE=2000                # flight recorder: the last collectives of each rank …
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1             # … written down when one of them hangs
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # without it a restart reads the old round's keys and never meets
    export NCCL_IB_TIMEOUT=22                       # 4 µs × 2^22 = 17 s: a rerouting fabric is not a dead one
    # Set these for your cluster:
    # export NCCL_IB_HCA=mlx5                       # the adapters of the compute fabric, where there are others
    # export NCCL_SOCKET_IFNAME=ib0                 # the interface for the bootstrap …
    # export GLOO_SOCKET_IFNAME=ib0                 # … and for gloo, where a host name does not lead to it
    # export NCCL_DEBUG=INFO                        # what NCCL chose, once, when the numbers disappoint
}

# Refuses a configuration that cannot work on this many processes, before any node is kept busy.
check_config() { # WORLD_SIZE CONFIG [key=value …]
    python - "$@" <<'PYTHON'
import sys

from engine.config import load_config, resolve_layout
from engine.errors import ConfigError

try:
    resolve_layout(load_config(sys.argv[2], sys.argv[3:]), int(sys.argv[1]))
except ConfigError as error:
    sys.exit(f"{error}")
PYTHON
}

# Runs `octant train` on all nodes, waits however many signals come in, and requeues where that is right.
run_job() { # CONFIG [key=value …]
    local status srun_pid signal="" again
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT="$(rendezvous_port)"
    export MASTER_ADDR MASTER_PORT
    export_settings
    check_config "$((SLURM_JOB_NUM_NODES * GPUS_PER_NODE))" "$@" || return 2

    echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes, $MASTER_ADDR:$MASTER_PORT"
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$LAUNCH/node.sh" "$@" &
    srun_pid=$!
    # Only the first USR1 is passed on: a second one would break off torchrun's waiting for the ranks.
    trap 'again=yes; [[ -n $signal ]] || { signal=USR1; kill -USR1 "$srun_pid"; }' USR1
    trap 'again=yes; signal=TERM; kill -TERM "$srun_pid"' TERM
    while :; do # a trapped signal ends `wait` early
        again="" status=0
        wait "$srun_pid" || status=$?
        [[ -n $again ]] || break
    done

    if [[ $signal == TERM ]]; then
        echo "cancelled: not requeued"
        return 143
    elif [[ $signal == USR1 ]]; then
        echo "stopped at the time limit: requeued"
        scontrol requeue "$SLURM_JOB_ID"
    elif ((status != 0 && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        echo "failed with status $status: requeued (${SLURM_RESTART_COUNT:-0} of $MAX_RESTARTS restarts used)"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
