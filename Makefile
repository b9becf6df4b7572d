# Two commands: `make demo` runs the main job, `make test` the tests. Both set up all they need in .venv.
# Settings: PYTHON (interpreter), TORCH (what pip installs as torch, e.g. TORCH="torch==2.13.0 --index-url URL"),
# ESOKERN_CUDA (AUTO = the GPUs of this machine, if any; ON = all architectures; OFF), ESOKERN_CUDA_ARCHITECTURES.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := CMakeLists.txt pyproject.toml README.md \
  $(shell find csrc python esokern -type f -not -name '*.so' -not -path '*/__pycache__/*')

EMULATOR_SOURCES := $(shell find tests/emulator csrc python -type f)

.PHONY: demo test bench emulator lint format dev clean

demo: $(VENV)/.built
	@cd / && $(CURDIR)/$(BIN)/esokern demo

test: $(VENV)/.built $(VENV)/.test-deps $(VENV)/.emulator
	$(BIN)/pytest -q

# The CUDA kernels for the host, which the tests run: needs neither a GPU nor the CUDA toolkit.
emulator: $(VENV)/.emulator

bench: $(VENV)/.built $(VENV)/.test-deps
	$(BIN)/pytest bench --record
	$(BIN)/python bench/report.py

$(VENV)/.deps:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "need Python 3.10 or newer: apt-get install python3, or make PYTHON=/path/to/python3"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "need a C++ compiler: apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "need Python's venv: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
	  { echo "need Python.h: apt-get install python3-dev"; exit 1; }
	@echo "setting up $(VENV) (once): torch, build tools"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH)
	@$(PIP) install numpy safetensors tokenizers tqdm "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.25" ninja
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	@echo "building esokern"
	@$(PIP) install --no-build-isolation --no-deps .
	@touch $@

$(VENV)/.test-deps: $(VENV)/.deps
	@$(PIP) install pytest pytest-benchmark scipy pyyaml matplotlib "transformers>=5.24,<6"
	@$(PIP) install --no-deps nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
	@touch $@

$(VENV)/.emulator: $(VENV)/.deps $(EMULATOR_SOURCES)
	@echo "building the CUDA kernels for the host"
	@$(BIN)/cmake -S tests/emulator -B build/emulator -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  --log-level=WARNING
	@$(BIN)/cmake --build build/emulator
	@touch $@

$(VENV)/.dev-deps: $(VENV)/.deps
	@$(PIP) install "ruff==0.17.6" "clang-format==23.1.5"
	@touch $@

lint: $(VENV)/.dev-deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.dev-deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# In-place build for development: the module lands in esokern/, run with PYTHONPATH=. and rebuild with `make dev`.
dev:
	@cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	  -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) -DESOKERN_WERROR=ON --log-level=WARNING \
	  $(if $(ESOKERN_CUDA),-DESOKERN_CUDA=$(ESOKERN_CUDA)) \
	  $(if $(ESOKERN_CUDA_ARCHITECTURES),"-DESOKERN_CUDA_ARCHITECTURES=$(ESOKERN_CUDA_ARCHITECTURES)")
	@cmake --build build/dev
	@cp build/dev/_c*.so esokern/

clean:
	rm -rf build $(VENV) esokern/*.so
