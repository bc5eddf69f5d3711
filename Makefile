# make demo   install, make local data, run DAWM-TD3BC with half of the laptop's updates, print the score beside the
#             data's mean and the controls, on a set where there is something to gain
# make test   install, lint, test
# make test-faults  kills, damage and full disks, as often as docs/reliability.md states; half an hour
# make walkthrough  make and execute docs/walkthrough.ipynb; two minutes
# make peers  install d3rlpy into an environment of its own, for experiments/peers.sh and benchmarks/speed.py
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults walkthrough peers clean

demo: $(VENV)/.run-installed
	$(BIN)/python dawm_td3bc.py --env-id local/walker2d/medium-replay-v0 --laptop --world-model-steps 5000 \
		--agent-updates 25000 --eval-every 2500

test: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-faults: $(VENV)/.dev-installed
	$(BIN)/python -m pytest tests/faults --full

walkthrough: $(VENV)/.dev-installed
	$(BIN)/python -c "from common.data import load_dataset; load_dataset('local/hopper/medium-v0')"
	$(BIN)/jupytext --update --to ipynb docs/walkthrough.py
	$(BIN)/jupyter-execute --inplace docs/walkthrough.ipynb

# d3rlpy pins gymnasium 1.0.0, so it cannot share our environment.
peers: .venv-peers/bin/python
	.venv-peers/bin/python -m pip install --disable-pip-version-check -r requirements-peers.txt

%/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, 3.12 or 3.13, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: $$($(PYTHON) --version 2>&1) is not supported; needs 3.11 to 3.13: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments (no venv or ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $*

$(VENV)/.run-installed: requirements.txt $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt requirements.txt $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.run-installed

clean:
	rm -rf $(VENV) .venv-peers
