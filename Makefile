# make demo: from a fresh clone to scores · make try: type to its model · make test · make interop · make bench · make clean
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

# what is installed belongs to these files: a change in them installs again
$(VENV)/demo: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

NEEDED = requirements-dev.txt requirements-export.txt requirements-serve.txt
$(VENV)/test: $(VENV)/demo $(NEEDED)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(NEEDED:%=-r %)
	touch $@

# compiles llama.cpp: some minutes
$(VENV)/interop: $(VENV)/test requirements-interop.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	touch $@

# the rows of the demo
data/demo.json: data/make_demo.py data/words.txt | $(VENV)/demo
	$(RUN) data/make_demo.py

demo: $(VENV)/demo data/demo.json
	$(RUN) prepare.py config/demo.py
	$(RUN) train.py config/demo.py
	$(RUN) sample.py config/demo.py
	$(RUN) judge.py config/demo.py
	@echo
	@echo 'Now type a sentence of your own: make try, then, say'
	@echo '  Rewrite the sentence in the passive voice. | The girl kicked the ball.'

try: $(VENV)/demo
	$(RUN) sample.py config/demo.py --interactive=True

test: $(VENV)/test data/demo.json
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n auto --dist worksteal

interop: $(VENV)/interop data/demo.json
	INTEROP=1 $(RUN) -m pytest -q -n auto tests/test_export.py tests/test_train.py::test_compile

bench: $(VENV)/test data/demo.json
	$(RUN) tests/bench.py

clean:
	rm -rf out data/*/ data/demo*.json .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

.PHONY: demo try test interop bench clean
