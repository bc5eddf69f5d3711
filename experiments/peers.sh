#!/usr/bin/env bash
# Our controls beside d3rlpy's TD3+BC and IQL on one file in D4RL's layout, local Hopper data if none is given: published
# hyperparameters, the same number of updates and the same evaluator; three seeds each, two runs at a time, one thread
# each. An hour on two cores.
#   make peers && experiments/peers.sh
#   make peers && OUT=runs/exported ALGORITHMS=td3bc experiments/peers.sh FILE    # FILE of python -m common.export
# Then: python experiments/table.py runs/peers
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} peers=${PEERS:-.venv-peers/bin/python} updates=${UPDATES:-25000}
out=${OUT:-runs/peers}
file=${1:-$out/data.hdf5}
"$peers" -c "import d3rlpy" || { echo "error: no d3rlpy in $peers; run make peers first" >&2; exit 2; }
mkdir -p "$out"
[ -e "$file" ] || PYTHONPATH=. "$python" - "$file" <<'PYTHON'
import sys

import h5py
import numpy as np

from common.data import load_dataset

data = load_dataset("local/hopper/medium-v0")
timeouts = np.zeros(len(data.reward), bool)
timeouts[data.last] = ~data.terminated[data.last]
with h5py.File(sys.argv[1], "w") as file:
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    for name, key in (names | {"terminated": "terminals"}).items():
        file[key] = getattr(data, name)
    file["timeouts"] = timeouts
PYTHON
for seed in ${SEEDS:-0 1 2}; do
  for algorithm in ${ALGORITHMS:-td3bc iql}; do
    published="--agent-lr 3e-4 --tau 0.005"
    if [ "$algorithm" = iql ]; then published="$published --no-normalize-obs"; fi
    echo "$python dawm_$algorithm.py --env-id hopper-medium-v2 --data-path $file --laptop --synthetic-fraction 0" \
      "$published --agent-updates $updates --eval-every $((updates / 10)) --run-dir $out --seed $seed" \
      ">$out/$algorithm-$seed.log 2>&1"
    echo "$peers experiments/peers.py $file $algorithm $seed $updates >>$out/peers.jsonl 2>>$out/peers.log"
  done
done | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c '{}'
