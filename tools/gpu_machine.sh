#!/usr/bin/env bash
# Sets up a GPU machine from wheels only, for one that may reach no package index.
#
#   tools/gpu_machine.sh wheels DIR    here: an index, a CUDA toolkit ($CUDA_HOME), the GPU machine's Python and torch versions
#   tools/gpu_machine.sh install DIR   there: Python with that torch; installs what DIR holds and nothing else
#   tools/gpu_machine.sh check         there: what doctor says of the software, then tests/gpu
#   tools/gpu_machine.sh cpu DIR       here, after wheels: an environment of them (5 GB) in DIR/cpu, and the tests of Transformer
#                                      Engine's layers that no GPU is needed for
#
# PYTHON names the interpreter (default: python3; 3.12 or newer), TORCH the version of torch to build against (default: 2.11.0).
set -euo pipefail

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-2.11.0}
ENGINE=2.20.2      # of Transformer Engine
MEGATRON=0.19.2    # Python 3.12 or newer
PART=55M           # the core library is 276 MB: more than some ways into such a machine take at once

wheels() {
    local dir=$1 env=$1/build site
    : "${CUDA_HOME:?names the CUDA toolkit that Transformer Engine is compiled with}"
    mkdir -p "$dir"
    "$PYTHON" -m venv "$env"
    "$env/bin/python" -m pip install --quiet "torch==$TORCH" setuptools wheel pybind11 packaging ninja numpy \
        einops onnx onnxscript pydantic nvdlfw-inspect
    "$env/bin/python" -m pip install --quiet --no-deps "transformer_engine_cu13==$ENGINE" "transformer_engine==$ENGINE"
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # The torch extension comes as source only. It is C++ without kernels, built against the torch that runs it.
    CPATH=$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/nvidia/cu13/include \
    LIBRARY_PATH=$site/nvidia/cu13/lib:$site/nvidia/cudnn/lib:$site/nvidia/nccl/lib \
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-2} \
        "$env/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$dir" \
        "transformer-engine-torch==$ENGINE"
    "$env/bin/python" -m pip download --quiet --no-deps --only-binary :all: --dest "$dir" \
        "transformer_engine==$ENGINE" "transformer_engine_cu13==$ENGINE" "megatron-core==$MEGATRON"
    "$env/bin/python" -m pip download --quiet --no-deps --only-binary :all: --dest "$dir" nvdlfw-inspect einops onnx \
        onnxscript onnx-ir ml-dtypes psutil safetensors pydantic pydantic-core annotated-types typing-inspection \
        jaxtyping wadler-lindig aiohttp pyarrow pytest pytest-timeout hypothesis \
        beartype sortedcontainers iniconfig pluggy pygments
    for wheel in "$dir"/transformer_engine_cu13-*.whl; do
        split -b "$PART" "$wheel" "$wheel.part." && rm "$wheel"
    done
    rm -r "$env"
    ls -l "$dir"
}

install() {
    local dir=$1 missing=()
    for part in "$dir"/*.part.aa; do
        if [ -e "$part" ]; then cat "${part%.aa}".* > "${part%.part.aa}"; fi
    done
    for wheel in "$dir"/*.whl; do
        # What the machine has already stays, in its own version.
        local name
        name=$(basename "$wheel" | cut -d- -f1)
        "$PYTHON" -m pip show --quiet "$name" >/dev/null 2>&1 || missing+=("$wheel")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        "$PYTHON" -m pip install --no-index --no-deps "${missing[@]}"
    fi
    "$PYTHON" -c 'import transformer_engine.pytorch, megatron.core; print("Transformer Engine and Megatron-Core import")'
}

check() {
    "$PYTHON" -c 'from mcore_rl.doctor.software import check_software
for f in check_software(): print(f"{f.level:8}{f.check}: {f.what}")'
    "$PYTHON" -m pytest -m gpu -ra tests/gpu
}

cpu() {
    local dir=$1 env=$1/cpu site
    "$PYTHON" -m venv "$env"
    # The extension runs with the torch that it was built against only: its pins hold instead of ours.
    { echo "torch==$TORCH"; grep -v -E '^(torch|triton|setuptools|sympy|nvidia|cuda)[-=]' constraints.txt; } > "$env/constraints.txt"
    PIP_CONSTRAINT=$env/constraints.txt "$env/bin/python" -m pip install --quiet -e '.[dev]'
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    export LD_LIBRARY_PATH=$site/nvidia/nccl/lib:$site/nvidia/cu13/lib:$site/nvidia/cudnn/lib
    PYTHON=$env/bin/python install "$dir"
    OMP_NUM_THREADS=1 "$env/bin/python" -m pytest tests/model/test_engine.py tests/model/test_precision.py \
        tests/checkpoint/test_fp8.py
    "$env/bin/python" -m pytest --collect-only --quiet tests/gpu
}

case ${1:-} in
    wheels | install | cpu) "$1" "${2:?names the directory of the wheels}" ;;
    check) check ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
