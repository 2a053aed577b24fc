# make demo   a tiny model learns arithmetic with GRPO and FuRA, on a CPU, in minutes
# make test   the whole test suite, the real vLLM engine included
# make soak   the tests that take minutes each: load, kills, repetition
# make lint   ruff and mypy
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test soak lint environment

environment:
	@$(PYTHON) .ci/environment.py

demo: environment
	@$(BIN)/python examples/tiny/problems.py --out runs/demo/data
	@OMP_WAIT_POLICY=passive $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		fura_rl/train_grpo.py --config configs/demo.yaml

# One thread a process: on small tensors two threads mostly wait for each other. A file's tests stay in one process,
# so that they share an engine; files keep the order of tests/conftest.py.
test: environment
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

soak: environment
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

lint: environment
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy fura_rl rewards eval
