#!/usr/bin/env bash
# One line about this node, before training and after a failure: which node, how many GPUs, what must be equal on all.
set -uo pipefail

gpus=0 driver=none
if command -v nvidia-smi >/dev/null; then
    gpus="$(timeout 20 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)"
    driver="$(timeout 20 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
fi
code="$(find engine kernels -name '*.py' -print0 2>/dev/null | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c 1-12)"
config="$(sha256sum "$1" 2>/dev/null | cut -c 1-12)"
echo "${SLURMD_NODENAME:-$(hostname)} $gpus driver=${driver:-none},python=$(python -V 2>&1 | tr ' ' '-'),code=$code,config=$config"
