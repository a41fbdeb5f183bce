PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test coverage lint clean

# The stamp is newer than pyproject.toml once everything is installed.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

setup: .venv/.installed

demo: setup
	$(BIN)/ptq4vit demo --out out

# A process per core; a file stays in one, where its fixtures are made once.
test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

coverage: setup
	$(BIN)/ptq4vit coverage --out docs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info out
