# make demo: the whole job on generated data.  make test: everything that is checked.  Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
NATIVE := setup.py $(wildcard csrc/kernels/* csrc/torch/*)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: venv demo test server server-test docs lint format bench clean

venv: $(VENV)/.native

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"vss needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; set PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja pybind11
	VSS_NATIVE=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# The extension is built against the torch that it runs with, so it comes after the packages; without a compiler or
# without CUDA the build says so and goes on.
$(VENV)/.native: $(VENV)/.packages $(NATIVE)
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

demo: venv
	$(BIN)/vss data make street $(DEMO)/street
	$(BIN)/vss run demo --out $(DEMO)/run --set data.root=$(DEMO)/street || test $$? = 3  # 3: too noisy to time, all else done
	@echo "Open $(DEMO)/run/report.html"

# Bytecode is kept where an image switches that off, too: dozens of processes would compile the same modules.
test: venv
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not server"

# A Triton server (CPU), in an environment of its own that is kept in the user's cache.
server: venv
	$(BIN)/vss serve --get-server

server-test: server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ship -m server

# The pages of docs/ as a site; a link, anchor or page that is wrong fails it. The packages come on the first call.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q
	@echo "Open build/site/index.html"

$(VENV)/.docs: $(VENV)/.packages
	$(PIP) mkdocs mkdocs-material
	@touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(wildcard csrc/*/* plugins_trt/* plugins_trt/*/*))

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(wildcard csrc/*/* plugins_trt/* plugins_trt/*/*))

bench: venv
	$(BIN)/python benchmarks/bench_ops.py --write
	$(BIN)/python benchmarks/bench_models.py --write

clean:
	rm -rf $(VENV) build *.egg-info vss/_C*.so $(DEMO) .pytest_cache .mypy_cache .ruff_cache
