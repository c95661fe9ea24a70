# All that is needed is Python 3.11 or later (PYTHON=python3.12 to choose one) and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ONNX := .venv-onnx

.PHONY: demo demo-denoise demo-sr test test-slow test-onnx first-hour lint format bench bench-accelerator docs dist clean

demo: $(VENV)/installed
	$(RUN) experiments/main.py --config=experiments/configs/digits_resnet20.py --config.method=baseline
	$(RUN) experiments/main.py --config=experiments/configs/digits_resnet20.py

demo-denoise: $(VENV)/installed
	$(RUN) experiments/main.py --config=experiments/configs/photographs_dncnn.py --config.method=baseline
	$(RUN) experiments/main.py --config=experiments/configs/photographs_dncnn.py

demo-sr: $(VENV)/installed
	$(RUN) experiments/main.py --config=experiments/configs/photographs_edsr.py --config.method=baseline
	$(RUN) experiments/main.py --config=experiments/configs/photographs_edsr.py

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-slow: $(VENV)/installed
	$(RUN) -m pytest -m slow

test-onnx: $(ONNX)/installed
	$(ONNX)/bin/python -m pytest -m onnx

first-hour: $(VENV)/installed
	mkdir -p build
	FIRST_HOUR=$(CURDIR)/build/first_hour.txt $(RUN) -m pytest -m slow tests/documents/test_first_hour.py
	@echo "build/first_hour.txt"

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(RUN) -m basedpyright --pythonpath $(RUN)

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/installed
	$(RUN) benchmarks/run.py

bench-accelerator: $(VENV)/installed
	$(RUN) benchmarks/accelerator.py --minutes=8 --out=benchmarks/results

docs: $(VENV)/documents
	$(RUN) -m sphinx -W --keep-going --quiet -b html -c docs . build
	@echo "build/docs/index.html"

dist: $(VENV)/installed
	rm -rf build/dist
	$(RUN) -m build --outdir build/dist .
	$(RUN) -m twine check --strict build/dist/*
	@grep -q "^    Source = " setup.cfg || echo "README is without pictures and links there:" \
		"add 'Source = ADDRESS', where the tree is, to project_urls in setup.cfg"

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/documents: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# A place of its own, because jax2onnx asks for an older orbax-checkpoint; all else is the same.
$(ONNX)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ONNX)
	grep -v "^orbax-checkpoint==" constraints.txt > $(ONNX)/constraints.txt
	$(ONNX)/bin/python -m pip install --quiet --constraint $(ONNX)/constraints.txt --editable ".[dev,onnx]"
	touch $@

clean:
	rm -rf $(VENV) $(ONNX) build *.egg-info
