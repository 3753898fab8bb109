# Every target does its own set-up in .venv; a second run starts at once. Paths are relative, so that a checkout in a
# folder with spaces works.
PYTHON = .venv/bin/python

.PHONY: demo test clients coverage lint docs wheel peers setup clean

demo: setup
	@.venv/bin/mlx-mtp demo

test:
	@bash tools/setup.sh dev
	@$(PYTHON) -m pytest -q -n 2 --dist worksteal

# Other people's clients against the server, each with its own libraries in build/clients; JavaScript's where there is npm.
clients:
	@bash tools/setup.sh dev
	@bash tools/clients.sh
	@$(PYTHON) -m pytest -q tests/test_clients.py

# Lines that the tests run, by file, commands in processes of their own included; fails below 90 % in all or 80 % a file.
coverage:
	@bash tools/setup.sh dev
	@$(PYTHON) -m pytest -q -n 2 --dist worksteal --cov --cov-report json:build/coverage.json --cov-report ""
	@$(PYTHON) tools/check_coverage.py build/coverage.json

lint:
	@bash tools/setup.sh dev
	@$(PYTHON) -m ruff check .
	@.venv/bin/lint-imports --no-cache --no-logo
	@$(PYTHON) -m mypy
	@$(PYTHON) -m mypy cli

# The pages of docs/ into build/docs, with a Python reference made from the docstrings; dead links, and tables that no longer say what benchmarks/results holds, fail.
docs:
	@bash tools/setup.sh dev
	@$(PYTHON) benchmarks/tables.py --check
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

# Wheel and sdist into dist/, with their contents checked and the wheel run outside the checkout.
wheel:
	@bash tools/setup.sh dev
	@$(PYTHON) tools/check_wheel.py --out dist

# Other engines (torch, transformers, mlx-vlm) into the same .venv, for the parity tests.
peers:
	@bash tools/setup.sh peers

setup:
	@bash tools/setup.sh

# Back to a fresh clone, but for runs/ (what was trained).
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
