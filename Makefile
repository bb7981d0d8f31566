# Everything a user or a developer runs. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
PY ?= $(call q,$(VENV)/bin/python)
SETUP ?= $(VENV)/.installed
OUT ?= runs
SEEDS ?= 0-2
VARIANT ?= sp
SEED ?= 0
FRAMEWORK ?= depgraph
NETWORK ?= vgg-slim
VARIANTS ?= base,sp,sr,random,least-resistant
CONFIG ?=
SCHEDULER ?=
RUNS ?= 1
DATA ?=
NPROC ?= 1
SETTINGS ?= 4
FLAGS ?=

# A value as one word for the shell, whatever is in it. PYTHON, PY and FLAGS are words already.
q = '$(subst ','\'',$(1))'
# What make itself would take apart, or would take for a pattern, cannot name an environment.
ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)'; give the path of one folder, without spaces)
endif
odd := $(strip $(foreach c,* ? [ ] % : ; ~ \ ' ",$(findstring $(c),$(VENV))))
ifneq ($(odd),)
$(error VENV is '$(VENV)'; give a path without $(odd))
endif
ifeq ($(strip $(OUT)),)
$(error OUT is empty; give a folder for runs)
endif
define newline


endef
torn := $(foreach v,OUT DATA CONFIG RECORDS,$(if $(findstring $(newline),$($(v))),$(v)))
ifneq ($(strip $(torn)),)
$(error $(strip $(torn)) has more than one line; give one)
endif

CONFIGS := experiments/configs
# Every framework has a configuration for digits. One for CIFAR-10, if any, is its benchmark's recipe.
FRAMEWORKS := $(patsubst %-digits.toml,%,$(notdir $(wildcard $(CONFIGS)/*-digits.toml)))
BENCHES := $(addprefix bench-,$(FRAMEWORKS))
RECORDS ?=
ran = $(shell cd -- $(call q,$(OUT)) 2>/dev/null && find . -name record.json -print -quit)
SHOWN = $(call q,$(or $(RECORDS),$(if $(ran),$(OUT),experiments/records)))
digits = $(CONFIGS)/$(1)-digits.toml
recipe = $(or $(if $(filter-out digits,$(DATA)),$(wildcard $(CONFIGS)/$(1)-cifar10.toml)),$(call digits,$(1)))

# Several processes share every batch of a benchmark; torchrun lets them find one another.
launch = $(if $(filter-out 1,$(NPROC)),torch.distributed.run --standalone --nproc-per-node $(call q,$(NPROC)) -m )

places = --out=$(call q,$(OUT)) $(if $(DATA),--data $(call q,$(DATA)))

# A comparison is small enough for two cores: all digits, or 10,000 images and a slim network.
small = $(CONFIGS)/$(FRAMEWORK)-$(if $(filter-out digits,$(DATA)),$(NETWORK),digits).toml

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-portable lint $(BENCHES) compare worker bench-overhead table table-models plots report results notebooks docs clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1|\2/' \
	  | while IFS='|' read -r name what; do printf '  %-22s %s\n' "$$name" "$$what"; done
	@for name in $(BENCHES); do \
	  printf '  %-22s %s\n' $$name 'one run: VARIANT=base|sp|sr|random|least-resistant SEED= DATA= CONFIG= NPROC='; done

setup: $(VENV)/.installed ## make the environment in .venv, once

# The versions are those of constraints.txt; the stamp is touched only when all is installed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	  sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(call q,$(VENV)/bin/python) || $(PYTHON) -m venv -- $(call q,$(VENV))
	@echo "installing into "$(call q,$(VENV))" (PyTorch is large: minutes, and about 5 GB)"
	@rm -rf -- decay_pruning.egg-info # of another release it would be found before the installed one
	@$(call q,$(VENV)/bin/python) -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[frameworks,experiments,dev]'
	@touch -- $(call q,$@)

demo: $(SETUP) ## all frameworks on digits: base, +SP and +SR over SEEDS=0-2, table and plots
	@$(PY) -m experiments compare $(if $(CONFIG),$(call q,$(CONFIG)),$(foreach f,$(FRAMEWORKS),$(call digits,$(f)))) \
	  --seeds $(call q,$(SEEDS)) $(places) $(FLAGS)

# DATA= other than digits takes the framework's recipe.
$(BENCHES): bench-%: $(SETUP)
	@$(PY) -m $(launch)experiments run $(call q,$(or $(CONFIG),$(call recipe,$*))) \
	  --variant $(call q,$(VARIANT)) --seed $(call q,$(SEED)) --resume $(places) $(FLAGS)

compare: $(SETUP) ## base, +SP, +SR and the controls: FRAMEWORK= DATA= NETWORK= SEEDS=0-4 CONFIG= SCHEDULER=
	@$(PY) -m experiments compare $(call q,$(or $(CONFIG),$(small))) \
	  --variants $(call q,$(VARIANTS)) --seeds $(call q,$(SEEDS)) $(places) \
	  $(if $(SCHEDULER),--scheduler=$(call q,$(SCHEDULER))) $(FLAGS)

worker: $(SETUP) ## carry out runs for comparisons: SCHEDULER=tcp://host:8786 RUNS=1 at a time
	@$(PY) -m distributed.cli.dask_worker $(call q,$(SCHEDULER)) --nworkers $(call q,$(RUNS)) --nthreads 1 \
	  --no-dashboard --memory-limit 0 $(FLAGS)

bench-overhead: $(SETUP) ## what attaching costs a training step, and the decay against torch-kirigami
	@$(PY) -m experiments overhead --out=$(call q,$(OUT)/overhead/overhead.json) $(FLAGS)

# Where nothing has run yet, tables and the report show the records that are kept.
table: $(SETUP) ## the table of the runs in OUT=runs, or of the kept records: RECORDS=
	@$(PY) -m experiments table --out=$(call q,$(OUT)) -- $(SHOWN)

report: $(SETUP) ## one page to look at, report.html in OUT: tables, plots, latency
	@$(PY) -m experiments report --out=$(call q,$(OUT)) -- $(SHOWN)

table-models: $(SETUP) ## which networks of torchvision and timm can be pruned; measures what is missing
	@$(PY) -m experiments breadth $(FLAGS)

plots: $(SETUP) ## the plots of all finished runs in OUT=runs
	@$(PY) -m experiments plots --out=$(call q,$(OUT))

results: $(SETUP) ## RESULTS.md and its plots, anew from the kept records
	@$(PY) -m experiments results

# The tests' many processes load the same files: they are compiled once, whatever the caller has set.
test test-portable: export PYTHONDONTWRITEBYTECODE :=

test: $(SETUP) ## all tests; FLAGS="-m 'not slow'" leaves out the slow ones
	@$(PY) -m pytest -n auto --dist worksteal $(FLAGS)

# Another processor adds numbers up in another order. These settings make this one do so, too, each
# differing from `make test` (this processor's own kernels, one thread) and from the others: the
# kernels of PyTorch, of oneDNN (convolutions) and of MKL (products of matrices), and the threads. The
# first two have none of this processor's own kernels, and one thread and two. Elsewhere than on x86
# the kernels are the processor's own.
KERNELS := \
  ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=SSE41,MKL_ENABLE_INSTRUCTIONS=SSE4_2,OMP_NUM_THREADS=1 \
  ATEN_CPU_CAPABILITY=avx2,ONEDNN_MAX_CPU_ISA=AVX2,MKL_ENABLE_INSTRUCTIONS=AVX2,OMP_NUM_THREADS=2 \
  ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=AVX2,OMP_NUM_THREADS=1 \
  OMP_NUM_THREADS=2
NUMERIC := tests/core tests/third_party tests/adapters \
  $(patsubst %,tests/experiments/test_%.py,export training)

# Tests that compare numbers with a tolerance run under each; FLAGS="-m 'not slow'" runs the others as
# well, which shows what takes for equal that is rounded in different ways.
test-portable: $(SETUP) ## the numeric tests with the kernels of other processors, and two threads: SETTINGS=4
	@for setting in $(or $(wordlist 1,$(SETTINGS),$(KERNELS)),$(error SETTINGS is '$(SETTINGS)'; give 1 to 4)); do echo "$$setting"; \
	  env OMP_WAIT_POLICY=PASSIVE DRAWN_NETWORKS=30 $$(echo $$setting | tr , ' ') \
	    $(PY) -m pytest -n auto --dist worksteal -q -m 'numeric and not slow' $(NUMERIC) $(FLAGS) \
	    || exit 1; done

notebooks: $(SETUP) ## the tutorials' notebooks anew from their scripts
	@$(PY) tutorials/make_notebooks.py

docs: $(SETUP) ## the documentation as HTML in docs/_build; a warning is an error
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@rm -rf docs/tutorials && mkdir -p docs/tutorials && cp tutorials/*.ipynb docs/tutorials/
	@$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

lint: $(SETUP) ## ruff (lint and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) .ci/typecheck.py

clean: ## remove runs, caches and the environment, and nothing else; downloads in data/ stay
	$(PYTHON) experiments/clean.py --out=$(call q,$(OUT)) --venv=$(call q,$(VENV))
