#!/usr/bin/env bash
# All that a machine with a GPU can show, in phases of at most ten minutes, into a folder that may be kept:
#   tests/gpu/run.sh OUT [build] [limits] [ops] [persistent] [models] [sanitize] [decode] [train] [report]
# Without phases, all of them. A phase that passed leaves OUT/<phase>.done and is left out the next time;
# the package is built again where it is not installed. No network is needed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
phases=("$@")
[ ${#phases[@]} -gt 0 ] || phases=(build limits ops persistent models sanitize decode train report)
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
failed=0

installed() { (cd / && python3 -c 'import fastvae') 2>/dev/null; }

build() {
  python3 -m pip install --no-build-isolation --no-deps --no-index . && cd / && python3 -c 'from fastvae.cli import main; main(["info"])'
}

tests() { python3 -P -m pytest -q -rs --durations=10 -p no:cacheprovider --junitxml "$out/$1.xml" "${@:2}"; }
limits() { python3 -P benchmarks/gpu_limits.py --output "$out/limits.json"; }
ops() { tests ops tests/gpu/test_ops.py tests/gpu/test_replay.py; }
persistent() { tests persistent tests/gpu/test_persistent.py; }
models() { tests models tests/gpu/test_models.py tests/test_{layer_norm_lstm,highway_conv_triton,decode_lstm,decode_bytenet_triton}.py -k "gpu or triton"; }
sanitize() { tests sanitize tests/gpu/test_sanitize.py; }
bench() {
  python3 -P -c 'import pytest_benchmark' || return
  python3 -P -m pytest "${@:2}" --device cuda --benchmark-only -q -p no:cacheprovider --benchmark-json "$out/$1.json"
}
decode() { bench decode benchmarks/bench_decode_*.py; }
train() { bench train benchmarks/bench_[!d]*.py; }
report() {
  python3 - "$out" <<'PYTHON' || return
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
runs = [json.loads(path.read_text()) for name in ("decode", "train") if (path := out / f"{name}.json").exists()]
runs[0]["benchmarks"] = [line for run in runs for line in run["benchmarks"]]
(out / "benchmarks.json").write_text(json.dumps(runs[0]))
PYTHON
  local limits=()
  [ ! -e "$out/limits.json" ] || limits=(--limits "$out/limits.json")
  python3 benchmarks/report.py "$out/benchmarks.json" "${limits[@]}" --png "$out/speed.png" > "$out/report.md"
}

for phase in "${phases[@]}"; do
  case $phase in build | limits | ops | persistent | models | sanitize | decode | train | report) ;; *) echo "no phase $phase" >&2; exit 2 ;; esac
  if [ -e "$out/$phase.done" ] && { [ "$phase" != build ] || installed; }; then
    echo "== $phase: done before"
    continue
  fi
  if [ "$phase" != build ] && ! installed; then (build) > "$out/build.log" 2>&1; fi
  echo "== $phase"
  start=$SECONDS
  if ("$phase") > "$out/$phase.log" 2>&1; then
    touch "$out/$phase.done"
    echo "passed in $((SECONDS - start)) s"
  else
    failed=1
    tail -n 40 "$out/$phase.log"
    echo "FAILED in $((SECONDS - start)) s: $out/$phase.log"
  fi
done
exit $failed
