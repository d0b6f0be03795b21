#!/usr/bin/env bash
# LLaMA-65B on 256 nodes of 8 GPUs, with the corpus of configs/llama-65b.yaml in place:
#
#     sbatch launch/pretrain_65b.sh [key=value …]
#
# An installed package has this folder inside itself, at `octant config --scripts`.
#
# The run saves and requeues itself ten minutes before its time limit, and goes on from its newest checkpoint.
#
#SBATCH --job-name=llama-65b
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file from elsewhere

export GPUS_PER_NODE=8
MAX_RESTARTS=20

if [[ -f .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
LAUNCH="$(python -m engine config --scripts)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"
run_job llama-65b "$@"
