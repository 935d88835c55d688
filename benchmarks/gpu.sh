#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build, GPU tests, compute-sanitizer on the case table, benchmarks.
# Needs torch >= 2.11 with CUDA, its nvcc, pytest; no network. Writes benchmarks/results/<machine>/.
#
#   benchmarks/gpu.sh [--quick] [--cpu] [--latency]
#
# --quick  few rounds, and only one op under compute-sanitizer
# --cpu    the same steps without a device: CPU tests and benchmarks, no sanitizer, no build where vss._C loads
# --latency  in place of all that: pruning to a time in torch (float16, channels last, CUDA graphs) on the CamVid of the
#          folder DATA, networks at full size; a small trial without DATA. Goes on with what build/latency holds
# PYTHON   the interpreter (default python); OUT: a folder that gets a copy of the results and the log
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
device=cuda quick=() patience=1 latency=
for option in "$@"; do
    case $option in
        --quick) quick=(--quick) ;;
        --cpu) device=cpu patience=4 ;;
        --latency) latency=yes ;;
        *) echo "unknown option $option; see the head of $0" >&2; exit 2 ;;
    esac
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/gpu.log
failed=0

# step NAME SECONDS COMMAND...: run it, keep its output, go on whatever happens; a failure fails the whole call.
step() {
    local name=$1 seconds=$2 begin=$SECONDS rc
    shift 2
    echo "== $name" | tee -a "$log"
    timeout $((seconds * patience)) "$@" 2>&1 | tee -a "$log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    echo "== $name: exit $rc after $((SECONDS - begin)) s" | tee -a "$log"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

build() {
    if [ "$device" = cpu ]; then
        "$PYTHON" -c "from vss import ops; raise SystemExit(ops.build_info() is None)" 2>/dev/null && return 0
        MAX_JOBS=1 "$PYTHON" setup.py build_ext --inplace
        return
    fi
    local arch
    arch=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || return 1
    TORCH_CUDA_ARCH_LIST=$arch VSS_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$PYTHON" setup.py build_ext --inplace --force
}

sanitize() {
    local tool=${SANITIZER:-}
    [ -n "$tool" ] || tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer)
    [ -x "$tool" ] || { echo "compute-sanitizer was not found; set SANITIZER"; return 1; }
    "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -p no:cacheprovider -m gpu -q -x \
        tests/ops -k "not opcheck and ${1:-test}"
}
export -f build sanitize
export PYTHON device

# Pruning to a time where it runs: half precision and CUDA graphs on a GPU, float32 on a CPU.
bench_latency() {
    local how=(--quick --out build/latency-quick)
    if [ -n "${DATA:-}" ]; then
        how=(--data-root "$DATA" --out build/latency --write)
        [ "$device" = cpu ] || how+=(--full)
    fi
    [ "$device" = cpu ] || how+=(--engine-precision fp16)
    "$PYTHON" benchmarks/bench_latency.py --backend torch --device "$device" "${how[@]}"
}
export -f bench_latency

finish() {
    local machine
    machine=$("$PYTHON" -c "import torch; from vss.environment import environment; print(environment()['machine'])")
    mkdir -p "benchmarks/results/$machine"
    grep '^== ' "$log" >"benchmarks/results/$machine/$1.txt"
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT"
        cp -r "benchmarks/results/$machine" "$OUT/"
        cp "$log" "$OUT/$1.log"
    fi
    exit $failed
}

marker=$([ "$device" = cuda ] && echo gpu || echo "not gpu and not slow")
if [ -n "$latency" ]; then
    for package in lightning torchmetrics torch_pruning scipy pydantic; do
        has "$package" || { echo "--latency needs $package" >&2; exit 2; }
    done
    step build 200 bash -c build
    step tests 120 "$PYTHON" -m pytest -p no:cacheprovider -q -m "$marker" tests/deploy/test_eager.py \
        tests/deploy/profile/test_setting.py
    step bench_latency 3600 bash -c bench_latency
    finish latency
fi

step build 200 bash -c build
step tests 80 "$PYTHON" -m pytest -p no:cacheprovider -q -m "$marker" tests/ops
if [ "$device" = cuda ]; then
    if [ ${#quick[@]} -gt 0 ]; then
        step compute-sanitizer 110 bash -c "sanitize map_stats"
    else
        step compute-sanitizer 110 bash -c sanitize
    fi
fi
step bench_ops 100 "$PYTHON" benchmarks/bench_ops.py --device "$device" "${quick[@]}" --write
if has torch_pruning; then
    step bench_importance 30 "$PYTHON" benchmarks/bench_importance.py --device "$device" "${quick[@]}" --write
else
    echo "== bench_importance: left out, torch-pruning is not installed" | tee -a "$log"
fi
if has torchvision && has pydantic; then
    batch=$([ "$device" = cuda ] && echo 8 || echo 1)
    step bench_sirfp 70 "$PYTHON" benchmarks/bench_sirfp.py --device "$device" --batch "$batch" "${quick[@]}" --write
else
    echo "== bench_sirfp: left out, torchvision or pydantic is not installed" | tee -a "$log"
fi

finish gpu
