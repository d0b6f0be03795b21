# shellcheck shell=bash
# What the batch scripts share: a job under SLURM, or, without it, the same on this machine.
#
# How an attempt ends decides what comes next; the run's folder is asked (engine/reliability/restarts.py):
#   all steps are done (DONE)      the job ends, and so does every job of its chain
#   USR1   the time limit is near  every rank saves, and the job is requeued
#   TERM   requeued or cancelled: every rank saves; this script never brings the job back, SLURM does, or not
#   TERM for the ranks only, to make room: every rank saves, and the job is requeued
#   other  something broke         again, at once, on nodes that answer (spare ones too); requeued if there are too few
# Restarts are bounded without progress only: exit code 4 ends the job and its chain.

LAUNCHER="${LAUNCHER:-srun}" # srun: one task per GPU.  torchrun: one task per node, which starts its GPUs' processes

# Settings for every process of the job.  Those of CUDA depend on the layout: `octant train` makes them itself.
export_settings() {
    export LAUNCHER GPUS_PER_NODE
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" # flight recorder: the last collectives of each rank …
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1                         # … written down when one of them hangs
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it a restart reads the old round's keys and never meets
    export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}" # 4 µs × 2^22 = 17 s: a rerouting fabric is not a dead one
    # Set these for your cluster:
    # export NCCL_IB_HCA=mlx5                       # the adapters of the compute fabric, where there are others
    # export NCCL_SOCKET_IFNAME=ib0                 # the interface for the bootstrap …
    # export GLOO_SOCKET_IFNAME=ib0                 # … and for gloo, where a host name does not lead to it
    # export NCCL_DEBUG=INFO                        # what NCCL chose, once, when the numbers disappoint
}

say() {
    echo "$(date +%H:%M:%S) $*"
}

# Where the ranks meet: the first node, under the address that SLURM has for it, and a port for each attempt, because a
# predecessor's sockets may linger; below the range that the kernel hands out.
meet_at() { # FIRST_NODE ATTEMPT
    local address
    address="$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)"
    export MASTER_ADDR="${FIXED_ADDR:-${address:-$1}}"
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0} * 7 + $2) % 10000))
    export RENDEZVOUS_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$2"
}

# The nodes of the job that answer and have their GPUs; says which others there are, and whether some differ.
healthy_nodes() { # CONFIG
    local kind="" node gpus about alive
    mapfile -t alive < <(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t idle,alloc,mix,comp -o %N | sort -u)
    ((${#alive[@]})) || return 0
    while read -r node gpus about; do
        if ((gpus < NEED_GPUS)); then
            say "left out: $node has $gpus GPUs of $NEED_GPUS" >&2
        elif [[ -n $kind && $about != "$kind" ]]; then
            say "left out: $node differs from the first: $about, not $kind" >&2
        else
            kind="$about"
            echo "$node"
        fi
    done < <(timeout 60 srun --nodelist="$(IFS=,; echo "${alive[*]}")" --nodes="${#alive[@]}" --ntasks="${#alive[@]}" \
        --ntasks-per-node=1 --overcommit --overlap --no-kill --wait=20 bash launch/probe.sh "$1" 2>/dev/null | sort)
}

# Between attempts there is nobody to pass a request on to; it is heeded before the next one.
remember_signals() {
    trap '[[ $signal == TERM ]] || signal=USR1' USR1
    trap 'signal=TERM' TERM
}

# One attempt: starts the ranks on these nodes and waits for them however many signals come in.  Sets `status`.
attempt() { # NODE,NODE… NUM_NODES CONFIG [key=value …]
    local nodes="$1" number="$2" per_node=1 pid again
    shift 2
    [[ $LAUNCHER == srun ]] && per_node="$GPUS_PER_NODE"
    # In a session of its own: a TERM for this script must not reach srun, which would kill the step at once.
    # --overlap: SLURM keeps a step that lost a node for minutes, and its share of the other nodes with it.
    setsid srun --nodes="$number" --nodelist="$nodes" --ntasks="$((number * per_node))" --ntasks-per-node="$per_node" \
        --overcommit --overlap --kill-on-bad-exit=1 --wait=60 bash launch/task.sh "$@" &
    pid=$!
    # Only the first request is passed on.  TERM goes to the ranks as USR1: srun ends the step at a TERM.
    trap 'again=yes; [[ -n $signal ]] || { signal=USR1; kill -USR1 "$pid"; }' USR1
    trap 'again=yes; [[ -n $signal ]] || kill -USR1 "$pid"; signal=TERM' TERM
    [[ -z $signal ]] || kill -USR1 "$pid"
    while :; do # a trapped signal ends `wait` early
        again="" status=0
        wait "$pid" || status=$?
        [[ -n $again ]] || break
    done
    remember_signals
}

# The same on this machine alone: `octant train` starts its processes itself.
attempt_here() { # CONFIG [key=value …]
    local pid again
    python -m engine train "$@" &
    pid=$!
    trap 'again=yes; signal=USR1; kill -TERM "$pid"' USR1
    trap 'again=yes; signal=TERM; kill -TERM "$pid"' TERM INT
    while :; do
        again="" status=0
        wait "$pid" || status=$?
        [[ -n $again ]] || break
    done
    remember_signals
}

requeue() {
    say "requeued: $*"
    scontrol requeue "$SLURM_JOB_ID"
}

# A run under SLURM, from the first attempt to the last that this job makes.
run_job() { # CONFIG [key=value …]
    local signal="" status=0 number=0 verdict since nodes few="${NODES:-$SLURM_JOB_NUM_NODES}"
    FIXED_ADDR="${MASTER_ADDR:-}" NEED_GPUS="$GPUS_PER_NODE"
    [[ " $* " == *" run.device=cpu "* ]] && NEED_GPUS=0
    remember_signals
    export_settings
    export OCTANT_WORLD_SIZE="$((few * GPUS_PER_NODE))"
    while :; do
        verdict=0
        python -m engine.reliability.restarts before "$OCTANT_WORLD_SIZE" "$@" || verdict=$?
        ((verdict == 0)) || break
        mapfile -t nodes < <(healthy_nodes "$1")
        if ((${#nodes[@]} < few)); then
            say "${#nodes[@]} of $few nodes are fit: ${nodes[*]}"
            python -m engine.reliability.restarts after 1 "$(date +%s)" "$@" || verdict=$?
            [[ $verdict != 0 || -n $signal ]] || requeue "too few nodes answer"
            return "$((verdict ? verdict : 1))"
        fi
        nodes=("${nodes[@]:0:few}")
        meet_at "${nodes[0]}" "$number"
        say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, attempt $number: ${nodes[*]}, $MASTER_ADDR:$MASTER_PORT"
        since="$(date +%s)" verdict=11
        [[ -z $signal ]] || break
        attempt "$(IFS=,; echo "${nodes[*]}")" "$few" "$@"
        verdict=0
        python -m engine.reliability.restarts after "$status" "$since" "$@" || verdict=$?
        [[ -z $signal && $verdict == 0 ]] || break
        number=$((number + 1))
    done
    finish "$verdict"
}

# A run on this machine.
run_here() { # CONFIG [key=value …]
    local signal="" status=0 verdict since world="${GPUS_PER_NODE:-1}"
    remember_signals
    while :; do
        verdict=0
        python -m engine.reliability.restarts before "$world" "$@" || verdict=$?
        ((verdict == 0)) || break
        since="$(date +%s)"
        attempt_here "$@"
        verdict=0
        python -m engine.reliability.restarts after "$status" "$since" "$@" || verdict=$?
        [[ -z $signal && $verdict == 0 ]] || break
    done
    finish "$verdict"
}

# What this job's exit code is, and whether it comes back.
finish() { # VERDICT
    case "$1" in
        10) return 0 ;;
        2 | 3 | 4) return "$1" ;;
    esac
    [[ -z ${SLURM_JOB_ID:-} ]] || sleep 2 # the ranks may have heard of a TERM before this script
    if [[ $signal == TERM ]]; then
        say "ended by TERM: if it was a requeue, SLURM brings this job back"
        return 143
    elif [[ -z ${SLURM_JOB_ID:-} ]]; then
        return 3
    elif [[ $signal == USR1 ]]; then
        requeue "the time limit"
    else # the ranks got a TERM and this script none: so SLURM does it that wants the nodes for another job
        requeue "to make room"
    fi
}

run() { # CONFIG [key=value …]
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        run_job "$@"
    else
        run_here "$@"
    fi
}
