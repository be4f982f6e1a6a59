# Everything a person or CI runs. Each target makes its own environment from uv.lock; nothing is installed outside of
# this folder. Needs Python >= 3.11, git and make; `make e2e` also needs Go, and root for the real kubelet.

PYTHON ?= python3
# Unless PYTHON was given, all runs on the system's own Python where that will do, as it does in the image: Debian's takes
# three quarters of the time of one that was built without profile-guided optimization, which is how pyenv builds them.
SYSTEMS := $(shell /usr/bin/python3 -c 'import sys; print(sys.executable * (sys.version_info >= (3, 11)))' 2>/dev/null)
RUNS_ON := $(if $(filter file,$(origin PYTHON)),$(or $(SYSTEMS),$(PYTHON)),$(PYTHON))
UV := .uv/bin/uv
UV_VERSION := 0.13.9
ENVIRONMENT := .venv/.synced
RUN := .venv/bin
SOURCES := cotenant extender device_plugin e2e everyday examples packing scripts tests
E2E_BIN ?= $(or $(COTENANT_BIN),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cotenant/bin)

.DEFAULT_GOAL := help

.PHONY: help
help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Cotenant needs Python 3.11 or later; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)

$(ENVIRONMENT): $(UV) pyproject.toml uv.lock
	$(UV) sync --quiet --frozen --python $(RUNS_ON)
	@touch $@

.PHONY: environment
environment: $(ENVIRONMENT) ## make the Python environment alone

.PHONY: demo
demo: $(ENVIRONMENT) ## share fake GPUs between pods, without a cluster; SERVE=1 stays up
	@$(RUN)/cotenant demo $(if $(SERVE),--serve)

# A test that hangs ends its worker, as a signal did not free the one that waited in gRPC. xdist begins that test again
# in a new worker, nine times if nobody says how often.
.PHONY: test
test: lint ## lint, types, layers and all tests that need neither root nor a cluster
	$(RUN)/pytest tests --numprocesses 2 --dist loadfile --timeout 240 --timeout-method thread --max-worker-restart 2

.PHONY: lint
lint: $(ENVIRONMENT)
	$(RUN)/ruff check $(SOURCES)
	$(RUN)/ruff format --check $(SOURCES)
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/python scripts/chart-schema.py --check
	$(RUN)/python scripts/dashboard.py --check

.PHONY: format
format: $(ENVIRONMENT) ## format the code and mend what can be mended by itself
	$(RUN)/ruff format $(SOURCES)
	$(RUN)/ruff check --fix $(SOURCES)

.PHONY: binaries
binaries: ## build the real Kubernetes components and containerd from the Go module proxy, once
	e2e/build.sh $(E2E_BIN)

.PHONY: e2e
e2e: $(ENVIRONMENT) binaries ## run against the real control plane; as root against a real kubelet too
	COTENANT_BIN=$(E2E_BIN) $(RUN)/pytest e2e --timeout 600

.PHONY: everyday
everyday: $(ENVIRONMENT) ## a newcomer's way: our image, installed by kustomize and by Helm on a whole cluster; as root; WHOLE=1 with the webhook
	e2e/build.sh $(E2E_BIN) kube-apiserver kube-scheduler kubelet containerd kubectl kube-controller-manager helm cni promtool
	$(UV) sync --quiet --frozen --inexact --group browser
	COTENANT_BIN=$(E2E_BIN) COTENANT_WHOLE=$(WHOLE) $(RUN)/pytest everyday --timeout 1200

.PHONY: docs
docs: $(ENVIRONMENT) ## build the site in build/docs; warnings are errors
	$(UV) sync --quiet --frozen --inexact --group docs
	$(RUN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet -j auto docs build/docs
	@echo build/docs/index.html

.PHONY: pictures
pictures: $(ENVIRONMENT) ## take the screenshots of the web page in docs/pictures again, with Debian's Chromium
	$(UV) sync --quiet --frozen --inexact --group browser
	COTENANT_BIN=$(E2E_BIN) COTENANT_PICTURES=keep $(RUN)/pytest everyday/test_page.py

.PHONY: images
images: $(ENVIRONMENT) ## build the image for amd64 and arm64, and run both programs of each; as root, with qemu-user-static
	COTENANT_BIN=$(E2E_BIN) COTENANT_IMAGES=all $(RUN)/pytest everyday/test_image.py -s

.PHONY: generated
generated: $(ENVIRONMENT) ## write again what is made: schema of the chart, dashboard
	$(RUN)/python scripts/chart-schema.py
	$(RUN)/python scripts/dashboard.py

.PHONY: mig-storm
mig-storm: $(ENVIRONMENT) binaries ## as root: 200 MIG pods on the real kubelet, the plugin killed 10 times by NVML's calls
	COTENANT_BIN=$(E2E_BIN) COTENANT_STORM_PODS=200 COTENANT_STORM_KILLS=10 $(RUN)/pytest e2e/test_mig.py -k storm -s

.PHONY: packing
packing: $(ENVIRONMENT) ## replay the openb trace 150 times against the published results, on all cores
	$(RUN)/pytest packing --timeout 1200

OPENB ?= ../shared/data/openb/csv
.PHONY: churn
churn: $(ENVIRONMENT) ## let pods of the openb trace come and go under six policies, half an hour; goes on where it was ended
	$(RUN)/cotenant churn --nodes $(OPENB)/openb_node_list_gpu_node.csv --pods $(OPENB)/openb_pod_list_default.csv \
		$(foreach policy,priced-leftovers fgd best-fit packing binpack spread,--policy $(policy)) \
		--loads 70,80,90,95,100,110 --seeds 1-6 --hours 48 --every 8 --out bench-results/churn --plot bench-results/churn.png

.PHONY: bench
bench: $(ENVIRONMENT) binaries ## measure all that costs at 5,000 nodes, 20 minutes; ONLY= parts; writes bench-results/
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.bench $(foreach part,$(ONLY),--only $(part))

.PHONY: bench-quick
bench-quick: $(ENVIRONMENT) binaries ## measure the verbs at 5,000 nodes and Allocate alone, in five minutes
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.bench --only verbs --only allocate

.PHONY: bench-policies
bench-policies: $(ENVIRONMENT) ## measure what choosing and shadow scoring cost at 5,000 nodes, in a minute; needs nothing built
	$(RUN)/python -m e2e.bench --only policies

.PHONY: bench-short
bench-short: $(ENVIRONMENT) binaries ## run every part of the bench at small sizes, as CI does
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.bench --short

.PHONY: failover
failover: $(ENVIRONMENT) binaries ## end or freeze the extender that binds 50 times under load, as root: binds go on in 5 s? COUNT=, LAYOUT=, AT_MOST=
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.faults.failover --count $(or $(COUNT),50) --layout $(or $(LAYOUT),second-scheduler) --at-most $(or $(AT_MOST),5)

.PHONY: chaos
chaos: $(ENVIRONMENT) binaries ## have everything go wrong for 10 minutes and 100 kills, as root, and judge; FOR= seconds, KILLS=, SEED=
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.faults.chaos --seconds $(or $(FOR),600) --kills $(or $(KILLS),100) --seed $(or $(SEED),1) --stuck-after $(or $(STUCK),30)

.PHONY: node-churn
node-churn: $(ENVIRONMENT) binaries ## as root: 300 pods on the real kubelet while plugin, kubelet, containerd are killed; COUNT=, KILLS=
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.faults.node_churn --count $(or $(COUNT),300) --kills $(or $(KILLS),20) --seed $(or $(SEED),1)

.PHONY: soak
soak: $(ENVIRONMENT) binaries ## let 20 pods a second come and go for 2 hours: does memory grow, do the sums stay right? FOR=, STAND_INS=1
	COTENANT_BIN=$(E2E_BIN) $(RUN)/python -m e2e.faults.soak --seconds $(or $(FOR),7200) $(if $(STAND_INS),--stand-ins)

.PHONY: fuzz
fuzz: $(ENVIRONMENT) ## send 10,000 nearly good and bad requests to extender, webhook and device plugin
	COTENANT_FUZZ=$(or $(COUNT),1700) $(RUN)/pytest tests/extender/test_fuzz.py tests/device_plugin/test_fuzz.py

.PHONY: histories
histories: $(ENVIRONMENT) ## run 100 random histories of whole extenders and judge each, an hour; COUNT=, SEED= of the first
	COTENANT_HISTORIES=$(or $(COUNT),100) COTENANT_SEED=$(or $(SEED),0) $(RUN)/pytest tests/extender/test_histories.py --verbose

.PHONY: audit
audit: $(UV) ## ask which locked dependencies have known vulnerabilities
	@mkdir -p build
	$(UV) export --quiet --frozen --no-dev --no-emit-project --output-file build/requirements.txt
	$(UV) tool run --quiet pip-audit==2.9.0 --requirement build/requirements.txt --disable-pip --require-hashes --strict

.PHONY: sbom
sbom: $(UV) ## write what is in an image as CycloneDX to build/sbom.json
	@mkdir -p build
	$(UV) export --quiet --frozen --no-dev --preview-features sbom-export --format cyclonedx1.5 --output-file build/sbom.json

.PHONY: stubs
stubs: $(ENVIRONMENT) ## generate device_plugin/api again from its .proto files
	PATH="$(CURDIR)/.uv/bin:$$PATH" scripts/generate-stubs.sh

.PHONY: clean
clean: ## remove the environment and every cache in this folder
	rm -rf .uv .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist bench-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
