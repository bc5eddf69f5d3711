#!/usr/bin/env bash
# The README's comparison of state units and prediction targets: 3,000 updates of the world model each, then its error
# on held-out windows; inverse dynamics and agent are cut to nothing. About 5 minutes on two cores.
# Then: python experiments/table.py runs/world_model
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
for prediction in noise x0; do
  for normalizer in limits gaussian cdf; do
    echo "$python dawm_td3bc.py --env-id local/hopper/medium-v0 --laptop --prediction $prediction" \
      "--normalizer $normalizer --world-model-steps 3000 --exp-name $prediction-$normalizer --run-dir runs/world_model" \
      "--idm-steps 1 --conditioning-subsample 1000 --agent-updates 1 --eval-episodes 1"
  done
done | xargs -P 2 -I {} sh -c '{}'
