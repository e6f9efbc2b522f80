#!/usr/bin/env bash
# For a machine with a GPU: tests as a gate, the table of ways, the suite, sanitizer; each within the time that is left.
#   bash benchmarks/device.sh [--seconds 570] [--skip tests,tune,suite,sanitizer] [--only CASES] [--without CASES]
#                             [--torch-compile last|never|only]
# Runs from a bare checkout: nothing has to be installed and nothing is fetched. Rows go to ${OUT:-benchmarks/results}
# as soon as a way is timed, so a stop loses nothing; take them into a checkout with `python -m benchmarks.dev.report FILE`.
# The gate's report stays in build/gate, where a later call with --skip tests finds it. Exit status: the suite's; 2 for a
# machine or an option that is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
limit=570 skip='' cases=()
while (($#)); do
    (($# > 1)) || usage
    case $1 in
        --seconds) limit=$2; [[ $limit =~ ^[1-9][0-9]{0,4}$ ]] || usage ;;
        --skip) skip=$2; [[ $skip =~ ^(tests|tune|suite|sanitizer)(,(tests|tune|suite|sanitizer))*$ ]] || usage ;;
        --only | --without | --torch-compile) cases+=("$1" "$2") ;;
        *) usage ;;
    esac
    shift 2
done
out=${OUT:-benchmarks/results} python=${PYTHON:-python3} gate=build/gate
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
SECONDS=0

skipped() { [[ ",$skip," == *",$1,"* ]]; }
say() { printf '\n== %s (%ss of %ss)\n' "$1" "$SECONDS" "$limit"; }
# begin STEP NEEDED MOST KEPT: announces a step and sets `given`, its seconds: what is left less what is KEPT for later
# steps, at most MOST. Fails, with a word, where the step is not wanted or fewer than NEEDED are left.
begin() {
    say "$1"
    skipped "$1" && { echo "left out, as asked"; return 1; }
    given=$((limit - SECONDS - $4))
    ((given <= $3)) || given=$3
    ((given >= $2)) || { echo "left out: it needs $2 s, and $((given > 0 ? given : 0)) s are left for it"; return 1; }
}

say machine
"$python" - <<'PY' || { echo "no GPU that torch can use; nothing was measured"; exit 2; }
import platform, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count, "multiprocessors")
PY

if begin tests 60 $((limit * 45 / 100)) 0; then
    rm -rf "$gate"
    # The tests leave the GPU idle most of the time: meanwhile the candidates of the table are compiled.
    skipped tune || timeout -k 5 "$given" "$python" -m benchmarks.tune --prepare --jobs 4 >"$out/prepare.log" 2>&1 &
    timeout -k 5 "$given" "$python" -m benchmarks.dev.gate --seconds $((given - 25)) --out "$gate"
    echo "exit status $? (0 green, 1 red, 3 no pytest here)"
    cp "$gate"/gate.* "$out"/ 2>/dev/null
    wait
fi

# For the sanitizer, where there is time for it beside a suite of three minutes.
kept=10
skipped sanitizer || ((limit - SECONDS < 330)) || kept=140
suite=180
skipped suite && suite=0

# The table that the rule of ways reads: into the user's cache, for the suite below, and into $out to be shipped.
if begin tune 60 150 $((suite + kept)); then
    timeout -k 5 "$given" "$python" -m benchmarks.tune --seconds $((given - 20)) --out "$out" \
        --commit "$("$python" -m benchmarks.dev.source)" >"$out/tune.log" 2>&1
    tail -n 12 "$out/tune.log"
fi

status=0
if begin suite 40 "$limit" "$kept"; then
    if [ -f "$gate/gate.json" ]; then
        cases+=(--gate "$gate/gate.json")
    else
        echo "no report of the tests: each case is gated by its own check alone"
    fi
    timeout -k 5 "$given" "$python" -m benchmarks.dev.run --device cuda --out "$out" --seconds $((given - 30)) \
        "${cases[@]}" >"$out/suite.log" 2>&1
    status=$?
    grep -v '^\[' "$out/suite.log" | tail -n 60
fi

# Without torch's caching allocator every tensor is an allocation of its own, so a read or write past its end is seen.
if begin sanitizer 60 125 5; then
    if command -v compute-sanitizer >/dev/null; then
        check() { # check TOOL SECONDS [PART]
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
                "$python" -m benchmarks.dev.sanitize "${@:3}" >>"$out/sanitizer.log" 2>&1
            echo "$1 ${*:3}: exit status $? (0 clean, 9 errors found, 124 out of time)"
            tail -n 3 "$out/sanitizer.log"
        }
        check memcheck $((given * 3 / 5))
        check racecheck $((given * 2 / 5)) one_pass
    else
        echo "left out: there is no compute-sanitizer here"
    fi
fi

say summary
files=("$out"/*.csv)
[ -f "${files[0]}" ] && "$python" -m benchmarks.dev.report --short "${files[@]}"
exit $status
