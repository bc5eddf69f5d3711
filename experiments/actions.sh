#!/usr/bin/env bash
# The paper's question: are actions better filled in by an inverse dynamics model (dawm_td3bc.py), generated jointly
# (joint_td3bc.py) or left out (dwm_baseline.py)? Same data, world model size, updates, agent; three agent seeds each on
# local Hopper and Walker2d data at laptop scale, and a set of eight-step rollouts of each generator for the audit.
# Two runs at a time, one thread each: about an hour and a half on two cores. A run that has finished is not made again.
# Then: python experiments/actions_table.py runs/actions docs/actions
set -eu
cd "$(dirname "$0")/.."
export python=${PYTHON:-.venv/bin/python} out=${OUT:-runs/actions} OMP_NUM_THREADS=1
mkdir -p "$out"

# run ROBOT NAME SEED SCRIPT ARGUMENTS...
run() {
  robot=$1 name=$2 seed=$3 script=$4; shift 4
  ls "$out"/local-"$robot"-medium-v0__"$name"__"$seed"__*/summary.txt >/dev/null 2>&1 && return
  "$python" "$script" --env-id "local/$robot/medium-v0" --laptop --run-dir "$out" --exp-name "$name" --seed "$seed" \
    "$@" >"$out/$robot-$name-$seed.log" 2>&1 || echo "failed: see $out/$robot-$name-$seed.log"
}
export -f run

jobs() {
  rollouts="--horizon 7 --conditioning-subsample 8 --agent-updates 1 --eval-episodes 1"
  for robot in walker2d hopper; do
    echo "$robot dawm_rollouts 0 dawm_td3bc.py $rollouts"
    echo "$robot joint_rollouts 0 joint_td3bc.py $rollouts"
  done
  echo "halfcheetah dawm_rollouts 0 dawm_td3bc.py $rollouts"
  for seed in 0 1 2; do
    for robot in walker2d hopper; do
      echo "$robot dawm_td3bc $seed dawm_td3bc.py"
      echo "$robot joint_td3bc $seed joint_td3bc.py"
      echo "$robot dwm_td3bc $seed dwm_baseline.py --agent td3bc"
    done
  done
  for seed in 0 1 2; do
    for robot in walker2d hopper; do
      echo "$robot td3bc $seed dawm_td3bc.py --synthetic-fraction 0"
    done
  done
}
jobs | xargs -P 2 -I {} bash -c 'run {}'
