#!/usr/bin/env bash
# For a machine with a GPU and ten minutes: tests as a gate, sanitizer, tuning, then the suite in order of importance.
#   bash benchmarks/device.sh [SECONDS] [--only sample,step ...]
# Runs from a bare checkout: nothing has to be installed and nothing is fetched. Results go to ${OUT:-benchmarks/results}
# after every case, so a stop loses nothing; take them into a checkout with `python -m benchmarks.merge FILE`.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:-570}
shift $(($# > 0 ? 1 : 0))
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
export OUT=$out PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
left() { echo $((limit - SECONDS)); }
say() { printf '\n== %s (%ss of %ss)\n' "$1" "$SECONDS" "$limit"; }

say "machine"
"$python" - 2>&1 <<'PY' | tail -n 2
import platform, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count, "multiprocessors")
PY
[ $? -eq 0 ] || { echo "no GPU that torch can use; nothing was measured"; exit 2; }

# -p benchmarks makes the mapped packages (dwm_fast.kernels and others) importable without an installation.
say "GPU tests"
timeout -s INT -k 20 $((limit * 35 / 100)) "$python" -m pytest -p benchmarks -m gpu -q \
    --continue-on-collection-errors -p no:cacheprovider --junitxml="$out/gpu-tests.xml" tests >"$out/gpu-tests.log" 2>&1
tail -n 15 "$out/gpu-tests.log"

say "compute-sanitizer"
if command -v compute-sanitizer >/dev/null && [ "$(left)" -gt 240 ]; then
    timeout -k 5 75 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m benchmarks.sanitize \
        >"$out/sanitizer.log" 2>&1
    echo "memcheck: exit status $? (0 clean, 9 errors found, 124 out of time)"
    tail -n 3 "$out/sanitizer.log"
    timeout -k 5 45 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m benchmarks.sanitize one_pass \
        >"$out/racecheck.log" 2>&1
    echo "racecheck of one-pass products: exit status $?"
    tail -n 3 "$out/racecheck.log"
else
    echo "not run: the tool is missing or time is short"
fi

# The table that the rule of ways reads: into the user's cache, for the suite below, and into $out to be shipped.
say "ways and tiles of masked products"
if [ "$(left)" -gt 200 ]; then
    timeout -k 5 110 "$python" -m benchmarks.tune --seconds "$((($(left) - 100) / 3))" --out "$out" >"$out/tune.log" 2>&1
    tail -n 12 "$out/tune.log"
else
    echo "not run: time is short"
fi

say "suite"
timeout -k 5 "$(($(left) - 10))" "$python" -m benchmarks.run --device cuda --seconds "$(($(left) - 60))" \
    --junit "$out/gpu-tests.xml" "$@" >"$out/suite.log" 2>&1
status=$?
grep -v '^\[' "$out/suite.log" | tail -n 60
say "summary"
"$python" -m benchmarks.report --short "$out"/*.csv
exit $status
