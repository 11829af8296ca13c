# make demo: from a fresh clone to scores · make test · make bench · make clean
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

# what is installed belongs to these files: a change in them installs again
$(VENV)/demo: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test: $(VENV)/demo requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/demo
	$(RUN) prepare.py config/demo.py
	$(RUN) train.py config/demo.py
	$(RUN) sample.py config/demo.py
	$(RUN) judge.py config/demo.py

test: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n auto

bench: $(VENV)/test
	$(RUN) tests/bench.py

clean:
	rm -rf out data/*/ .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

.PHONY: demo test bench clean
