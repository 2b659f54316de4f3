# The user's commands. `make` alone lists them.

PROFILE ?= default
EDITION ?= reader
JOBS    ?= 2
PYTHON  ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

override VENV := .venv/bin
# Idle OpenMP threads sleep instead of spinning: two busy processes otherwise starve each other.
export OMP_WAIT_POLICY := PASSIVE

# What the user gives is no part of the commands that a shell reads: it comes by the environment. Only
# the two that are words of a command stand in it, without what would end that command. Nor does make
# itself expand anything in what it is given.
export PROFILE EDITION JOBS PYTHON
define newline


endef
refuse = $(error $(1) must not hold $(2): its words go to one command)
$(foreach name,PROFILE EDITION JOBS PYTHON PYTEST_ARGS BENCH_ARGS,\
	$(if $(findstring $$,$(value $(name))),$(call refuse,$(name),a dollar sign)))
$(foreach name,PYTEST_ARGS BENCH_ARGS,\
	$(if $(findstring $(newline),$($(name))),$(call refuse,$(name),a line break))\
	$(foreach one,; & | < > `,$(if $(findstring $(one),$($(name))),$(call refuse,$(name),'$(one)'))))

EDITIONS := reader student instructor
PROFILES := $(sort $(notdir $(basename $(wildcard notebooks/profiles/*.yaml))))
one_of = $(if $(filter-out $(3),$(2))$(filter-out 1,$(words $(2))),\
	$(error no $(1) is called '$(2)'; known: $(3)))
$(call one_of,edition,$(EDITION),$(EDITIONS))
$(call one_of,profile,$(PROFILE),$(PROFILES))

# The first Python that is new enough, or the one given as PYTHON=...
find_python = for python in "$$PYTHON" python3.11 python3 python3.12 python3.13; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "$$python"; exit; fi; done

.DEFAULT_GOAL := help
.PHONY: help venv book pdf experiments test numeric lint format bench clean distclean

help: ## list these targets
	@echo "make TARGET [PROFILE=default|smoke|paper] [EDITION=reader|student|instructor] [JOBS=2] [PYTHON=python3.11]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r name text; do printf '  %-12s %s\n' "$$name" "$$text"; done

# make_venv.py with the arguments that follow.
make_venv = python=$$($(find_python)); \
	if [ -z "$$python" ]; then \
		echo "error: no Python >= 3.11 found; install one or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi; \
	"$$python" tools/make_venv.py

venv: ## make .venv with everything installed (the other targets do it themselves)
	@$(make_venv)

book: venv ## execute the notebooks that changed and render the book
	@$(VENV)/python -m msif_lib.study.runner --profile "$$PROFILE" --jobs "$$JOBS"
	@$(VENV)/python -m msif_lib.study.book --profile "$$PROFILE" --edition "$$EDITION"

pdf: venv ## render the book and print it into one PDF, by Chromium
	@$(VENV)/python -m msif_lib.study.pages.pdf --check
	@$(MAKE) --no-print-directory book
	@$(VENV)/python -m msif_lib.study.pages.pdf --edition "$$EDITION"

experiments: venv ## execute the notebooks that changed, without rendering the book
	@$(VENV)/python -m msif_lib.study.runner --profile "$$PROFILE" --jobs "$$JOBS"

# `-m` after it overrides the one of pyproject.toml, which leaves out what is marked slow.
pytest = OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -n "$$JOBS" --dist loadgroup

test: lint ## lint, check types and run the tests (PYTEST_ARGS='-k name' to choose, '-m slow' for the slow ones)
	$(pytest) $(PYTEST_ARGS)

# The kernels that torch has for every processor round otherwise than those for AVX2 and AVX512.
numeric: venv ## repeat the tests marked numeric with torch's plainest kernels
	ATEN_CPU_CAPABILITY=default $(pytest) -m "numeric and not slow" $(PYTEST_ARGS)

lint: venv ## check style, formatting and types
	$(VENV)/ruff check --quiet .
	$(VENV)/ruff format --check --quiet .
	$(VENV)/mypy

format: venv ## put the code into the project's format
	$(VENV)/ruff check --quiet --fix .
	$(VENV)/ruff format --quiet .

bench: ## time this library and its peers, in .venv-bench (BENCH_ARGS='--help' to choose)
	@$(make_venv) --name .venv-bench --constraints benchmarks/constraints.txt \
		--requirements benchmarks/requirements.txt
	@.venv-bench/bin/python -m benchmarks $(BENCH_ARGS)

clean: ## remove everything that `make book` and `make test` made, except the environments
	rm -rf build book/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

distclean: clean ## remove the environments as well
	rm -rf .venv .venv.lock .venv-bench .venv-bench.lock
