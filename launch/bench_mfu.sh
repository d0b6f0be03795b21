#!/usr/bin/env bash
# Measures a configuration's step on more and more nodes of one job: weak and strong scaling, in one table.
#
#     sbatch --nodes=16 launch/bench_mfu.sh CONFIG [key=value …]
#     GPUS_PER_NODE=1 NODE_COUNTS="1 2 3" sbatch --nodes=3 --gpus-per-node=0 launch/bench_mfu.sh CONFIG run.device=cpu
#     bash launch/bench_mfu.sh CONFIG [key=value …]             on this machine alone
#
# `batch.global` is for the most nodes.  Weak scaling takes the share of it that is due to fewer; strong scaling takes
# all of it on any.  From outside: sbatch's options; GPUS_PER_NODE; NODE_COUNTS (default: 1 2 4 … and all); SCALING (weak
# strong); LAYOUTS, divided by semicolons ("tensor=8 micro=1; tensor=4 pipeline=2"); STEPS; WARMUP; OUTPUT, the folder.
#
# Every row is in OUTPUT/mfu.json as soon as it is measured, and is not measured again: a sweep that was cut off goes on
# when it is submitted again, and is submitted by itself when its time is up.
#
#SBATCH --job-name=octant-mfu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # SLURM runs a copy of this file from elsewhere

for file in "${ENVIRONMENT:-launch/environment.sh}" .venv/bin/activate; do
    if [[ -f $file ]]; then
        # shellcheck source=/dev/null
        source "$file"
        break
    fi
done
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-8}}"
OUTPUT="${OUTPUT:-runs/bench-mfu}"
export RUN_DIR="$OUTPUT"
# shellcheck source=launch/common.sh
source launch/common.sh
export_settings
unset OCTANT_LOGS # what the ranks say is wanted here
read -ra container <<<"${CONTAINER:-}"

octant() {
    "${container[@]}" python -m engine "$@"
}

# Steps on so many of the job's nodes; `number` makes each attempt's port its own.
measure() { # NODES [option …]
    local count="$1" world="$(($1 * GPUS_PER_NODE))"
    shift
    local command=(bench mfu "${asked[@]}" --processes "$world" --json "$OUTPUT/mfu.json" --steps "${STEPS:-5}"
        --warmup "${WARMUP:-3}" "$@")
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        octant "${command[@]}"
        return
    fi
    meet_at "${nodes[0]}" "$number"
    number=$((number + 1))
    # In the background, for a trap runs only when `wait` returns, and it returns when a signal comes.
    OCTANT_WORLD_SIZE="$world" srun --nodes="$count" --nodelist="$(IFS=,; echo "${nodes[*]:0:count}")" \
        --ntasks="$world" --ntasks-per-node="$GPUS_PER_NODE" --overcommit --overlap --kill-on-bad-exit=1 --wait=60 \
        "${container[@]}" python -m engine "${command[@]}" &
    wait $!
}

asked=("$@") number=0 failed=0 nodes=(here)
mkdir -p "$OUTPUT"
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    # The time is nearly up: what is being measured is measured again by the same job, later.
    trap 'say "requeued: the time limit"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
layouts=()
IFS=';' read -ra each <<<"${LAYOUTS:-}"
for layout in "${each[@]}"; do
    layouts+=(--layout "$layout")
done
counts=()
if [[ -n ${NODE_COUNTS:-} ]]; then
    read -ra counts <<<"$NODE_COUNTS"
else
    for ((count = 1; count < ${#nodes[@]}; count *= 2)); do counts+=("$count"); done
    counts+=("${#nodes[@]}")
fi
most=0
for count in "${counts[@]}"; do
    ((count <= ${#nodes[@]})) || { echo "NODE_COUNTS has $count, the job has ${#nodes[@]} nodes" >&2; exit 2; }
    ((count > most)) && most="$count"
done
for scaling in ${SCALING:-weak strong}; do
    share=()
    [[ $scaling == weak ]] && share=(--weak-of "$((most * GPUS_PER_NODE))")
    for count in "${counts[@]}"; do
        # On the most nodes both are the same.
        [[ $scaling == strong && ${SCALING:-weak strong} == *weak* && $count == "$most" ]] && continue
        say "$scaling scaling on $count of $most nodes"
        measure "$count" "${layouts[@]}" "${share[@]}" || {
            failed=1
            say "$scaling scaling on $count nodes could not be measured; going on"
        }
    done
done
[[ -f $OUTPUT/mfu.json ]] || exit 1
octant bench mfu --show "$OUTPUT/mfu.json" --markdown "$OUTPUT/mfu.md" --svg "$OUTPUT/mfu.svg"
exit "$failed"
