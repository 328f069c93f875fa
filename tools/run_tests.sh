#!/usr/bin/env bash
# Runs pytest, says how long it took of its budget, and stops it at three times that, or after TEST_LIMIT_S seconds:
#   tools/run_tests.sh SECONDS ARGS...
# Over the budget is a warning, because machines differ; at twice the budget something hangs or the machine is busy.
set -uo pipefail
cd "$(dirname "$0")/.."
budget_s=$1; shift
limit_s=${TEST_LIMIT_S:-$((3 * budget_s))}
started=$SECONDS
# SIGINT first: pytest then prints what it has, and its sessions end their workers.
env -u TEST_LIMIT_S timeout --foreground --signal=INT --kill-after=30 "$limit_s" .venv/bin/python -m pytest "$@"
status=$?
took_s=$((SECONDS - started))
if [ $status -eq 124 ] || [ $status -eq 137 ]; then
    echo "tests: error: stopped after $took_s s; the budget is $budget_s s" >&2
elif [ $took_s -gt "$budget_s" ]; then
    echo "tests: warning: took $took_s s, over the budget of $budget_s s" >&2
else
    echo "tests: took $took_s s of the budget of $budget_s s"
fi
exit $status
