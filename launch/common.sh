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

LAUNCHER="${LAUNCHER:-srun}"    # srun: one task per GPU.  torchrun: one task per node, which starts its GPUs' processes
PREFLIGHT="${PREFLIGHT:-full}"  # full: at a job's first attempt nodes also compute and communicate.  quick: they only tell
CONTAINER="${CONTAINER:-}"      # what to put before each command, such as: apptainer exec --nv octant.sif
EXCLUDE="${EXCLUDE:-yes}"       # yes: a node that was found bad is not taken again when the job is requeued

read -ra container <<<"$CONTAINER"

# Settings for every process of the job.  Those of CUDA depend on the layout and the GPU: `octant train` makes them.
export_settings() {
    export LAUNCHER GPUS_PER_NODE CONTAINER
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export OCTANT_LOGS="$RUN_DIR"                               # the output of each rank goes to its logs/
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" # flight recorder: the last collectives of each rank …
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1                         # … written down when one of them hangs …
    export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$RUN_DIR/logs/flight-}"             # … here, a file per rank
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$RUN_DIR/logs/flight-}" # (its older name)
    export TORCH_GLOO_LAZY_INIT=1               # a socket when two ranks first talk, not 2,047 as a group is made
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it a restart reads the old round's keys and never meets
    export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}" # 4 µs × 2^22 = 17 s: a rerouting fabric is not a dead one
    # Set these for your cluster:
    # export NCCL_IB_HCA=mlx5                       # the adapters of the compute fabric, where there are others
    # export NCCL_SOCKET_IFNAME=ib0                 # the interface for the bootstrap …
    # export GLOO_SOCKET_IFNAME=ib0                 # … and for gloo, where a host name does not lead to it
    # export NCCL_DEBUG=INFO                        # what NCCL chose, once, when the numbers disappoint
}

# A command of ours, in the container where there is one.
inside() {
    "${container[@]}" "$@"
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

# Sets `nodes` to those of the job that are fit to train on, and says of the others why not; what a look finds is told
# by engine/launching/preflight.py.  Of all nodes that answer, a first job step asks each what it is like; at a job's
# first attempt, when nobody waits for a restart, a second one lets them compute and communicate.
preflight() { # ATTEMPT CONFIG [key=value …]
    local attempt="$1" how=tell since round
    shift
    [[ $PREFLIGHT == full ]] && ((attempt == 0)) && how=measure
    mapfile -t nodes < <(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t idle,alloc,mix,comp -o %N | sort -u)
    unfit=()
    ((${#nodes[@]})) || return 0
    since="$(date +%s)"
    keep_fit < <(on_nodes 1 60 "$how" "$@" | inside python -m engine.launching.preflight judge "$NEED_GPUS" "$since" "$(joined)")
    [[ $how == measure ]] || return 0
    for round in 1 2 3; do # those that a bad one kept from the end have to try again
        ((${#nodes[@]} * GPUS_PER_NODE > 1)) || return 0
        since="${#nodes[@]}"
        meet_at "${nodes[0]}" "$((5000 + round))"
        keep_fit < <(on_nodes "$GPUS_PER_NODE" 240 together "$NEED_GPUS" |
            inside python -m engine.launching.preflight agree "$NEED_GPUS" "$GPUS_PER_NODE" "$(joined)")
        ((${#nodes[@]} < since)) || return 0
    done
}

on_nodes() { # TASKS_PER_NODE SECONDS WHAT …
    local tasks="$1" seconds="$2"
    shift 2
    OCTANT_WORLD_SIZE="$((${#nodes[@]} * tasks))" timeout "$seconds" srun --nodelist="$(joined)" --nodes="${#nodes[@]}" \
        --ntasks="$((${#nodes[@]} * tasks))" --ntasks-per-node="$tasks" --overcommit --overlap --no-kill --wait=20 \
        "${container[@]}" python -m engine.launching.preflight "$@" 2>>"$RUN_DIR/logs/preflight.log"
}

joined() {
    local IFS=,
    echo "${nodes[*]}"
}

keep_fit() {
    local verdict node why
    nodes=()
    while read -r verdict node why; do
        if [[ $verdict == fit ]]; then
            nodes+=("$node")
        else
            say "left out: $node $why"
            [[ $why == "does not answer" ]] || unfit+=("$node") # of that SLURM takes care
        fi
    done
}

# Between attempts there is nobody to pass a request on to; it is heeded before the next one.
remember_signals() {
    trap '[[ $signal == TERM ]] || signal=USR1' USR1
    trap 'signal=TERM' TERM
}

# One attempt: starts the ranks on `nodes` and waits for them however many signals come in.  Sets `status`.
attempt() { # NUM_NODES CONFIG [key=value …]
    local number="$1" per_node=1 pid again log
    shift
    [[ $LAUNCHER == srun ]] && per_node="$GPUS_PER_NODE"
    # What comes to this job's log (rank 0's output, and what others say before they have a log) is kept by the run, too.
    exec {log}> >(trap '' TERM USR1 && exec tee -a "$RUN_DIR/logs/rank-00000.log")
    # In a session of its own: a TERM for this script must not reach srun, which would kill the step at once.
    # --overlap: SLURM keeps a step that lost a node for minutes, and its share of the other nodes with it.
    setsid srun --nodes="$number" --nodelist="$(joined)" --ntasks="$((number * per_node))" --ntasks-per-node="$per_node" \
        --overcommit --overlap --kill-on-bad-exit=1 --wait=60 bash launch/task.sh "$@" >&"$log" 2>&1 &
    pid=$!
    exec {log}>&-
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
    inside python -m engine train "$@" &
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
    local before
    say "requeued: $*"
    trap '' TERM # which it sends to this script, too
    scontrol requeue "$SLURM_JOB_ID"
    if [[ $EXCLUDE == yes ]] && ((${#unfit[@]})); then
        before="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^( ]*\).*/\1,/p' | head -n 1)"
        nodes=("${unfit[@]}")
        say "not again on: $(joined) (scontrol update JobId=$SLURM_JOB_ID ExcNodeList= takes that back)"
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before#,}$(joined)"
    fi
}

# Sets `verdict`, and RUN_DIR to the run's folder.
may_start() { # WORLD_SIZE CONFIG [key=value …]
    local said
    verdict=0
    said="$(inside python -m engine.reliability.restarts before "$@")" || verdict=$?
    RUN_DIR="${said%%$'\n'*}" said="${said#"$RUN_DIR"}"
    [[ -z $said ]] || echo "${said#$'\n'}"
    ((verdict == 0))
}

# A run under SLURM, from the first attempt to the last that this job makes.
run_job() { # CONFIG [key=value …]
    local signal="" status=0 number=0 verdict since use nodes=() unfit=() few="${NODES:-$SLURM_JOB_NUM_NODES}"
    FIXED_ADDR="${MASTER_ADDR:-}" NEED_GPUS="$GPUS_PER_NODE"
    [[ " $* " == *" run.device=cpu "* ]] && NEED_GPUS=0
    remember_signals
    while :; do
        may_start "$((few * GPUS_PER_NODE))" "$@" || break
        mkdir -p "$RUN_DIR/logs"
        export_settings
        preflight "$number" "$@"
        verdict=11
        [[ -z $signal ]] || break
        use="$few"
        ((${#nodes[@]} >= few)) ||
            use="$(inside python -m engine.reliability.restarts nodes "${#nodes[@]}" "$GPUS_PER_NODE" "$@")"
        if ((use < ${MIN_NODES:-(few + 1) / 2})); then
            say "${#nodes[@]} of $few nodes are fit: ${nodes[*]}"
            verdict=0
            inside python -m engine.reliability.restarts after 1 "$(date +%s)" "$@" || verdict=$?
            [[ $verdict != 0 || -n $signal ]] || requeue "too few nodes are fit"
            return "$((verdict ? verdict : 1))"
        fi
        ((use == few)) || say "on $use of $few nodes, with fewer replicas and the same global batch"
        nodes=("${nodes[@]:0:use}")
        meet_at "${nodes[0]}" "$number"
        export OCTANT_WORLD_SIZE="$((use * GPUS_PER_NODE))"
        say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, attempt $number: ${nodes[*]}, $MASTER_ADDR:$MASTER_PORT"
        since="$(date +%s)"
        attempt "$use" "$@"
        verdict=0
        inside python -m engine.reliability.restarts after "$status" "$since" "$@" || verdict=$?
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
        may_start "$world" "$@" || break
        since="$(date +%s)"
        attempt_here "$@"
        verdict=0
        inside python -m engine.reliability.restarts after "$status" "$since" "$@" || verdict=$?
        [[ -z $signal && $verdict == 0 ]] || break
    done
    finish "$verdict"
}

# What this job's exit code is, and whether it comes back.
finish() { # VERDICT
    case "$1" in
        10) return 0 ;;
        0 | 11) ;; # asked to stop
        *) return "$1" ;;
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
