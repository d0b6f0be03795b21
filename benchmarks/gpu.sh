#!/usr/bin/env bash
# Everything that needs a GPU, in one go: benchmarks/gpu.sh OUT
#
# Most valuable first, each part's results in OUT as soon as it ends, so that whoever has a GPU for eight minutes keeps
# what was measured when they are over.  A part that fails or runs out of time says so and the next one begins.
# PYTHON picks the interpreter; it needs torch for CUDA and what pyproject.toml lists.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
started=$SECONDS
failed=0

# part NAME SECONDS COMMAND…: what it prints goes to OUT/NAME.txt and, its last lines, to the screen.
part() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    printf '%s: exit code %s after %s s (%s s since the start)\n' "$name" "$code" $((SECONDS - begin)) $((SECONDS - started)) |
        tee -a "$out/summary.txt"
    tail -n 3 "$out/$name.txt"
    ((code == 0)) || failed=$((failed + 1))
}

octant() { part "$1" "$2" "$python" -m engine "${@:3}"; }

part machine 20 nvidia-smi
octant doctor 40 doctor
octant matmul 30 bench matmul --json "$out/matmul.json"
octant kernels-bf16 75 bench kernels --json "$out/kernels-bf16.json" --markdown "$out/tables.md"
octant step-1b-8k 75 bench step --seq-len 8192 --json "$out/step-1b-8k.json" --markdown "$out/tables.md"
part parity 75 "$python" -m pytest -q -p no:cacheprovider tests/kernels -k cuda
octant step-1b-4k 60 bench step --seq-len 4096 --peers transformers transformers-compiled \
    --json "$out/step-1b-4k.json" --markdown "$out/tables.md"
octant step-8b-layers-8k 45 bench step --model llama3-8b --layers 4 --peers --json "$out/step-8b-layers-8k.json" \
    --markdown "$out/tables.md"
octant kernels-fp32 45 bench kernels --dtype fp32 --json "$out/kernels-fp32.json" --markdown "$out/tables.md"
echo "$failed parts failed; results: $out"
exit $((failed > 0))
