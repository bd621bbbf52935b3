# Each target makes the environment first if it is missing. PYTHON picks the interpreter that it is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick long lint docs package sbom audit bench install

demo: install
	$(BIN)/alter demo

test: install
	$(BIN)/python -m pytest -n 3 -m "not long"

quick: install
	$(BIN)/python -m pytest -n 2 -m "not slow and not long"

# what the gate leaves out: whole sweeps, of which it runs a part
long: install
	$(BIN)/python -m pytest -n 2 -m long

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

# What the wheel was built and tested with, as CycloneDX, beside it. The tool lives in an environment of its own, which is not
# part of what it describes.
sbom: install build/tools/cyclonedx-py
	mkdir -p build/package
	build/tools/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible --of JSON \
	  -o build/package/sbom.cdx.json $(BIN)/python

# Known vulnerabilities of what constraints.txt pins, from OSV; where OSV cannot be reached there is nothing to ask.
audit:
	@if $(PYTHON) -c "import urllib.request as u; u.urlopen('https://api.osv.dev/docs', timeout=10)" 2>/dev/null; \
	  then $(MAKE) build/tools/pip-audit && build/tools/pip-audit -s osv --no-deps --disable-pip -r constraints.txt; \
	  else echo "no audit: https://api.osv.dev cannot be reached from here"; fi

build/tools/cyclonedx-py build/tools/pip-audit:
	test -x build/tools/venv/bin/python || $(PYTHON) -m venv build/tools/venv
	build/tools/venv/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1
	ln -sf venv/bin/$(@F) $@

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
