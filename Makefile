# Everything a person types here. `make` alone lists the targets.
#
#   make image PROMPT="a 3D emoji of a red apple" [STEPS=30] [SEED=1] [MODEL=emoji-256-lcm]
#   make … PYTHON=python3.12     the interpreter that makes .venv; 3.11 or newer
#   make … EXTRAS=ui,dev,parity  what is installed beside the core
#   make test PROCESSES=2        how many tests run beside each other, with one core each

PYTHON ?= python3
EXTRAS ?= ui,dev
PROCESSES ?= 2
RUN := .venv/bin/python
INSTALLED := .venv/installed-$(EXTRAS)
LAST_SHARD := data/shapes/shapes-00019.tar

# The user's words reach the shell through the environment, as they were typed: $(value) keeps make from expanding
# them, and the recipe quotes them.
override PROMPT := $(value PROMPT)
override MODEL := $(value MODEL)
override STEPS := $(value STEPS)
override SEED := $(value SEED)
export PROMPT MODEL STEPS SEED

.DEFAULT_GOAL := help
.PHONY: help image prompt-given install test test-all lint app train-shapes train-digits

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

image: prompt-given $(INSTALLED)  ## draw PROMPT="…"; the last line is the path of the PNG
	@$(RUN) scripts/txt2img.py --prompt="$$PROMPT" \
		$${MODEL:+--model="$$MODEL"} $${STEPS:+--steps="$$STEPS"} $${SEED:+--seed="$$SEED"}

prompt-given:
	@test -n "$$PROMPT" || { echo 'error: PROMPT: no prompt is given; write make image PROMPT="a red apple"' >&2; exit 2; }

install: $(INSTALLED)  ## make .venv and install into it
	@:

test: $(INSTALLED)  ## run the tests, without the slow ones
	@$(RUN) -m pytest --numprocesses $(PROCESSES) --dist worksteal

test-all: $(INSTALLED)  ## run all tests that need no GPU
	@$(RUN) -m pytest -m "not gpu"

lint: $(INSTALLED)  ## check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

app: $(INSTALLED)  ## start the web page
	@$(RUN) app.py

train-shapes: $(INSTALLED) $(LAST_SHARD)  ## train a shapes-256 from nothing, on two CPU cores
	@$(RUN) scripts/train.py all --config configs/shapes.yaml --run-dir runs/shapes

train-digits: $(INSTALLED)  ## train the pixel-space diffusion of hand-written digits
	@$(RUN) scripts/train.py all --config configs/ddpm-digits.yaml --run-dir runs/ddpm-digits

# Shards appear whole and in order; until the last one is there, the next call goes on where this one was stopped.
$(LAST_SHARD): | $(INSTALLED)
	@$(RUN) scripts/prepare_data.py --source shapes --count 40000 --resolution 256 --output data/shapes \
		--shard-size 2000 --seed 0 --resume

# Talks on stderr: stdout belongs to the results. The stamp is renewed when what is to be installed changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON): Python 3.11 or newer is needed; add for example PYTHON=python3.12' >&2; exit 5; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv >&2
	@$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]' >&2
	@case '$(EXTRAS)' in *parity*) $(RUN) -m pip install --no-deps --constraint constraints.txt k-diffusion >&2;; esac
	@touch '$@'
