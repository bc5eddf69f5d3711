#!/usr/bin/env bash
# Our controls beside d3rlpy's TD3+BC and IQL: the same local data, published hyperparameters, number of updates and
# evaluator; five seeds of TD3+BC, three of IQL, two runs at a time, one thread each. About 75 minutes on two cores.
# First: make peers. Then: python experiments/table.py runs/peers
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} peers=${PEERS:-.venv-peers/bin/python} updates=${UPDATES:-25000}
"$peers" -c "import d3rlpy" || { echo "error: no d3rlpy in $peers; run make peers first" >&2; exit 2; }
mkdir -p runs/peers
"$python" - <<'PYTHON'
import numpy as np
from common.data import load_dataset

data = load_dataset("local/hopper/medium-v0")
arrays = {name: getattr(data, name) for name in (*data.ARRAYS, "returns", "simulator", "physics")}
np.savez("runs/peers/data.npz", **arrays)
PYTHON
ours="--env-id local/hopper/medium-v0 --laptop --synthetic-fraction 0 --agent-updates $updates"
ours="$ours --eval-every $((updates / 10)) --run-dir runs/peers"
for seed in 0 1 2 3 4; do
  echo "$python dawm_td3bc.py $ours --bc-alpha 2.5 --seed $seed >runs/peers/td3bc-$seed.log 2>&1"
  algorithms=td3bc
  if [ $seed -lt 3 ]; then
    echo "$python dawm_iql.py $ours --no-normalize-obs --seed $seed >runs/peers/iql-$seed.log 2>&1"
    algorithms="td3bc iql"
  fi
  for algorithm in $algorithms; do
    echo "$peers experiments/peers.py runs/peers/data.npz $algorithm $seed $updates" \
      ">>runs/peers/peers.jsonl 2>>runs/peers/peers.log"
  done
done | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c '{}'
