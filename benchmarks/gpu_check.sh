#!/usr/bin/env bash
# Builds meshring on a machine with a GPU and no network, runs the GPU tests and benchmarks, and
# writes one JSON with the machine's description, every section's exit code, output and figures.
#
#   bash benchmarks/gpu_check.sh [--rehearse] [--sections build,pack,...] [FILE]
#
# FILE is $OUT/gpu.json, or gpu.json, unless given. --rehearse runs all of it without a GPU and
# without building: benchmarks on the tests' stand-in NCCL, GPU tests skipped; the JSON says so.
# The exit code is 1 where a section failed, but 0 in a rehearsal, where some must.
# PYTHON names the interpreter (default python3), TOTAL_S the time for everything (default 570).
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
total=${TOTAL_S:-570}
file=${OUT:-.}/gpu.json
rehearsal=false
only=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearsal=true ;;
    --sections) only=,${2:?--sections needs names}, && shift ;;
    -*) echo "gpu_check.sh: unknown option $1" >&2 && exit 2 ;;
    *) file=$1 ;;
  esac
  shift
done
case $file in /*) ;; *) file=$here/$file ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1

# section NAME LIMIT_S COMMAND...; its figures, if any, are in $work/NAME.json
section() {
  local name=$1 limit=$2 left=$((total - SECONDS)) start=$SECONDS rc=0
  shift 2
  if [ -n "$only" ] && [[ $only != *,$name,* ]]; then return 0; fi
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $name, at most $limit s: $*"
  if [ "$limit" -lt 3 ]; then
    echo "not run: the time of all sections, $total s, is over" >"$work/$name.out"
    rc=124
  else
    timeout -k 5 "$limit" "$@" </dev/null >"$work/$name.out" 2>&1 || rc=$?
  fi
  printf '%s\n' "$rc" "$((SECONDS - start))" "$limit" "$*" >"$work/$name.meta"
  echo "$name" >>"$work/sections"
  tail -n 25 "$work/$name.out"
  echo "== $name: exit code $rc after $((SECONDS - start)) s"
  return 0
}

if $rehearsal; then
  mkdir "$work/ranks"
  PYTHONPATH=tests "$python" -c "
import shlex, standin
for name, value in standin.environment('$work/ranks').items():
    print(f'export {name}={shlex.quote(value)}')" >"$work/standin.sh" ||
    { echo "gpu_check.sh: the stand-in NCCL cannot be built" >&2; exit 2; }
  on_nccl=(bash -c '. "$0"; exec "$@"' "$work/standin.sh")
else
  on_nccl=(env)
  mkdir "$work/source"
  cp -r csrc python pyproject.toml setup.py README.md LICENSE MANIFEST.in "$work/source"
  if ! "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)'; then
    # Older ones know no licence expression; there is no network to get a newer one from.
    sed -i 's/^license = .*/license = { text = "Apache-2.0" }/; /^license-files/d' \
      "$work/source/pyproject.toml"
  fi
  section build 180 "$python" -m pip install -q --no-build-isolation --no-deps --no-index \
    --upgrade --target "$work/site" "$work/source"
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi

bench=("$python" -m meshring bench)
nccl=("${on_nccl[@]}" "${bench[@]}" --backend nccl)
small=8,64K,1M
section doctor 30 "${on_nccl[@]}" "$python" -m meshring doctor
section pack 90 "$python" benchmarks/pack_gpu.py --rounds 5 --json "$work/pack.json"
[ -e benchmarks/overhead.py ] && section overhead 60 "$python" benchmarks/overhead.py
if $rehearsal; then
  section bench_nccl 60 "${nccl[@]}" -n 1 --sizes $small --iters 3 --json "$work/bench_nccl.json"
  rounds=(--rounds 1 --sizes 8,65536)
else
  section bench_nccl 90 "${nccl[@]}" --sizes 8,4K,64K,1M,16M,256M,1G --json "$work/bench_nccl.json"
  rounds=(--rounds 2)
fi
section bench_graph 40 "${nccl[@]}" all_reduce all_gather reduce_scatter broadcast \
  --sizes $small --graph --json "$work/bench_graph.json"
section bench_registered 40 "${nccl[@]}" all_reduce all_gather reduce_scatter broadcast \
  --sizes $small,64M --registered --json "$work/bench_registered.json"
section bench_shared 60 "${nccl[@]}" -n 2 --sizes $small --iters 5 --json "$work/bench_shared.json"
collectives=("${on_nccl[@]}" "$python" benchmarks/collectives_gpu.py)
section collectives 90 "${collectives[@]}" --ranks 1 "${rounds[@]}" --json "$work/collectives.json"
section collectives_shared 80 "${collectives[@]}" --ranks 2 --rounds 1 --sizes 8,65536 \
  --json "$work/collectives_shared.json"
section tests 345 "$python" -m pytest -m gpu -q -rs --durations=15 tests
section bench_host 40 "${bench[@]}" -n 2 --sizes 8,64K,1M,16M --json "$work/bench_host.json"

WORK=$work REHEARSAL=$rehearsal "$python" - "$file" <<'END'
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

KEPT = 40_000  # characters of a section's output, its end


def said(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {done.stderr.strip()[-300:]}"


def python(code):
    return said(sys.executable, "-c", code)


work = Path(os.environ["WORK"])
query = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem"
machine = {
    "gpus": said("nvidia-smi", f"--query-gpu={query}", "--format=csv").splitlines(),
    "cuda_driver": python("from meshring import _core; print(_core.cuda_driver())"),
    "nccl": python("from meshring import nccl; print(nccl.library())"),
    "cupy": python("import cupy; print(cupy.__version__, cupy.cuda.runtime.runtimeGetVersion())"),
    "kernels": python("from meshring import _core; print(_core.kernels_info())"),
    "meshring": python("from importlib.metadata import version; print(version('meshring'))"),
    "nvcc": said("nvcc", "--version").splitlines()[-1:],
    "cpu": python("from meshring.doctor import cpu_model; print(cpu_model())"),
    "cores": len(os.sched_getaffinity(0)),
    "kernel": platform.release(),
    "python": platform.python_version(),
    "numpy": python("import numpy; print(numpy.__version__)"),
    "commit": os.environ.get("MESHRING_COMMIT") or said("git", "rev-parse", "HEAD"),
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
}
sections = {}
names = work / "sections"
for name in names.read_text().split() if names.exists() else ():
    rc, seconds, limit, command = (work / f"{name}.meta").read_text().split("\n", 3)
    output = (work / f"{name}.out").read_bytes().decode(errors="replace")
    results = None
    if (work / f"{name}.json").exists():
        try:
            results = json.loads((work / f"{name}.json").read_text())
        except ValueError as error:
            results = f"not JSON: {error}"
    sections[name] = {
        "rc": int(rc),
        "seconds": int(seconds),
        "limit_s": int(limit),
        "command": command.strip(),
        "output": output[-KEPT:],
        "results": results,
    }
rehearsal = os.environ["REHEARSAL"] == "true"
document = {
    "rehearsal": rehearsal,
    "remark": "a rehearsal without a GPU: nothing in it is a measurement" if rehearsal else "",
    "machine": machine,
    "sections": sections,
}
text = json.dumps(document, indent=1)
places = {"WORK": str(work), "REPOSITORY": os.getcwd(), "PREFIX": sys.prefix}
for word, place in places.items():
    text = text.replace(place, word)
Path(sys.argv[1]).write_text(text + "\n")
print(f"{sys.argv[1]}: " + ", ".join(f"{n} {s['rc']}" for n, s in sections.items()))
sys.exit(not rehearsal and any(s["rc"] for s in sections.values()))
END
