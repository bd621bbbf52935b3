# Each target makes the environment first if it is missing. PYTHON picks the interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint docs package bench install

demo: install
	$(BIN)/alter demo

test: install
	$(BIN)/python -m pytest -n 2

quick: install
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning, a link or an anchor that leads nowhere, and a page outside the navigation are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheel and sdist, built without the network, and the wheel tried in an environment of its own beside ours.
package: install
	rm -rf build/package && mkdir -p build/package
	$(BIN)/python -m build --no-isolation --outdir build/package . > build/package/log || (cat build/package/log; exit 1)
	$(BIN)/python -m venv --without-pip build/package/venv
	$(BIN)/python -m pip --python build/package/venv/bin/python install --quiet --no-deps --no-index build/package/*.whl
	echo "$(CURDIR)/.venv/lib/$$($(BIN)/python -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')/site-packages" \
	  > $$(build/package/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth
	cd build/package && venv/bin/alter --version && venv/bin/alter unlearn --help > /dev/null && \
	  venv/bin/python -c "import alter, alter.demo; assert 'package/venv' in alter.__file__, alter.__file__; assert alter.demo.RECIPE.is_file()"

# With a GPU: benchmarks/step.py --shape 8b --device cuda --dtype bfloat16 (and 1b). The others are benchmarks/decode.py,
# loss.py, evaluation.py --rows 100, requests.py ten|kills, serve.py --adapter FOLDER; each has a --help.
bench: install
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py growth
	$(BIN)/python benchmarks/plot.py

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
