# A virtual environment of its own, what to do in it, and what to do without one on a GPU machine. `make` lists the targets.

VENV ?= .venv
-include $(VENV)/choice.mk
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
ARGS ?=
OUT ?= out/gpu-check

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check --no-compile
WORKERS := -n 2 --dist worksteal
CHOICE := $(strip $(PYTHON)|$(TORCH)|$(TRITON))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo examples test sweep matrix integrations test-integrations schedules cells static docs lint bench-check gpu-check \
	hub dist clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  ARGS=\"...\"       options of the program or of pytest, e.g. make demo ARGS=\"--steps 60\""
	@echo "  PYTHON=...       the Python to build on           now: $(PYTHON)"
	@echo "  TORCH=...        the PyTorch to install           now: $(TORCH)"
	@echo "  TRITON=...       the Triton to install where      now: $(TRITON)"
	@echo "                   torch brings none; TRITON= for none"
	@echo "  VENV=...         the virtual environment          now: $(VENV)"
	@echo
	@echo "With an NVIDIA GPU: make demo TORCH=torch. What was chosen stays until chosen otherwise or make clean."

demo: $(VENV)/demo.done ## train a character model on real English, check the kernels (examples/char_lm.py)
	@$(RUN) examples/char_lm.py $(ARGS)

examples: $(VENV)/examples.done ## four real uses, about a minute each on a CPU (docs/examples.md)
	@for name in pronounce unfolded recall new_cell; do echo "examples/$$name.py"; $(RUN) examples/$$name.py $(ARGS) || exit 1; echo; done

test: $(VENV)/test.done ## all tests, on a CPU
	@$(RUN) -m pytest $(WORKERS) $(ARGS)

sweep: $(VENV)/test.done ## what `make test` leaves out: large sweeps in Triton's interpreter, the code for other CPUs; hours
	@failed=0; \
	$(RUN) tests/instruction_sets.py $(WORKERS) $(ARGS) || failed=1; \
	$(RUN) -m pytest $(WORKERS) -m sweep $(ARGS) || failed=1; \
	exit $$failed

matrix: ## all tests with the oldest, the usual and the newest PyTorch, each in an environment of its own (tests/matrix.py)
	@$(PYTHON) tests/matrix.py $(ARGS)

integrations: ## the layers in other libraries, on a CPU (docs/integrations); two environments, as pip cannot install all in one
	@failed=0; \
	for extra in integrations integrations-hub; do \
		$(MAKE) --no-print-directory test-integrations EXTRA=$$extra VENV=$(VENV)-$$extra || failed=1; \
	done; \
	exit $$failed

test-integrations: $(VENV)/$(EXTRA).done
	@$(RUN) -m pytest tests/integrations -m "sweep or not sweep" $(ARGS)

schedules: $(VENV)/test.done ## the persistent kernels under 200 random schedules of each cell and dtype, on a CPU
	@$(RUN) tests/schedules.py $(ARGS)

cells: $(VENV)/test.done ## every cell of the library on every family of kernels against its equations, on a CPU
	@$(RUN) tests/cell_table.py $(ARGS)

static: $(VENV)/test.done ## compile every kernel for three GPUs that are not here, count, predict (docs/static.md)
	@$(RUN) -m benchmarks.static $(ARGS)

docs: $(VENV)/docs.done ## the pages and the API reference as HTML in build/docs, warnings as errors; then their examples
	@$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs $(ARGS)
	@$(RUN) -m sphinx -W --keep-going -q -b doctest docs build/doctest $(ARGS) && tail -n 8 build/doctest/output.txt
	@echo "build/docs/index.html"

lint: $(VENV)/dev.done ## ruff, pyright and the warnings of the docs
	@failed=0; \
	$(RUN) -m ruff check . || failed=1; \
	$(RUN) -m ruff format --check . || failed=1; \
	$(RUN) -m pyright --pythonpath $(RUN) || failed=1; \
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs || failed=1; \
	exit $$failed

bench-check: $(VENV)/test.done ## static counts and the cost on CPU tensors against their baselines (docs/report.md)
	@$(RUN) -m benchmarks.check $(ARGS)

# Nothing can be installed there, and nothing needs to be: the checkout is the package.
gpu-check: ## on this machine's GPU, in nine minutes: times, tuning, checks, tests; this machine's own Python, installs nothing
	@$(PYTHON) -c 'import hypothesis, pytest, torch, triton' 2>/dev/null || \
		{ echo "gpu-check installs nothing, and $(PYTHON) lacks torch, triton, pytest or hypothesis: name one that has them," \
		"make gpu-check PYTHON=..." >&2; exit 1; }
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu_check --out "$(OUT)" $(ARGS)

hub: ## the package for the kernel hub of Hugging Face, in build/hub (docs/integrations/hub.md)
	@$(PYTHON) -m release.hub $(ARGS)

dist: $(VENV)/release.done ## sdist and wheel in dist/, checked by twine, and by pyright after both kinds of install
	@$(RUN) -m release.dist

clean: ## remove the virtual environments and everything built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find benchmarks examples kernels rnnfast tests -name __pycache__ -type d -prune -exec rm -rf {} +
	for each in $(VENV) $(VENV)-integrations $(VENV)-integrations-hub; do if [ -e $$each/made-by-make ]; then rm -rf $$each; fi; done

# The environment. choice.mk keeps what was chosen, so that `make demo TORCH=torch` and then `make test` share one; another
# choice builds it anew. A .done file stands for one finished installation.
ifneq ($(CHOICE),$(INSTALLED))
$(VENV)/base.done: FORCE
endif

$(VENV)/base.done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "rnnfast needs Python 3.10 or newer; $(PYTHON) is not. Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@[ ! -e $(VENV) ] || [ -e $(VENV)/made-by-make ] || \
		{ echo "$(VENV) is there already, and not by make: remove it, or name another: make VENV=.venv-make ..." >&2; exit 1; }
	@echo "Making $(VENV) with $(TORCH): this takes a minute or more"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $(VENV)/made-by-make
	@$(PIP) $(foreach package,$(TORCH),'$(package)')
ifneq ($(strip $(TRITON)),)
	@$(RUN) -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null || \
		$(PIP) $(foreach package,$(TRITON),'$(package)')
endif
	@printf '%s\n' 'PYTHON ?= $(PYTHON)' 'TORCH ?= $(TORCH)' 'TRITON ?= $(TRITON)' 'INSTALLED := $(CHOICE)' > $(VENV)/choice.mk
	@touch $@

# pip would compile on one core. Some packages have templates that are not Python, which makes compileall fail.
$(VENV)/%.done: $(VENV)/base.done setup.py pyproject.toml
	@$(PIP) --editable '.[$*]'
	@$(RUN) -W ignore -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true
	@touch $@
