# `make help` lists what there is. Everything runs in .venv, which the first command creates. Nothing here needs a GPU.

VENV ?= .venv
BIN := $(VENV)/bin/python

# The first Python that runs and is new enough; `make demo PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for python in python3.12 python3.11 python3 python; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$python; break; fi; done)

# A Python asked for by name must be the one that runs.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)),)
version = $(shell "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)))
$(error $(VENV) holds Python $(call version,$(BIN)), not $(call version,$(PYTHON)): name another folder with VENV=.venv-other, or delete it)
endif
endif
endif

# What an installation depends on. The extension is compiled by the installation, beside its source.
SOURCES := pyproject.toml setup.py $(wildcard reference/nn/*.pyx reference/nn/*.pxd reference/nn/*.h)

RUN := runs/demo
PICTURES := predictions

# Two processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN) -m pytest -n 2 --dist loadgroup

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test explore sanitize schedules kills test-gpu mutants lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

# A finished training is not repeated. Status 3: finished, but not as good as its recipe promises, which it says itself.
demo: $(VENV)/installed-demo  ## install, train a small DPT on rendered scenes, predict two photographs with it
	$(BIN) -m accelerated.train || test $$? -eq 3
	@photographs="$$($(BIN) -c 'import sklearn.datasets, pathlib; print(pathlib.Path(sklearn.datasets.__file__).parent / "images")')" \
	&& $(BIN) -m accelerated.predict "$$photographs/china.jpg" "$$photographs/flower.jpg" --weights $(RUN)/weights.safetensors --output $(PICTURES)
	@echo
	@echo "The depth of two photographs is in $(PICTURES)/; how the model learned is in $(RUN)/."

test: $(VENV)/installed-tests  ## install, then run all tests
	$(PYTEST)

explore: $(VENV)/installed-tests  ## all tests with many random examples: an hour of looking for what the others miss
	$(PYTEST) --hypothesis-profile=explore

# A copy of the package, so that the checkout's own extension stays as it is. Python itself is not instrumented: the sanitizers'
# library is loaded before it, and leaks, of which an interpreter has many that are none, are not looked for.
SANITIZED := build/sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
SANITIZED_TESTS := $(addprefix tests/test_,$(addsuffix .py,nn_attention nn_conv2d nn_gelu nn_linear_softmax nn_matmul nn_memory nn_norms nn_pooling nn_resize nn_selection))

sanitize: $(VENV)/installed-tests  ## the compiled twins and their tests under the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r reference tests pyproject.toml setup.py README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/reference/nn/*.so
	cd $(SANITIZED) && CC="$(CC) $(SANITIZE)" $(abspath $(BIN)) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(abspath $(BIN)) -m pytest --quiet -p no:cacheprovider $(SANITIZED_TESTS)

schedules: $(VENV)/installed-tests  ## every rung of every kernel under fifty orders of its threads, and watched for races
	$(PYTEST) tests/test_kernels_schedules.py --hypothesis-profile=schedules

kills: $(VENV)/installed-tests  ## a training killed at twenty random moments, which must end with the same bits
	KILLS=20 $(PYTEST) tests/test_resume.py -k killed

# By the machine's own Python, in which torch and CuPy match its driver, and without network.
GPU_PYTHON ?= python3
GPU_RESULTS := runs/gpu

test-gpu:  ## on a machine with a GPU, by its own Python: every test that needs one, and the kernels' benchmark, into runs/gpu
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m tests.gpu --output $(GPU_RESULTS)

# MUTANTS passes options on: `make mutants MUTANTS="--survivors --module reference/optim.py"`; `--help` lists them.
mutants: $(VENV)/installed-mutants  ## change the reference in hundreds of places, one at a time, and see that its tests notice
	$(BIN) -m tests.mutants.run $(MUTANTS)

lint: $(VENV)/installed-dev  ## check style and types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: $(VENV)/installed-dev  ## rewrite the code in the one style, and fix what can be fixed safely
	$(BIN) -m ruff format .
	$(BIN) -m ruff check --fix .

clean:  ## delete what was built and cached; what was trained and rendered stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f reference/nn/*.so reference/nn/*.c reference/nn/*.cpp

# Each stamp says that its extras are installed as the sources now ask. A failed installation leaves none. One set of extras holds
# the next, so the larger leaves the smaller's stamp too.
$(VENV)/installed-demo: EXTRAS := demo
$(VENV)/installed-demo: STAMPS := demo
$(VENV)/installed-tests: EXTRAS := tests
$(VENV)/installed-tests: STAMPS := demo tests
$(VENV)/installed-dev: EXTRAS := tests,dev
$(VENV)/installed-dev: STAMPS := demo tests dev
$(VENV)/installed-mutants: EXTRAS := tests,dev,mutants
$(VENV)/installed-mutants: STAMPS := demo tests dev mutants

$(VENV)/installed-%: $(SOURCES)
	@rm -f $(VENV)/installed-*
	@$(BIN) -m pip --version >/dev/null 2>&1 || { $(call require_python) && "$(PYTHON)" -m venv --clear $(VENV); }
	$(BIN) -m pip install --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@for stamp in $(STAMPS); do echo "$(EXTRAS)" >$(VENV)/installed-$$stamp; done

# One sentence for each thing that a fresh machine may lack.
define require_python
$(call require,test -n "$(PYTHON)",no Python 3.11 or newer was found: install one$(comma) or name it with PYTHON=/path/to/python) && \
$(call require,"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3$(comma) 11))',$(PYTHON) does not run$(comma) or is older than Python 3.11) && \
$(call require,"$(PYTHON)" -c 'import ensurepip$(comma) venv',$(PYTHON) cannot create virtual environments: install its venv package (Debian and Ubuntu: python3-venv)) && \
$(call require,"$(PYTHON)" -c 'import pathlib$(comma) sys$(comma) sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include")$(comma) "Python.h").exists())',$(PYTHON) has no header files: install them (Debian and Ubuntu: python3-dev)) && \
$(call require,command -v cc || command -v gcc || command -v clang,no C compiler was found: install one (Debian and Ubuntu: build-essential))
endef
require = { { $1; } >/dev/null 2>&1 || { echo "make: $2." >&2; exit 1; }; }
comma := ,
