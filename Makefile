# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit lowest-client wheel lock locked audit sbom dist lowest hub-live results bench-codec bench-bits bench-faults bench-kills bench-hostile bench-signatures bench-interruptions comparisons transfer light-switch methods analysis bench-runtime compression fuzz clean
FUZZ_SECONDS ?= 120
# a process for each of two cores
PARALLEL := --numprocesses 2 --dist worksteal

# the stamp is older than pyproject.toml whenever the dependencies may have changed
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskpack needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --editable '.[train,lab,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/maskpack demo

# types on one core beside the first tests
test: lint
	$(MAKE) --jobs 2 types unit
	$(MAKE) lowest-client wheel

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# the tests of push and pull once more, with the lowest Hub client that pyproject.toml allows laid over the environment
CLIENT := .clients/lowest
# without those that call no client (local, references), contact the real Hub (live), or are about the loopback server (server, xet)
CLIENT_TESTS := $(filter-out $(patsubst %,tests/test_hub_%.py,local reference live server xet),$(wildcard tests/test_hub*.py)) \
  tests/test_hub_server.py::test_which_client_this_is
$(CLIENT)/version.txt: pyproject.toml $(VENV)/.installed
	rm -rf $(CLIENT) && mkdir -p $(CLIENT)
	$(BIN)/python -c 'import re; print(re.search(r"huggingface-hub>=([0-9.]+)", open("pyproject.toml").read())[1])' > .clients/version.txt
	$(BIN)/pip install --quiet --target $(CLIENT) "huggingface-hub==$$(cat .clients/version.txt)"
	mv .clients/version.txt $@

lowest-client: $(CLIENT)/version.txt
	MASKPACK_CLIENT=$$(cat $(CLIENT)/version.txt) PYTHONPATH=$(CLIENT) OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(CLIENT_TESTS)

# push and pull at the real Hub, in a temporary private repository of your account; needs a login
hub-live: $(VENV)/.installed
	HF_TOKEN=$$($(BIN)/python -c 'import huggingface_hub; print(huggingface_hub.get_token() or "")') MASKPACK_HUB_LIVE=1 \
	  $(BIN)/pytest tests/test_hub_live.py

wheel: $(VENV)/.installed
	rm -rf dist && $(BIN)/python -m build --quiet --no-isolation --wheel . && $(BIN)/check-wheel-contents dist

# every version and hash of the extras and of the release tools; keeps the versions that still fit (delete the file for the newest)
LOCK := requirements-dev.txt
RELEASE := .venv-release
EXTRAS := train lab dev
lock:
	test -d $(RELEASE) || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet uv
	$(RELEASE)/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command 'make lock' $(EXTRAS:%=--extra %) --group release --output-file $(LOCK) pyproject.toml

# the environment with what the lock says and nothing else; `make test` takes it then
locked:
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --require-hashes -r $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed

$(RELEASE)/.installed: pyproject.toml $(LOCK)
	test -d $(RELEASE) || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --upgrade pip
	$(RELEASE)/bin/pip install --quiet --constraint $(LOCK) --group release
	touch $@

# known vulnerabilities of what the lock names: Error 1 if there are any, Error 3 if the database cannot be asked
audit: $(RELEASE)/.installed
	$(RELEASE)/bin/python .ci/audit.py $(LOCK)

# the core and all that it needs, in the lock's versions (CycloneDX); the same lock gives the same bytes
sbom: $(RELEASE)/.installed
	mkdir -p dist
	$(RELEASE)/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --no-header --no-annotate \
	  --constraint $(LOCK) --output-file $(RELEASE)/core.txt pyproject.toml
	$(RELEASE)/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/maskpack.cdx.json $(RELEASE)/core.txt

# what a release uploads
dist: $(RELEASE)/.installed
	rm -rf dist
	$(RELEASE)/bin/python -m build --quiet --no-isolation .
	$(RELEASE)/bin/check-wheel-contents dist
	$(MAKE) sbom

# the core on the lowest versions that pyproject.toml allows
lowest:
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(d.split(",")[0].replace(">=", "==") for d in p["dependencies"]))' > .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/lowest.txt pytest pytest-timeout hypothesis
	.venv-lowest/bin/pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/test_mask.py tests/test_codecs.py tests/test_codec_payloads.py tests/test_reader.py tests/test_tensorfile.py tests/test_adapter.py \
	  tests/test_hostile.py tests/test_golden.py tests/test_apply.py tests/test_hub.py --deselect tests/test_apply.py::test_predict

# figures of docs/results.md: about two hours on 2 cores; needs MASKPACK_DATA
results: $(VENV)/.installed
	$(BIN)/python benchmarks/results.py sketch banking77
	$(BIN)/python benchmarks/results.py mnist photo --seeds 0

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

# mask bytes and rates beside general compressors, and a 7-billion-weight set: half an hour; needs MASKPACK_DATA
bench-codec: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.codecs --plot docs/codecs.png --write docs/results.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale --general runs/general-sizes.json

# every flipped bit of a base is noticed: ten minutes on one core
bench-bits: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.base_bits --write docs/reliability.md

# every request of a push and a pull goes wrong in every way, and processes race, against a loopback Hub: ten minutes

# every request of pushes and pulls goes wrong in every way, processes race, and verbs find no Hub: twenty minutes
bench-faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --write docs/reliability.md --json benchmarks/measured/faults.json

# loads, undos and switches fail at every place, and meet real signals: half an hour
bench-interruptions: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.interruptions --write docs/reliability.md --json benchmarks/measured/interruptions.json

# random attacks on signed adapters, on files and on a loopback Hub: ten minutes
bench-signatures: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.signature_attacks --write docs/reliability.md --json benchmarks/measured/signatures.json

# thousands of spoiled adapter files, and files of very many sets, parameters, tensors and classes: some minutes; Linux
bench-hostile: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.hostile --write docs/reliability.md --json benchmarks/measured/hostile.jsonl

# trainings that are killed at random moments and resumed, beside uninterrupted ones: five minutes
bench-kills: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training_kills --write docs/reliability.md --json benchmarks/measured/training-kills.json

# masks beside every alternative, cascades, ablations: about ten hours on one core; needs MASKPACK_DATA
comparisons: $(VENV)/.installed
	$(BIN)/python -m benchmarks.comparisons
	$(BIN)/python -m benchmarks.comparisons --write docs/results.md

# domain transfer between all pairs of PACS, two sources at a time: about two hours; needs MASKPACK_DATA
transfer: $(VENV)/.installed
	$(BIN)/python -m benchmarks.transfer cartoon photo & $(BIN)/python -m benchmarks.transfer art_painting sketch & wait
	$(BIN)/python -m benchmarks.transfer --write docs/results.md

# tasks that share weights, with and without gates: forty minutes on one core; needs MASKPACK_DATA
light-switch: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.light_switch
	$(BIN)/python -m benchmarks.light_switch --write docs/results.md

# methods side by side, some of the scores, budgets of bytes beside LoRA's ranks: about five hours of one core; needs MASKPACK_DATA
methods: $(VENV)/.installed
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.methods --write docs/results.md

# loading, switching, memory and training steps beside checkpoints, PEFT and dense copies, and which of ten masks: about an hour
bench-runtime: $(VENV)/.installed
	$(BIN)/python -m benchmarks.runtime
	$(BIN)/python -m benchmarks.identification
	$(BIN)/python -m benchmarks.runtime --write docs/results.md

# criticality, barriers, similarity, shuffled blocks, checkpoints: about three hours on one core; needs MASKPACK_DATA
analysis: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.analysis --write docs/results.md

# the published compression experiment, and the sizes of masks and LoRA matrices; needs MASKPACK_DATA
compression: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.compression
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lora_sizes --plot docs/mask-lora-sizes.png

# spoiled adapter files, read and given to the command line (--seed and --case repeat what it finds), then files and payloads guided by coverage if atheris is installed
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_reader --seconds $(FUZZ_SECONDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_cli --seconds $(FUZZ_SECONDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_atheris --seconds $(FUZZ_SECONDS)

clean:
	rm -rf dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
