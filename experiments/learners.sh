#!/usr/bin/env bash
# The README's results: every learner of the paper on local Hopper data at laptop scale, three agent seeds each, then
# DAWM-T and the horizons. World model, inverse dynamics and synthetic sets are made once and reused. Two runs at a
# time, one thread each: about an hour and a half on two cores. A run that has finished is not made again.
# Then: python experiments/table.py runs/learners
set -eu
cd "$(dirname "$0")/.."
export python=${PYTHON:-.venv/bin/python} out=${OUT:-runs/learners}
mkdir -p "$out"

# run NAME SEED SCRIPT ARGUMENTS...
run() {
  name=$1 seed=$2 script=$3; shift 3
  ls "$out"/*__"$name"__"$seed"__*/summary.txt >/dev/null 2>&1 && return
  "$python" "$script" --env-id local/hopper/medium-v0 --laptop --run-dir "$out" --exp-name "$name" --seed "$seed" \
    "$@" >"$out/$name-$seed.log" 2>&1 || echo "failed: see $out/$name-$seed.log"
}
export -f run

jobs() {
  for seed in 0 1 2; do
    echo "dawm_td3bc $seed dawm_td3bc.py"
    echo "td3bc $seed dawm_td3bc.py --synthetic-fraction 0"
    echo "dawm_iql $seed dawm_iql.py"
    echo "iql $seed dawm_iql.py --synthetic-fraction 0"
    echo "dd $seed dd_baseline.py"
    for agent in td3bc iql; do
      echo "dwm_$agent $seed dwm_baseline.py --agent $agent"
      echo "ssorl_$agent $seed ssorl_baseline.py --agent $agent"
    done
  done
  for horizon in 3 7; do
    echo "dawm_td3bc_h$horizon 0 dawm_td3bc.py --horizon $horizon"
  done
  for horizon in 1 3; do
    echo "dwm_td3bc_h$horizon 0 dwm_baseline.py --simulation-horizon $horizon"
  done
  echo "dawm_t 0 dawm_td3bc.py --horizon 7 --conditioning-subsample 8"
  echo "dwm_td3bc_rule 0 dwm_baseline.py --termination rule"
}
jobs | xargs -P 2 -I {} bash -c 'run {}'
