#!/usr/bin/env bash
# What to measure in the few minutes that a GPU is at hand. Every stage stands alone, writes its json under OUT after each
# measurement, and does not stop the next one.
#
#   tools/gpu_check.sh [--rehearse] [OUT] [STAGE ...]      OUT: default benchmarks; stages: default 1 2 3
#
#   1   torch and triton: the head against float64, Triton's kernels, time and memory beside the GEMMs       4 minutes
#   2   and Megatron-Core: training steps of 8 layers of Llama-3-8B in bf16, tokens/s and MFU                3 minutes
#   3   and Transformer Engine: the same by its layers in bf16 and FP8, then tests/gpu                       8 minutes
#
# --rehearse runs the same code on a CPU with tiny shapes, without tests/gpu. PYTHON names the interpreter (default: that of
# .venv, else python3). The exit status is 1 where a stage failed; what it measured before is in its json. No json is ever
# written over: of a second run on the same day it has a number, of a rehearsal its name says so.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=()
if [ "${1:-}" = --rehearse ]; then rehearse=(--rehearse); shift; fi
out=${1:-benchmarks}
shift || true
stages=(${@:-1 2 3})
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
status=0

# What cannot work is refused before the first minute on a GPU is spent.
for one in "${stages[@]}"; do
    [[ $one =~ ^[123]$ && ! $out =~ ^(-.*|[0-9]+)$ ]] || { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
done
mkdir -p "$out" && [ -w "$out" ] || { echo "$out: cannot be written to; name another OUT" >&2; exit 2; }

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$PYTHON" -m "$@" &
    child=$!
    wait "$child" # in the background: a signal ends the stage with this script, and leaves nothing on the GPU
    local code=$?
    echo "stage $name: exit status $code after $((SECONDS - began)) s" >&2
    [ $code -eq 0 ] || status=1
}

stop() { # EXIT-STATUS
    trap '' TERM INT HUP
    [ -z "${child:-}" ] || { kill -TERM "$child" 2>/dev/null; wait "$child"; }
    exit "$1"
}
trap 'stop 143' TERM HUP
trap 'stop 130' INT

for one in "${stages[@]}"; do
    case $one in
        1) stage 1 240 benchmarks.gpu_head --out "$out" "${rehearse[@]}" ;;
        2) stage 2 180 benchmarks.gpu_step portable --out "$out" "${rehearse[@]}" ;;
        3)
            stage 3 240 benchmarks.gpu_step engine --out "$out" "${rehearse[@]}"
            [ ${#rehearse[@]} -gt 0 ] || stage "3, tests/gpu" 240 pytest -m gpu -ra tests/gpu
            ;;
    esac
done
exit $status
