# make book: build the site.  make test: everything that must hold.  Both set themselves up; make help lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 0:20
CHAPTERS ?=
JOBS ?= 2
PORT ?= 8000
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help book test lab serve regress faults bench clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1|\2/' | awk -F'|' '{printf "  %-14s %s\n", $$1, $$2}'

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or later, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or later is needed"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.book: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --progress-bar on --disable-pip-version-check -c constraints.txt -e '.[book]'
	@touch $@

$(VENV)/.test: $(VENV)/.book pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --progress-bar on --disable-pip-version-check -c constraints.txt -e '.[book,test]'
	@touch $@

book: $(VENV)/.book ## build the site from the stored notebooks into _build/html, warnings as errors
	$(BIN)/python -m kexue.book.build

test: $(VENV)/.test ## lint, types, unit and oracle tests, chapters (contract, nbval, another seed), the site in a browser
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --ignore tests/test_chapters.py tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder tests/test_chapters.py chapters \
		-p tests.nbval_plugin --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg

lab: $(VENV)/.book ## open the chapters in JupyterLab
	$(BIN)/jupyter lab chapters

serve: book ## build the site and serve it on PORT
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

regress: $(VENV)/.test ## run CHAPTERS (default all) at SEEDS; the site then shows at how many each check held
	$(BIN)/kexue regress $(CHAPTERS) --seeds $(SEEDS) --jobs $(JOBS)

faults: $(VENV)/.test ## plant each known fault in a copy and count how many the tests catch
	$(BIN)/python tests/faults.py

bench: $(VENV)/.test ## race kexue against its peers
	$(BIN)/python -m benchmarks

clean: ## remove the built site (not .venv, not reports)
	rm -rf _build
