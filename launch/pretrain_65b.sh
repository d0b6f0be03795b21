#!/usr/bin/env bash
# LLaMA-65B on 256 nodes of 8 GPUs.  From the repository's root, with the corpus of configs/llama-65b.yaml in place:
#
#     sbatch launch/pretrain_65b.sh [key=value …]
#
# It is launch/train.sh with a configuration and resources; everything that one says of the outside holds here.
#
#SBATCH --job-name=llama-65b
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source launch/train.sh configs/llama-65b.yaml "$@"
