#!/usr/bin/env bash
# Trains a configuration, under SLURM or on this machine, until it is done.  From the repository's root:
#
#     sbatch --nodes=16 launch/train.sh CONFIG [key=value …]
#     GPUS_PER_NODE=2 sbatch --nodes=2 --gpus-per-node=0 launch/train.sh configs/tiny.yaml run.device=cpu
#     bash launch/train.sh CONFIG [key=value …]
#
# From outside: sbatch's options; GPUS_PER_NODE; NODES, where fewer than the job has are to train and the others are
# spare; MIN_NODES, which suffice where `parallel.data` is `auto` (half of NODES); ENVIRONMENT; MASTER_ADDR; the settings
# at the top of launch/common.sh, and whatever it exports.
#
#SBATCH --job-name=octant
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

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    export GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-8}}"
fi
# What the ranks need of this cluster (modules, a virtual environment, NCCL_IB_HCA …): the file that ENVIRONMENT names,
# or launch/environment.sh, or else the repository's virtual environment.  CONTAINER: see launch/common.sh.
for file in "${ENVIRONMENT:-launch/environment.sh}" .venv/bin/activate; do
    if [[ -f $file ]]; then
        # shellcheck source=/dev/null
        source "$file"
        break
    fi
done
# shellcheck source=launch/common.sh
source launch/common.sh
run "$@"
