# Everything here sets up .venv by itself and needs only Python (3.10 or newer), pip, git and make.
#
#   make demo       one prompt and seed, stock and accelerated, side by side in demo.png; a video under FPSAttention in demo.mp4
#   make demo-app   the app: pictures, video, classification and an explorer in a browser
#   make test       lint, types and the fast tests
#   make test-all   the sweeps too; the log is kept in build/test-all.log
#   make test-gpu   what an NVIDIA GPU decides; the log is kept in assets/bench/h200-tests.log
#   make test-timm  timm's own tests of models, on ours; pip fetches timm's source distribution
#   make lint       ruff and pyright alone
#   make bench-cpu  the CPU benchmark; writes assets/bench/ and the table in README.md
#   make bench-gpu  every suite against its bar, on a Hopper GPU; writes the same places
#   make docs       the documentation as a site, in build/docs
#   make pictures   pictures of the app, from a browser, in assets/images
#   make clean      what the commands above wrote, .venv included

PYTHON ?= python3
WORKERS ?= logical
NATTEN ?= 1
REPEATS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
# Workers share the cores, so a worker gets one thread; each begins with files of its own, so that what the tests of a
# file share is made once, and takes from the others when it is done. Nothing may be downloaded in a test.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -q

PROMPT := a large red circle above a small blue square on a white background
SCENE := a green triangle moves left while a red circle stays still on a white background

.PHONY: demo demo-app test test-all test-gpu test-timm lint bench-cpu bench-gpu docs pictures clean

demo: $(VENV)/installed
	$(BIN)/visionfuse generate assets/flux-micro "$(PROMPT)" --recipe gna --height 512 --width 512 --steps 20 \
	  --max-sequence-length 64 --dtype float32 --device cpu --compare --repeats $(REPEATS) --out demo.png
	$(BIN)/visionfuse generate assets/wan-micro-fps "$(SCENE)" --recipe assets/wan-micro/recipes/fps.json --height 128 --width 128 \
	  --frames 17 --steps 12 --guidance 3 --dtype float32 --device cpu --out demo.mp4

demo-app: $(VENV)/installed-demo
	$(BIN)/visionfuse demo

test: lint
	$(PYTEST) -m "not slow" --durations 15

test-all: lint
	@mkdir -p build
	( date -u +%F; git rev-parse --short HEAD; $(BIN)/visionfuse info; \
	  $(PYTEST) --durations 20; echo "exit $$?" ) 2>&1 | sed 's|$(CURDIR)/||g' > build/test-all.log; \
	  tail -n 30 build/test-all.log; tail -n 1 build/test-all.log | grep -qx "exit 0"

test-gpu: $(VENV)/installed-dev
	$(BIN)/python tests/run_on_gpu.py --log assets/bench/h200-tests.log

test-timm: $(VENV)/installed-dev
	$(BIN)/python tests/run_timm_tests.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench-cpu: $(VENV)/installed
	$(BIN)/visionfuse bench attention --device cpu --csv assets/bench/attention-cpu.csv
	$(BIN)/python -m visionfuse.bench.readme

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict --config-file assets/mkdocs.yml --site-dir $(CURDIR)/build/docs

pictures: $(VENV)/installed-dev
	$(BIN)/python tests/pictures.py assets/images

bench-gpu: $(VENV)/installed
	for suite in engine neighborhood sage; do $(BIN)/visionfuse bench $$suite --csv assets/bench/$$suite.csv; done
	$(BIN)/python -m visionfuse.bench.readme

# The virtual environment. Debian without python3-venv has pip but no ensurepip: pip then installs pip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("visionfuse needs Python 3.10 or newer, " + sys.executable + " is " + sys.version.split()[0] + ". Name another one: make PYTHON=/path/to/python3.12")'
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch, diffusers and visionfuse into $(VENV) (a few minutes, once) ..."
	@$(PIP) -e ".[video]"
	@touch $@

$(VENV)/installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch, diffusers, Gradio and visionfuse into $(VENV) (a few minutes, once) ..."
	@$(PIP) -e ".[demo]"
	@touch $(VENV)/installed $@

# NATTEN is a second oracle in the tests. With a GPU it would compile for a long time, and its tests skip
# themselves where it is missing, so that a failure here stops nothing. The same goes for Hugging Face's kernels, without
# what it checks signatures with (13 packages) and in a folder of its own, since it has the name of ours, and for Chromium, in which the app is tested: Debian's, where there is
# apt-get and the right to use it.
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch, diffusers, visionfuse and the test tools into $(VENV) (a few minutes, once) ..."
	@$(PIP) -e ".[dev]"
	@touch $(VENV)/installed
	@if [ "$(NATTEN)" = 1 ] && ! command -v nvidia-smi > /dev/null; then \
	  $(PIP) --no-build-isolation natten || echo "NATTEN did not install; its tests will be skipped."; fi
	@$(PIP) --no-deps --target $(VENV)/hub-kernels kernels || echo "kernels did not install; its test will be skipped."
	@command -v chromium > /dev/null || { command -v apt-get > /dev/null && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium > /dev/null; } 2> /dev/null || \
	  echo "Chromium did not install; the tests in a browser will be skipped."
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo.png demo.json demo.mp4
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
