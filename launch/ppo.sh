#!/usr/bin/env bash
# PPO of LLaMA-65B on 16 nodes of 8 GPUs: actor on 64, critic on 32, reference and reward model on 32.  From the
# repository's root, with what configs/ppo-llama-65b.yaml names in place:
#
#     sbatch launch/ppo.sh [key=value …]
#
# It is launch/train.sh with a configuration and resources; everything that one says of the outside holds here.
#
#SBATCH --job-name=ppo-llama-65b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=3-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source launch/train.sh configs/ppo-llama-65b.yaml "$@"
