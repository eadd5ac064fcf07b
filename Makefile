# `make demo` and `make test` work in a fresh clone on a machine with Python 3.11 or 3.12, git and make.

VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check

# The first interpreter that the project supports.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

PROTOS := $(wildcard proto/expertmesh/v1/*.proto)
PROTOC = $(PY) -m grpc_tools.protoc -I proto --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) \
	--mypy_grpc_out=only_async:$(1) $(PROTOS)

# The working folder must not come before the installed packages (its folder `kernels` is not Hugging Face's package).
export PYTHONSAFEPATH = 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test unit security-test chaos helm-test slurm-test telemetry-test bench bench-balancer lint format gen gen-check \
	dashboards tools clean

help:
	@echo "make demo            install, start a mesh on the demo model, stream text, move an expert, kill servers, show a trace"
	@echo "make test            everything the CI runs: lint, gen-check, all tests"
	@echo "make unit            the fast tests only"
	@echo "make security-test   try to get in: certificates, keys, limits, malformed input"
	@echo "make chaos           kill, stop, add and drain servers while streams run, most of an hour; SEED=N for other victims"
	@echo "make helm-test       the Helm chart and the Dockerfiles: schemas, security scan, what they mean"
	@echo "make slurm-test      the job script of deploy/slurm on a real Slurm of several nodes on this machine"
	@echo "make telemetry-test  traces of a mesh through a collector into a trace UI, which it installs (450 MB)"
	@echo "make bench           measure serving (benchmarks/results/)"
	@echo "make bench-balancer  measure placements; EXPERTMESH_ROUTING_DATA names the folder of traces"
	@echo "make lint            ruff, mypy, buf;  make format applies ruff's changes"
	@echo "make gen             write proto/**/*_pb2* and docs/configuration.md anew;  make gen-check compares the former"
	@echo "make dashboards      write deploy/dashboards/*.json anew from their code"
	@echo "make clean           remove the virtual environment, caches and .expertmesh"

DEMO_TRACE := .expertmesh/demo.jsonl
demo: $(VENV)/.installed
	$(BIN)/expertmesh trace record --out $(DEMO_TRACE) -- $(BIN)/expertmesh up -- $(PY) demo/demo.py
	@printf '\n--- what was traced, and what a request went through whose attention server was killed\n'
	@echo "$$ expertmesh trace show $(DEMO_TRACE)"
	@$(BIN)/expertmesh trace show $(DEMO_TRACE)
	@echo "$$ expertmesh trace show $(DEMO_TRACE) --with replay"
	-@$(BIN)/expertmesh trace show $(DEMO_TRACE) --with replay
	@printf '\nA mesh of your own: .venv/bin/expertmesh up; README.md goes on from there.\n'

test: lint gen-check $(VENV)/.etcd $(VENV)/.nixl tools
	$(PY) -m expertmesh.balancer.solver.warm_up  # compiles the solver's kernels once: half a minute that no test waits for
	$(PY) -m pytest

unit: $(VENV)/.installed-dev
	$(PY) -m pytest tests/unit -m "not slow"

security-test: $(VENV)/.installed-dev
	$(PY) -m pytest -m security

SEED ?= 1
chaos: $(VENV)/.installed-dev $(VENV)/.etcd
	$(PY) -m expertmesh.balancer.solver.warm_up
	PYTHONPATH=tests $(PY) -m chaos --seed $(SEED) --json benchmarks/results/chaos.json

helm-test: $(VENV)/.installed-dev $(VENV)/tools/kubernetes/.installed $(VENV)/tools/checkov/.installed
	$(PY) -m pytest tests/integration/test_helm.py tests/integration/test_helm_network.py tests/integration/test_helm_running.py

slurm-test: $(VENV)/.installed-dev
	$(PY) -m pytest tests/integration/test_slurm.py tests/integration/slurm_requeue.py tests/unit/test_slurm.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gen: $(VENV)/.installed-dev
	$(call PROTOC,proto)
	$(PY) docs/generate_configuration.py

gen-check: $(VENV)/.installed-dev
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(call PROTOC,"$$out") \
	&& diff -r --exclude='*.proto' --exclude=__pycache__ proto/expertmesh "$$out/expertmesh" \
	|| { echo "error: generated code is not what proto/ gives: run 'make gen'"; exit 1; }

bench: $(VENV)/.installed-dev
	$(BIN)/expertmesh bench serve

bench-balancer: $(VENV)/.installed-dev
	PYTHONPATH=benchmarks $(PY) benchmarks/balancer.py
	PYTHONPATH=benchmarks $(PY) benchmarks/replica_choice.py

clean:
	rm -rf $(VENV) .expertmesh build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found: install one, or run make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints-cpu.txt
	@echo "installing into $(VENV): a minute or two, most of it torch"
	$(PIP) install --quiet -c constraints-cpu.txt -e .
	$(PY) -m expertmesh.kernels.warm_up  # compiles the CPU kernels once, so that no server's start does
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints-cpu.txt
	$(PIP) install --quiet -c constraints-cpu.txt -e '.[dev]'
	$(PY) -m expertmesh.kernels.warm_up
	@touch $@ $(VENV)/.installed

# The tests of `balancer.state: etcd` start a real one. Where there is none, Debian's is unpacked beside the tests, not
# installed; where that cannot be, they are skipped and say so.
$(VENV)/.etcd: $(VENV)/.created
	@command -v etcd >/dev/null || (cd $(VENV) && rm -rf etcd etcd-server_*.deb \
	&& { apt-get -qq download etcd-server || { apt-get -qq update && apt-get -qq download etcd-server; }; } 2>/dev/null \
	&& dpkg-deb -x etcd-server_*.deb etcd && rm etcd-server_*.deb && ln -sf ../etcd/usr/bin/etcd bin/etcd) \
	&& touch $@ || echo "no etcd here: the tests that need one will be skipped"

# Servers import NIXL, so that it cannot have an environment of its own: 59 MB, 240 MB unpacked, and it asks for torch and
# NumPy alone, which are there. Where it cannot be installed its tests are skipped and say so.
$(VENV)/.nixl: $(VENV)/.installed-dev
	@$(PIP) install --quiet --no-compile -c constraints-cpu.txt -e '.[nixl]' \
	&& touch $@ || echo "not installed: nixl: its tests will be skipped"

# Tools that tests start as processes and whose dependencies must not meet ours, each in an environment of its own:
# tests/tools/NAME.txt lists its packages. Where one cannot be installed its tests are skipped and say so.
TOOLS := $(patsubst tests/tools/%.txt,$(VENV)/tools/%/.installed,$(filter-out %/system-packages.txt %/phoenix.txt,$(wildcard tests/tools/*.txt)))
tools: $(TOOLS)

# The trace UI takes a minute to install and start, so only who asks for it gets it; from then on `make test` has it too.
telemetry-test: $(VENV)/.installed-dev $(VENV)/tools/phoenix/.installed $(VENV)/tools/rotel/.installed
	$(PY) -m pytest tests/integration/test_trace_ui.py tests/integration/test_mesh_prometheus.py tests/unit/test_dashboards.py

dashboards: $(VENV)/.installed-dev
	$(PY) deploy/dashboards/generate.py

$(VENV)/tools/%/.installed: tests/tools/%.txt $(VENV)/.created
	@$(PY) -m venv $(VENV)/tools/$* && $(VENV)/tools/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -r $< \
	&& touch $@ || echo "not installed: $*: its tests will be skipped"
