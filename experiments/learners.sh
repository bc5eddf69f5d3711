#!/usr/bin/env bash
# Every learner of the paper and ours on local data at laptop scale, three agent seeds each; DAWM-T, horizons and sets
# of eight-step rollouts for experiments/audit.py with one. World models, inverse dynamics and synthetic sets are made
# once and found by all. Two runs at a time, one thread each; a run that has finished is not made again.
#   experiments/learners.sh hopper      # an hour and a half on two cores
#   experiments/learners.sh walker2d
# Then: python experiments/table.py runs/learners/hopper
set -eu
cd "$(dirname "$0")/.."
export python=${PYTHON:-.venv/bin/python} robot=${1:-hopper} OMP_NUM_THREADS=1
export out=${OUT:-runs/learners}/$robot
mkdir -p "$out"

# run NAME SEED SCRIPT ARGUMENTS...
run() {
  name=$1 seed=$2 script=$3; shift 3
  ls "$out"/*__"$name"__"$seed"__*/summary.txt >/dev/null 2>&1 && return
  "$python" -m "$script" --env-id "local/$robot/medium-v0" --laptop --run-dir "$out" --exp-name "$name" \
    --seed "$seed" "$@" >"$out/$name-$seed.log" 2>&1 || echo "failed: see $out/$name-$seed.log"
}
export -f run

jobs() {
  for seed in 0 1 2; do
    echo "dawm_td3bc $seed dawm_td3bc"
    echo "td3bc $seed dawm_td3bc --synthetic-fraction 0"
    echo "joint_td3bc $seed variants.joint_td3bc"
    echo "dawm_iql $seed dawm_iql"
    echo "iql $seed dawm_iql --synthetic-fraction 0"
    echo "dd $seed baselines.decision_diffuser"
    for agent in td3bc iql; do
      echo "dwm_$agent $seed dwm_baseline --agent $agent"
      echo "ssorl_$agent $seed baselines.ssorl --agent $agent"
    done
  done
  for horizon in 3 7; do
    echo "dawm_td3bc_h$horizon 0 dawm_td3bc --horizon $horizon"
    echo "dwm_td3bc_h$horizon 0 dwm_baseline --horizon $horizon"
  done
  echo "dawm_t 0 dawm_td3bc --horizon 7 --conditioning-subsample 8"
  rollouts="--horizon 7 --conditioning-subsample 8 --agent-updates 1 --eval-episodes 1"
  echo "dawm_rollouts 0 dawm_td3bc $rollouts"
  echo "joint_rollouts 0 variants.joint_td3bc $rollouts"
}
jobs | xargs -P 2 -I {} bash -c 'run {}'
