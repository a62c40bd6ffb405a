#!/usr/bin/env bash
# All that a machine with a GPU can show, in phases that end by themselves:
#   tests/gpu/run.sh OUT [PHASE ...]
# Without phases, all of them in the order below. Logs and results lie in build/gpu, which git ignores; after every
# phase they are packed as OUT/results.tar.gz. A phase that passed is left out the next time, unless the sources have
# changed since. No network is needed.
#   LIMIT=540   seconds that a phase has at most; benchmarks keep what they have by then
#   WHEEL=FILE  the package, built from these sources elsewhere
#   DRY=1       everything that works without a GPU: command lines, limits, archive, report
set -uo pipefail
cd "$(dirname "$0")/../.."
all=(build limits persistent sweep ops decode models train sanitize soak report)
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
work=$PWD/build/gpu${DRY:+-dry}
mkdir -p "$work"
shift
phases=("${@:-${all[@]}}")
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8} TORCHINDUCTOR_COMPILE_THREADS=1
limit=${LIMIT:-540} dry=${DRY:-} failed=0
sources=$(find csrc kernels fastvae setup.py pyproject.toml -type f ! -name '*.so' ! -name '*.pyc' -print0 |
  sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)

limited() { timeout -s INT -k 30 "$limit" "$@"; }
is() { [ "$(cat "$work/$1" 2> /dev/null)" = "$sources" ]; }
installed() { is built && (cd / && python3 -c 'import fastvae') 2> /dev/null; }
has() { python3 -P -c "import $1" 2> /dev/null; }

build() {
  limited python3 -m pip install ${dry:+--dry-run} --no-build-isolation --no-deps --no-index "${WHEEL:-.}" &&
    (cd / && python3 -c 'from fastvae.cli import main; main(["info"])') && echo "$sources" > "$work/built"
}

limits() {
  [ -z "$dry" ] || command -v nvcc || return 0
  limited python3 -P benchmarks/gpu_limits.py ${dry:+--compile-only} --output "$work/limits.json"
}
sweep() { limited python3 -P benchmarks/gpu_sweep.py ${dry:+--plans} --seconds $((limit / 2)) --output "$work/sweep.json"; }
soak() { limited python3 -P tests/gpu/soak.py --seconds 60; }

# Side by side where pytest-xdist is there; without a GPU nothing is collected, which is status 5.
tests() {
  local beside=()
  [ -n "$dry" ] || [ "$1" = sanitize ] || ! has xdist || beside=(-n 8)
  limited python3 -P -m pytest -v -rs --tb=short --durations=10 -p no:cacheprovider "${beside[@]}" \
    --junitxml "$work/$1.xml" "${@:2}"
  local status=$?
  [ "$status" = 0 ] || { [ -n "$dry" ] && [ "$status" = 5 ]; }
}
ops() { tests ops tests/gpu/test_ops.py tests/gpu/test_replay.py; }
persistent() { tests persistent tests/gpu/test_persistent.py; }
models() { tests models tests/gpu/test_models.py tests/gpu/test_recorded_step.py; }
sanitize() { tests sanitize tests/gpu/test_sanitize.py; }

bench() {
  has pytest_benchmark || return
  local how=(--device cuda --benchmark-only --benchmark-json "$work/$1.json")
  [ -z "$dry" ] || how=(--device cpu --benchmark-disable --collect-only)
  limited python3 -P -m pytest "${@:2}" "${how[@]}" -q -p no:cacheprovider
}
decode() { bench decode benchmarks/bench_decode_*.py; }
train() { bench train benchmarks/bench_[!dg]*.py; }

report() {
  [ -z "$dry" ] || cp benchmarks/results/h100.json "$work/train.json"
  python3 - "$work" << 'PYTHON' || return
import json
import sys
from pathlib import Path

work = Path(sys.argv[1])
runs = [json.loads(path.read_text()) for name in ("decode", "train") if (path := work / f"{name}.json").exists()]
runs[0]["benchmarks"] = [line for run in runs for line in run["benchmarks"] if "work" in line["extra_info"]]
(work / "benchmarks.json").write_text(json.dumps(runs[0]))
PYTHON
  local limits=()
  [ ! -e "$work/limits.json" ] || limits=(--limits "$work/limits.json")
  python3 benchmarks/report.py "$work/benchmarks.json" "${limits[@]}" --png "$work/speed.png" > "$work/report.md"
}

for phase in "${phases[@]}"; do
  case " ${all[*]} " in *" $phase "*) ;; *) echo "no phase $phase: there are ${all[*]}" >&2; exit 2 ;; esac
  if is "$phase.done" && { [ "$phase" != build ] || installed; }; then
    echo "== $phase: done before"
    continue
  fi
  if [ "$phase" != build ] && ! installed; then (build) > "$work/build.log" 2>&1; fi
  echo "== $phase"
  start=$SECONDS
  if ("$phase") > "$work/$phase.log" 2>&1; then
    echo "$sources" > "$work/$phase.done"
    echo "passed in $((SECONDS - start)) s"
  else
    failed=1
    tail -n 40 "$work/$phase.log"
    echo "FAILED in $((SECONDS - start)) s: $work/$phase.log"
  fi
  tar czf "$out/results.tar.gz" -C "$work" .
done
exit $failed
