# Needs make and Python 3.10 or newer; every target builds the environment it runs in.
PYTHON ?= python3

# Processes that share the tests out among each other.
JOBS ?= 2

# test-lowest: torch 2.1 has wheels for Python 3.8 to 3.11 alone.
LOWEST_PYTHON ?= $(PYTHON)

BIN := .venv/bin
LOWEST_BIN := .venv-lowest/bin
NEWEST_BIN := .venv-newest/bin

.PHONY: demo test test-slow fuzz test-lowest test-newest lint format bench bench-parts bench-peers gpu docs wheel clean

demo: .venv/installed  ## train on digits: plain SGD beside Jacobian descent
	$(BIN)/python examples/train_digits.py --out out/digits

test: .venv/installed  ## the tests, without the slow ones
	-$(MAKE) out/torchjd-0.11
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-slow: .venv/installed  ## the slow tests alone
	$(BIN)/python -m pytest -m slow

fuzz: .venv/installed  ## random models beyond those of the tests, and what became of them
	GRAMJD_FUZZ=$(or $(EXAMPLES),20000) $(BIN)/python -m pytest -q tests/test_fuzz.py

test-lowest: .venv-lowest/installed  ## the tests on torch 2.1.0 and numpy 1 (several GB)
	$(LOWEST_BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-newest: .venv-newest/installed  ## the tests on the newest torch (several GB)
	$(NEWEST_BIN)/python -m pytest -m "not slow" -n $(JOBS)

lint: .venv/installed  ## ruff, mypy and the vocabulary
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/vocabulary.py

format: .venv/installed  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed  ## a step beside SGD and every peer: table, pictures, README (over half an hour)
	-$(MAKE) bench-peers
	$(BIN)/python -m benchmarks

bench-parts: .venv/installed  ## what hooks, checks, the host's work, plans, weightings and ranks cost, in turn
	set -e; for name in hook_overhead check_cost first_step host_work few_losses plans weighting distributed; do $(BIN)/python -m benchmarks.$$name; done

bench-peers: out/bench/peers out/bench/jax  ## the peers that cannot share .venv, apart from it (3 GB)

# With the machine's own torch, which knows its card; .venv may hold one without CUDA.
gpu:  ## a machine with a CUDA card: equality, times, launches, in eight minutes
	$(PYTHON) -c "import optree" || $(PYTHON) -m pip install optree
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

docs: .venv/docs-installed  ## the documentation, into out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: .venv/installed  ## the package, into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-lowest .venv-newest dist out .mypy_cache .pytest_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt -e ".[docs]"
	touch $@

# The same versions of everything else, as far as torch 2.1 and numpy 1 leave them alone.
.venv-lowest/installed: pyproject.toml constraints.txt
	$(LOWEST_PYTHON) -m venv .venv-lowest
	grep -v -E "^(numpy|torch)==" constraints.txt > .venv-lowest/constraints.txt
	$(LOWEST_BIN)/python -m pip install -c .venv-lowest/constraints.txt \
		"torch==2.1.0" "numpy<2" -e ".[test]"
	touch $@

# The same versions of everything else.
.venv-newest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -v "^torch==" constraints.txt > .venv-newest/constraints.txt
	$(NEWEST_BIN)/python -m pip install -c .venv-newest/constraints.txt -e ".[dev]"
	touch $@

# The last TorchJD whose Gramians are generalized, for tests/test_migration.py, beside the one in .venv.
out/torchjd-0.11: .venv/installed
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --no-deps --target $@.part torchjd==0.11.0
	mv $@.part $@

# Without dependencies: they would bring another torch. A folder exists only if its installation succeeded.
out/bench/peers: .venv/installed benchmarks/peers.txt
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --no-deps --target $@.part -r benchmarks/peers.txt
	mv $@.part $@

# neural-tangents needs a JAX that needs an older numpy.
out/bench/jax: benchmarks/jax.txt
	rm -rf $@
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install -r benchmarks/jax.txt || (rm -rf $@; false)
