#!/usr/bin/env bash
# The README's results: three agent seeds of DAWM-TD3BC and of its control on local Hopper data, at laptop scale.
# About 25 minutes on two cores, two runs at a time, one thread each; then: python experiments/table.py runs/laptop
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
for seed in 0 1 2; do
  for fraction in 1 0; do
    echo "$python dawm_td3bc.py --env-id local/hopper/medium-v0 --laptop --seed $seed" \
      "--synthetic-fraction $fraction --run-dir runs/laptop"
  done
done | xargs -P 2 -I {} sh -c '{}'
