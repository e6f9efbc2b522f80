#!/usr/bin/env bash
# For a machine with a GPU and the real images: the whole table of PACS, every pair and method, timed end to end.
#   bash benchmarks/device_study.sh PARQUET SPLITS WEIGHTS [more flags of dwm-fast pacs]
# Runs from a bare checkout. Results, report and the time go to ${OUT:-benchmarks/results}; the run folder is kept below
# ${TMPDIR:-/tmp}, so the same command goes on after a stop.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { echo "usage: $0 PARQUET SPLITS WEIGHTS [flags]"; exit 2; }
data=$1 splits=$2 weights=$3
shift 3
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
run=${TMPDIR:-/tmp}/dwm-fast-pacs
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0
# Importing benchmarks makes the mapped packages (dwm_fast.kernels and others) importable without an installation.
"$python" -c "import benchmarks; from dwm_fast.cli import main; main()" pacs --data "$data" --splits "$splits" \
    --backbone resnet18 --weights "$weights" --image-size 128 --device cuda --out "$run" "$@" 2>&1 | tee "$out/study.log"
status=$?
echo "the study took ${SECONDS} s, exit status $status" | tee -a "$out/study.log"
cp "$run"/{results.json,config.json,table.md,report.html} "$out"/ 2>/dev/null
exit $status
