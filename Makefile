# make train | test | test-all | test-amx | test-torch-2.11 | test-torch-2.13 | check | lint | docs | format | build |
# wheels | clean
#
# Every target makes what it needs first: the environment in VENV, then the package with its native library.

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
PYTEST_ARGS ?=

# A file's tests stay in one process, which shares what the first of them made.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile

# One architecture keeps the build short; its PTX runs on newer GPUs as well. `pip install .` builds for more.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX

# Threads that wait by spinning stand in each other's way when other programs want the same few cores.
export OMP_WAIT_POLICY ?= PASSIVE

# Names an environment by what is in it. Also for use on the command line: make test VENV='/some/where/$(KEY)'
KEY := $(shell { $(PYTHON) -VV; cat $(REQUIREMENTS); } | sha256sum | cut -c1-12)

BIN = $(abspath $(VENV))/bin
PY = $(BIN)/python
INSTALLED = $(VENV)/.requirements-$(KEY)
BUILT = build/.installed
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES = CMakeLists.txt setup.py pyproject.toml bioplaus_kernels/_sources.py bioplaus_kernels/_version.py $(CSRC)

# A build belongs to one environment and one set of switches, which CMake remembers: for others start anew.
STATE = $(strip $(abspath $(VENV)) $(KEY) $(TORCH_CUDA_ARCH_LIST) $(BK_CUDA))
ifneq ($(shell cat $(BUILT) 2>/dev/null),$(STATE))
ANEW = rm -rf build
STALE = FORCE
endif
# An environment shared between checkouts holds the editable install of one of them.
ifneq ($(shell cat $(VENV)/.checkout 2>/dev/null),$(CURDIR))
STALE = FORCE
endif

.PHONY: train test test-all test-amx test-installed check lint docs site format build wheels clean FORCE

train: build
	$(PY) -m recipes run recipes/experiments/digits.toml

test: lint
	$(PY) -m pytest $(PARALLEL) -m "not exhaustive" $(PYTEST_ARGS)

# Every configuration of every GPU kernel as well, and the fast tests on an older torch.
test-all: lint
	$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)
	$(MAKE) test-amx test-torch-2.11

# The kernels of level AMX where the processor has AVX512_VNNI only: a build of its own with the tile instructions in C++.
FILES_AMX = $(addprefix python_tests/test_,conv_backward_weight.py feedback_conv.py feedback_mm_cpu.py lc_cpu.py pointwise.py)
test-amx: $(INSTALLED)
	rm -rf build/amx && mkdir -p build/amx
	cp -r CMakeLists.txt README.md setup.py pyproject.toml csrc bioplaus_kernels python_tests build/amx
	cd build/amx && find . -name '*.so' -delete && \
	  CXXFLAGS=-DBK_EMULATED_AMX BK_CUDA=0 PATH="$(BIN):$$PATH" $(PY) setup.py build_ext --inplace && \
	  PYTHONPATH=. $(PY) -m pytest $(FILES_AMX) $(PYTEST_ARGS)

# On another torch: what requirements-torch-%.txt names, in an environment beside VENV.
PYTHON_2.11 ?= python3.12
test-torch-2.11: export PYENV_VERSION ?= 3.12
FILES_2.13 = $(addprefix python_tests/test_,build.py feedback_mm.py import.py layers.py)
test-torch-%:
	@$(or $(PYTHON_$*),$(PYTHON)) -c "" 2>/dev/null || \
	  { echo "$@: $(or $(PYTHON_$*),$(PYTHON)) does not run; set PYTHON_$* to an interpreter"; exit 1; }
	$(MAKE) test-installed PYTHON=$(or $(PYTHON_$*),$(PYTHON)) VENV=$(VENV)-torch-$* \
	  REQUIREMENTS=requirements-torch-$*.txt FILES="$(FILES_$*)"

# As a user has it: installed, and not the checkout that the tests lie in.
test-installed: $(INSTALLED)
	rm -rf build/lib* build/site-packages
	PATH="$(BIN):$$PATH" $(PY) -m pip install --no-build-isolation --no-deps --target build/site-packages .
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/site-packages:$(CURDIR)" \
	  $(PY) -m pytest -m "not slow and not exhaustive" $(FILES) $(PYTEST_ARGS)

check: lint
	$(PY) -m pytest $(PARALLEL) -m "not slow and not exhaustive" $(PYTEST_ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude '*.md' .
	$(BIN)/mypy bioplaus_kernels
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

# The site, into build/site: by what requirements-docs.txt names, in an environment beside VENV. A dead link is an error
# (with mkdocs' --quiet it is not).
docs:
	$(MAKE) site VENV=$(VENV)-docs REQUIREMENTS=requirements-docs.txt

site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "$(CURDIR)/build/site/index.html"

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format --exclude '*.md' .
	$(BIN)/clang-format -i $(CSRC)

build: $(BUILT)

$(BUILT): $(INSTALLED) $(SOURCES) $(STALE)
	$(ANEW)
	PATH="$(BIN):$$PATH" $(PY) -m pip install --no-build-isolation --no-deps --editable .
	@cd / && $(PY) -m bioplaus_kernels
	@mkdir -p $(@D)
	@echo "$(CURDIR)" > $(VENV)/.checkout
	@echo "$(STATE)" > $@

$(INSTALLED):
	PYTHON="$(PYTHON)" scripts/install_debian_packages.sh
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --requirement $(REQUIREMENTS)
	@rm -f $(VENV)/.requirements-*
	@touch $@

wheels: $(INSTALLED)
	$(PY) -m pip install --requirement requirements-wheels.txt
	PYTHON="$(PY)" scripts/wheels.sh

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find bioplaus_kernels -name '*.so' -delete
