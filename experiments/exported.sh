#!/usr/bin/env bash
# d3rlpy's TD3+BC and ours on an exported synthetic set: the same file, published hyperparameters, number of updates and
# evaluator, three seeds each, two runs at a time, one thread each. About half an hour on two cores, a quarter more if
# the synthetic set has not been made yet. First: make peers. Then: python experiments/table.py runs/exported
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} peers=${PEERS:-.venv-peers/bin/python} updates=${UPDATES:-12500}
out=runs/exported file=runs/exported/dawm.hdf5
"$peers" -c "import d3rlpy" || { echo "error: no d3rlpy in $peers; run make peers first" >&2; exit 2; }
mkdir -p "$out"
[ -e "$file" ] || "$python" dawm_td3bc.py --env-id local/hopper/medium-v0 --laptop --export-hdf5 "$file" \
  --agent-updates 1 --eval-episodes 1 --run-dir "$out/made" >"$out/made.log" 2>&1
ours="--env-id hopper-medium-v2 --data-path $file --laptop --synthetic-fraction 0 --bc-alpha 2.5"
ours="$ours --agent-updates $updates --eval-every $((updates / 10)) --run-dir $out"
for seed in 0 1 2; do
  echo "$python dawm_td3bc.py $ours --seed $seed >$out/td3bc-$seed.log 2>&1"
  echo "$peers experiments/peers.py hopper-medium-v2 td3bc $seed $updates --data-path $file" \
    ">>$out/peers.jsonl 2>>$out/peers.log"
done | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c '{}'
