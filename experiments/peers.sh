#!/usr/bin/env bash
# d3rlpy's TD3+BC and IQL on the data of our controls: three seeds each, two runs at a time, one thread each. First
# make peers. The lines in runs/peers/results.jsonl are what experiments/table.py RUNS_FOLDER sets beside our controls.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} peers=${PEERS:-.venv-peers/bin/python} updates=${UPDATES:-25000}
mkdir -p runs/peers
"$python" - <<'PYTHON'
import numpy as np
from common.data import load_dataset

data = load_dataset("local/hopper/medium-v0")
arrays = {name: getattr(data, name) for name in (*data.ARRAYS, "returns", "simulator", "physics")}
np.savez("runs/peers/data.npz", **arrays)
PYTHON
for algorithm in td3bc iql; do
  for seed in 0 1 2; do
    echo "$peers experiments/peers.py runs/peers/data.npz $algorithm $seed $updates"
  done
done | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c '{} 2>/dev/null' | tee runs/peers/results.jsonl
