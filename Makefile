# Two commands do the work: `make demo` and `make test`. `make help` lists the others.
PYTHON ?= python3
TORCH ?= 2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
BENCH_ARGS ?=

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CPP := $(shell find csrc -type f -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# 1 where the headers of a CUDA toolkit are found: the emulator of the CUDA kernels needs them.
EMULATION := $(shell $(PYTHON) cmake/cuda_build.py)
# What the environment is made for: another Python, another torch or a moved folder make it stale.
WANTED := $(PYTHON), torch $(TORCH), in $(CURDIR)
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
EMULATED := $(VENV)/.emulated
SANITIZED := build/sanitized

.PHONY: help demo test lint ctest sanitize bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    set up .venv, compile, train the example (DEMO_ARGS: its options)'
	@echo 'make test    set up .venv, compile, lint, C++ tests, pytest (PYTEST_ARGS: its options, WORKERS: 2)'
	@echo 'make lint    ruff, mypy and clang-format, nothing changed'
	@echo 'make ctest   the C++ tests alone'
	@echo 'make bench   what SINGD costs on this machine (BENCH_ARGS: options of singd_ext.bench)'
	@echo 'make sanitize  a short list of emulated CUDA kernels under AddressSanitizer and UBSan'
	@echo 'make clean   remove .venv and everything that was built'
	@echo 'PYTHON=$(PYTHON) makes .venv, with torch TORCH=$(TORCH)'

demo: $(BUILT)
	python examples/mnist_cnn.py $(DEMO_ARGS)

test: lint ctest $(EMULATED)
	python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(BUILT)
	ruff check .
	ruff format --check .
	mypy singd_ext
	clang-format --dry-run -Werror $(CPP)

ctest: $(BUILT)
	cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

bench: $(BUILT)
	python -m singd_ext.bench $(BENCH_ARGS)

ifeq ($(EMULATION),1)
sanitize: $(BUILT)
	SINGD_EMULATION=1 SINGD_SANITIZE=1 python setup.py build_ext \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  SINGD_EMULATION_FOLDER=$(SANITIZED) python -m pytest -n $(WORKERS) -m short \
	  python_tests/test_emulation.py
else
sanitize:
	@echo 'No CUDA toolkit found: there are no kernels to run under sanitizers.'
endif

clean:
	rm -rf $(VENV) build *.egg-info singd_ext/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(shell cat $(CREATED) 2>/dev/null),$(WANTED))
.PHONY: $(CREATED)
endif
$(CREATED):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet 'setuptools>=77' wheel ninja 'torch==$(TORCH)'
	echo '$(WANTED)' > $@

$(INSTALLED): setup.py pyproject.toml $(CREATED)
	python -m pip install --quiet --no-build-isolation -e '.[test,demo,bench,frameworks]'
	touch $@

# pip has just compiled when $@ is missing; later, only what changed is compiled.
$(BUILT): $(CPP) csrc/sources.txt $(INSTALLED)
	if [ -e $@ ]; then python setup.py build_ext --inplace; fi
	touch $@

$(EMULATED): $(BUILT)
ifeq ($(EMULATION),1)
	SINGD_EMULATION=1 python setup.py build_ext --inplace
else
	@echo 'No CUDA toolkit found: the tests of the emulated CUDA kernels will be skipped.'
endif
	touch $@
