# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := data/fashion-mnist
RUN ?= runs/fashion_mnist/quickstart
# Threads that wait for work may spin a little, not long: beside a busy neighbour that made training 12 to 19 times slower.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0
export GOMP_SPINCOUNT := 1000
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test app screenshots browser data lint

quickstart: $(VENV)/.installed data
	$(BIN)/accelerate launch --num_processes 1 distill/train.py --config configs/fashion_mnist/quickstart.yaml --output $(RUN)
	$(BIN)/python -m eval.fid --student $(RUN) --num-images 4000

app: $(VENV)/.installed-app
	$(BIN)/python -m app

screenshots: $(VENV)/.installed-dev browser
	$(BIN)/python -m app.screenshots

test: $(VENV)/.installed-dev data lint browser
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

data: $(VENV)/.installed
	$(BIN)/python -m distill.data $(DATA)

# Without a browser its tests are skipped, and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		[ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "no browser here: sudo apt-get install chromium"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); \
		else echo "error: venv is missing: sudo apt-get install python3-venv"; exit 2; fi; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-app: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt -e '.[app]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt -e '.[app,eval,data,dev]'
	@touch $@
