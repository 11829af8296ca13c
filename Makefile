# make demo: from a fresh clone to scores · make try: type to its model · make test · make interop · make versions · make bench · make gpu · make clean
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

# what is installed belongs to these files: a change in them installs again
$(VENV)/demo: requirements.txt
	@echo 'installing requirements.txt (torch and thirteen others: 1 to 5 GB, some minutes) into $(VENV)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

# of requirements-dev.txt the tools of `make test` alone: the rest is 2 GB, and some minutes of compiling
TOOLS = pytest pytest-xdist ruff openai ollama playwright
$(VENV)/test: $(VENV)/demo requirements-extra.txt requirements-dev.txt
	$(PIP) -r requirements-extra.txt $(TOOLS) -c requirements.txt -c requirements-dev.txt
	touch $@

# compiles llama.cpp
$(VENV)/interop: $(VENV)/test
	$(PIP) -r requirements-dev.txt -c requirements.txt -c requirements-extra.txt
	touch $@

# the rows of the demo, and the model that it starts from
data/demo.json: data/make_demo.py data/start_model.py data/words.txt | $(VENV)/demo
	$(RUN) data/make_demo.py

demo: $(VENV)/demo data/demo.json
	$(RUN) prepare.py config/demo.py
	$(RUN) train.py config/demo.py
	$(RUN) sample.py config/demo.py
	$(RUN) judge.py config/demo.py
	@echo
	@echo 'Now type a sentence of your own: make try'

try: $(VENV)/demo
	@test -f out/demo/ckpt.pt || { echo 'there is no model yet: make demo (about ten minutes)'; exit 2; }
	$(RUN) sample.py config/demo.py --interactive=True

test: $(VENV)/test data/demo.json
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n auto --dist worksteal

interop: $(VENV)/interop data/demo.json
	INTEROP=1 $(RUN) -m pytest -q -n auto tests/test_export.py tests/test_clients.py
	INTEROP=1 $(RUN) -m pytest -q -m skipif tests/test_train.py  # those that make test skips

# several GB, and most of an hour
versions: $(VENV)/test data/demo.json
	VERSIONS=1 $(RUN) -m pytest -q -s tests/test_versions.py

bench: $(VENV)/test data/demo.json
	$(RUN) tests/bench.py

gpu: $(VENV)/demo
	$(RUN) tests/gpu.py

# what make wrote; runs and data sets of your own stay
clean:
	rm -rf out/demo data/demo data/demo*.json data/demo_start.* .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

.PHONY: demo try test interop versions bench gpu clean
