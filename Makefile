# make train | test | lint | format | setup | clean        (make setup TORCH=2.11.0 for another torch)
# make test-oldest                                         the tests under the oldest versions; downloads gigabytes
# make fuzz                                                inputs at random for MINUTES=5, counted; SEED=n draws them again
# make figures                                             how long files and functions are, how deep imports go
# make bench | bench-gpu                                   what is claimed, measured on the CPU; in 7 minutes on one GPU
# make bench-accumulation                                  ways to accumulate, on 2 and on 4 CPU ranks, in ten minutes

PYTHON ?= python3
TORCH  ?= $(shell sed -n 's/^TORCH = "\(.*\)".*/\1/p' setup.py)
BIN    := .venv/bin
READY  := .venv/ready-$(TORCH)
COMPILED := .venv/compiled-$(TORCH)
PEERS  := .venv/peers
OLDEST := .venv-oldest
DEMO   := demo
RANKS  ?= 2
MINUTES ?= 5
FILES  := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Tests and benchmarks start hundreds of processes, which must not compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-oldest fuzz figures bench bench-gpu setup lint format clean

# The main job, on CPU ranks where there is no GPU: the same script that runs on 8 GPUs.
train: setup $(DEMO)/model/config.json
	$(BIN)/deepspeed --num_gpus $(RANKS) launch/train.py --config launch/configs/demo.yaml

$(DEMO)/model/config.json: | setup
	$(BIN)/python launch/make_demo.py --output_dir $(DEMO)

# As many files at a time as there are cores, four at most: many a test has ranks of its own.
test: setup
	$(BIN)/python -m pytest tests $(FILES)

# Other inputs at every run, unless SEED says which; ends with a table, and with an error if any input is at fault.
fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The size of the package and its parts.
figures: setup
	$(BIN)/python -m tests.house_figures

# The oldest releases that are supported. PyPI's torch is the CUDA build, which runs on the CPU as well.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest tests $(FILES)

$(OLDEST)/ready: setup.py
	test -x $(OLDEST)/bin/python || python3.12 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade setuptools wheel
	$(OLDEST)/bin/python -m pip install --quiet torch==2.11.0 transformers==5.17.0 triton==3.6.0
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[dev,bench]"
	touch $@

# On CPU ranks: ratios of times within one run; then, two at a time, what counts bytes, or one thread's own seconds.
BESIDE_EACH_OTHER := bench-memory bench-logits bench-traffic
.PHONY: $(BESIDE_EACH_OTHER)
bench: setup $(PEERS)
	$(BIN)/python benchmarks/throughput.py --device cpu
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/offload.py --device cpu --models tiny --sequence 64
	$(MAKE) --no-print-directory --jobs 2 --output-sync $(BESIDE_EACH_OTHER)

# Ways to accumulate 8 micro-batches, which take turns.
.PHONY: bench-accumulation
bench-accumulation: setup
	$(BIN)/python benchmarks/throughput.py --device cpu --rows 40m:2x8 40m:4x8 --sequence 128 --batch 1 --large --checkpointing --methods immediate+layered --vs stash deepspeed-sgd --name accumulation --seconds 0 --timeout 1500

bench-memory:
	$(BIN)/python benchmarks/memory.py --device cpu --checkpointing on --methods deepspeed-adamw deepspeed-sgd immediate immediate+int8 stash+clip

bench-logits:
	$(BIN)/python benchmarks/logits.py

bench-traffic:
	$(BIN)/python benchmarks/traffic.py --device cpu --model tiny

# Every row that wants a GPU; says so and ends where there is none.
bench-gpu: setup $(PEERS)
	$(BIN)/python benchmarks/gpu.py

# A peer of which a few lines are measured: its dependencies stay out, and without it its rows are left out.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps "torchtune==0.6.1" && touch $@ || true

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY) $(COMPILED)

# torch first and alone, so that no other package chooses its version; by a pip that asks for lists of releases as JSON.
$(READY): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --no-compile "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev,bench]"
	rm -f .venv/ready-*
	touch $@

# Of 13,000 files to compile, those that training, planning and tests import are compiled here, before several ranks
# import them at the same time; the others when they are used.
IMPORTED := lomo_ds.train.job, lomo_ds.planner.command, deepspeed.launcher.runner, hypothesis, matplotlib.pyplot, pytest, \
    torch.utils.tensorboard, torch.testing._internal.distributed.fake_pg, transformers.models.llama.modeling_llama, \
    triton.compiler, triton.runtime.interpreter
$(COMPILED): $(READY)
	$(BIN)/python -c "import $(IMPORTED)"
	rm -f .venv/compiled-*
	touch $@

clean:
	rm -rf .venv $(OLDEST) build *.egg-info $(DEMO) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
