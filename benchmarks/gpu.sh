#!/usr/bin/env bash
# What needs an NVIDIA GPU, in three calls of at most four minutes each; no network. A call that is cut off, or that has
# no time left for a step, keeps what it has measured, and the same call goes on.
#
#   benchmarks/gpu.sh 1 [--cpu] [--quick]    the kernels: build for this card, tests of the ops, compute-sanitizer memcheck
#                                            and racecheck on the case table, bench_ops, bench_sirfp, bench_importance
#   benchmarks/gpu.sh 2 [--cpu] [--quick]    networks at full size, uncut and cut: float16, channels last, CUDA graphs,
#                                            torch.compile
#   benchmarks/gpu.sh 3 [--cpu] [--quick]    CamVid of the folder DATA at 360x480: trained, cut by five criteria, fine-tuned
#
# --cpu    the same steps without a device, and without compute-sanitizer
# --quick  small networks and few rounds; results go to build/gpu/results instead of benchmarks/results
# PYTHON   the interpreter (default python); LIMIT: seconds of a call (default 235); SANITIZER: the tool;
# DATA     for part 3: CamVid in the layout of SegNet, PNG or JPEG; OUT: a folder that gets copies of results and log
#
# Beside a plain image of torch >= 2.11 (Python 3.12, nvcc of torch's CUDA) part 1 needs numpy, pytest, ninja; part 2
# torchvision, pydantic, pyyaml, scipy, safetensors, pillow, onnx; part 3 also lightning, torchmetrics, tensorboard, typer
# and rich, not onnx. bench_importance is left out without torch-pruning. gpu_check.py names what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-} device=cuda cpu=() quick=()
case $part in
    1 | 2 | 3) shift ;;
    *) echo "give the part, 1, 2 or 3; see the head of $0" >&2; exit 2 ;;
esac
for option in "$@"; do
    case $option in
        --quick) quick=(--quick) ;;
        --cpu) device=cpu cpu=(--cpu) ;;
        *) echo "unknown option $option; see the head of $0" >&2; exit 2 ;;
    esac
done
export PYTHON=${PYTHON:-python} PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" device
limit=${LIMIT:-235} failed=0
[[ $limit =~ ^[0-9]+$ ]] || { echo "LIMIT is $limit; expected whole seconds, such as 235" >&2; exit 2; }
"$PYTHON" benchmarks/gpu_check.py "$part" "${cpu[@]}" ${DATA:+--data "$DATA"} || exit 2
[ ${#quick[@]} -eq 0 ] || export VSS_RESULTS=${VSS_RESULTS:-$PWD/build/gpu/results}
results=${VSS_RESULTS:-benchmarks/results}
machine=$("$PYTHON" -c "from vss.core.environment import environment; print(environment()['machine'])") || exit 1
commit=$(git rev-parse --short HEAD 2>/dev/null || echo none)
state=${VSS_RESULTS:-build/gpu}/steps/$commit-$device${quick[0]:-}
mkdir -p "$results/$machine" "$state"
log=$results/$machine/gpu-$part${cpu[0]:-}.txt
[ -e "$state/$part.begun" ] || : >"$log"
touch "$state/$part.begun"

say() { echo "== $*" | tee -a "$log"; }
left() { echo $((limit - SECONDS)); }
copy() { if [ -n "${OUT:-}" ]; then mkdir -p "$OUT" && cp -r "$results/$machine" "$OUT/"; fi; }
finish() {
    say "gpu: $("$PYTHON" benchmarks/gpu_check.py 1 --state)"
    copy
}
trap finish EXIT

# step NAME SECONDS COMMAND...: what an earlier call has done is not done again. SECONDS: below so many it is not begun;
# SECONDS:MOST: after MOST it is ended, so that a tool which starts anew each time leaves time for the steps behind it.
step() {
    local name=$1 needs=${2%:*} most=${2#*:} begin=$SECONDS rc
    [[ $2 == *:* && $most -lt $(left) ]] || most=$(left)
    shift 2
    if [ -e "$state/$part-$name" ]; then say "$name: done before"; return; fi
    if [ "$(left)" -lt "$needs" ]; then
        say "$name: left out, $(left) s are left and it needs about $needs s; the same call goes on with it"
        failed=1
        return
    fi
    say "$name"
    timeout -k 5 "$most" "$@" 2>&1 | tee -a "$log"
    rc=${PIPESTATUS[0]}
    case $rc in
        0) touch "$state/$part-$name" ;;
        75) failed=1; say "$name: ended in time with rows to go; the same call goes on" ;;
        124 | 137) failed=1; say "$name: cut off after $most s; what it measured stays, the same call goes on" ;;
        *) failed=1 ;;
    esac
    say "$name: exit $rc after $((SECONDS - begin)) s"
    copy
}

build() {
    if [ "$device" = cpu ]; then
        "$PYTHON" -c "from vss import ops; raise SystemExit(ops.build_info() is None)" 2>/dev/null && return 0
        VSS_CUDA=0 MAX_JOBS=1 "$PYTHON" setup.py build_ext --inplace
        return
    fi
    local arch
    arch=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || return 1
    # Objects that are there are kept (ninja), so that a build that was cut off goes on; ninja is where Python is.
    PATH="$(dirname "$("$PYTHON" -c "import sys; print(sys.executable)")"):$PATH" TORCH_CUDA_ARCH_LIST=$arch VSS_CUDA=1 \
        MAX_JOBS=${MAX_JOBS:-$(nproc)} "$PYTHON" setup.py build_ext --inplace --force || return 1
    "$PYTHON" -c "from vss import ops; raise SystemExit(not (ops.build_info() or {}).get('cuda'))"
}

sanitize() { # sanitize TOOL: the CUDA rows of the case table under memcheck or racecheck
    local found=${SANITIZER:-$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")}
    if [ ! -x "$found" ]; then
        echo "compute-sanitizer was not found (looked for $found): install it with the CUDA toolkit or set SANITIZER"
        return 1
    fi
    # Memory of its own for every tensor: what torch's cache hands out has neighbours that hide an access outside.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$1" --error-exitcode 9 \
        "$PYTHON" -m pytest $pytest -p no:xdist -m gpu -x tests/ops -k "not opcheck and not bad_input and (${2:-test})"
}
export pytest="-p no:cacheprovider -q --confcutdir=tests/ops" # the fixtures of other rooms need more wheels
export -f build sanitize

case $part in
    1)
        marker=$([ "$device" = cuda ] && echo gpu || echo "not gpu and not slow")
        say "gpu: $("$PYTHON" benchmarks/gpu_check.py 1 --state)"
        step build 60 bash -c build
        if [ ! -e "$state/1-build" ]; then
            say "the kernels are not built: nothing else is begun, since torch would stand in for them"
            exit 1
        fi
        # shellcheck disable=SC2086
        step tests 25 "$PYTHON" -m pytest $pytest -m "$marker" tests/ops ${quick:+-k "map_stats or status"}
        if [ "$device" = cuda ]; then
            most=$([ -e "$state/1-bench_ops" ] && echo $(($(left) / 2)) || echo 60)
            step memcheck "40:$most" bash -c "sanitize memcheck ${quick:+map_stats}"
            step racecheck "40:$most" bash -c "sanitize racecheck ${quick:+map_stats}"
        fi
        compiled=$([ "$device" = cuda ] && echo --compile)
        only=${quick:+--op max_unpool}
        # shellcheck disable=SC2086
        step bench_ops 30 "$PYTHON" benchmarks/bench_ops.py --device "$device" "${quick[@]}" $only $compiled --write --resume \
            --seconds-left $(($(left) - 15))
        if "$PYTHON" -c "import torchvision, pydantic" 2>/dev/null; then
            batch=$([ "$device" = cuda ] && echo 8 || echo 1)
            step bench_sirfp 25 "$PYTHON" benchmarks/bench_sirfp.py --device "$device" --batch "$batch" "${quick[@]}" \
                ${quick:+--widest 64} --write
        else
            say "bench_sirfp: left out, torchvision or pydantic is not installed"
        fi
        if "$PYTHON" -c "import torch_pruning, torchvision" 2>/dev/null; then
            step bench_importance 15 "$PYTHON" benchmarks/bench_importance.py --device "$device" "${quick[@]}" --write
        else
            say "bench_importance: left out, torch-pruning or torchvision is not installed"
        fi
        ;;
    2)
        say "gpu: $("$PYTHON" benchmarks/gpu_check.py 1 --state)"
        step nets 20 "$PYTHON" benchmarks/gpu_nets.py --device "$device" "${quick[@]}" --write --seconds-left $(($(left) - 10))
        ;;
    3)
        say "gpu: $("$PYTHON" benchmarks/gpu_check.py 1 --state)"
        step camvid 20 "$PYTHON" benchmarks/gpu_camvid.py ${DATA:+--data "$DATA"} "${cpu[@]}" "${quick[@]}" --write \
            --seconds-left $(($(left) - 10))
        ;;
esac
exit $failed
