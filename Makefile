# Everything a user or developer runs. Needs only Python >= 3.11 with pip, and make.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline

.PHONY: setup demo demo-model test test-slow test-multinode check bench schema clean

setup: .venv/ready

# torch first and alone: the pin takes the CPU build or the CUDA build, whichever the machine's index offers
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	touch $@

demo: setup
	$(ENVIRONMENT) $(BIN)/python data/demo/run_demo.py

# retrains the embedded model from nothing: about ten minutes on two cores
demo-model: setup
	$(ENVIRONMENT) PYTHONPATH=train $(BIN)/python data/demo/make_model.py data/demo/untrained
	$(ENVIRONMENT) $(BIN)/python train/supervised_finetune.py configs/demo/pretrain_argument.json --overwrite_output_dir true
	$(ENVIRONMENT) PYTHONPATH=train $(BIN)/python data/demo/keep_model.py outputs/demo_pretrain

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(ENVIRONMENT) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not multinode"

test-slow: setup
	$(ENVIRONMENT) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow and not multinode"

# two hosts on this machine; skips, and says why, where it is not root or namespaces are forbidden
test-multinode: setup
	tests/multinode/install.sh
	$(ENVIRONMENT) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m multinode tests/multinode

bench: setup
	$(ENVIRONMENT) OMP_NUM_THREADS=1 PYTHONPATH=train $(BIN)/python benchmarks/training.py
	$(ENVIRONMENT) OMP_NUM_THREADS=1 PYTHONPATH=train $(BIN)/python benchmarks/preference.py

schema: setup
	cd train && ../$(BIN)/python -m interlace.argument_schema

clean:
	rm -rf .venv outputs data/demo/files data/demo/untrained
