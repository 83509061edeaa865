# Everything a fresh machine needs: `make demo` or `make test`. Python 3.10+, a C++20 compiler, CMake and make.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test quick dev build lint sanitize test-cluster test-neon fuzz bench plots test-gpu bench-gpu clean
.DEFAULT_GOAL := build

$(VENV)/.installed: requirements.txt requirements-triton.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	$(PY) -m pip install --quiet --no-deps --requirement requirements-triton.txt
	FASTEE_BUILD=none $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

dev: build ## an editable install with native parts built in place

# In place, incremental, and one build at a time: several shells may share the tree.
build: $(VENV)/.installed
	flock .build.lock sh -c '\
	  cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DFASTEE_WERROR=$(or $(WERROR),OFF) >build.log 2>&1 \
	    || { cat build.log; exit 1; }; \
	  $(CURDIR)/$(VENV)/bin/ninja -C build -k 0 --quiet'

demo: build ## a real network, three processes, a slow link, an honest table (about 3 minutes)
	$(PY) -m fastee demo $(ARGS)

test: build lint ## everything that needs no GPU, no root, no peer
	ctest --test-dir build --output-on-failure
	$(PY) -m pytest -m "not timed" $(ARGS) || test $$? = 5  # 5: ARGS names none of these
	$(PY) -m pytest -m timed $(ARGS) -n 0 || test $$? = 5

quick: build
	$(PY) -m pytest -x -q -m "not slow and not timed" $(ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check fastee tests benchmarks tools
	$(VENV)/bin/lint-imports

sanitize: $(VENV)/.installed ## the C++ tests under ASan + UBSan, then TSan
	for p in asan tsan; do PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --preset $$p && PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build --preset $$p \
	  && ctest --test-dir build-$$p --output-on-failure || exit 1; done

test-cluster: build ## the cluster under faults: labs (namespaces as root with vde2), 10,000 tasks at 50/s under every fault, 60 s of churn (7 minutes)
	$(PY) -m pip install --quiet --requirement requirements-ray.txt
	$(PY) -m pytest tests/cluster tests/netns tests/integrations/test_ray_serve.py $(ARGS)
	$(PY) -m benchmarks run faults soak --no-save

test-neon: $(VENV)/.installed ## the C++ tests built for 64-bit ARM, run under qemu-user (apt-get install g++-aarch64-linux-gnu qemu-user)
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --preset neon && PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build --preset neon && ctest --test-dir build-neon --output-on-failure

SECONDS ?= 30
RUNS ?= -1
FUZZCXX := $(firstword $(foreach c,clang++ clang++-20 clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14,$(shell command -v $(c))))
FUZZ = mkdir -p build-fuzz/corpus/$$0 && ASAN_OPTIONS=quarantine_size_mb=8 build-fuzz/fuzz_$$0 -max_total_time=$(SECONDS) -runs=$(RUNS) -timeout=10 -max_len=1024 \
	-print_final_stats=1 -artifact_prefix=build-fuzz/ build-fuzz/corpus/$$0 >build-fuzz/$$0.log 2>&1; rc=$$?; \
	grep -E "number_of_executed_units|ERROR|SUMMARY" build-fuzz/$$0.log | sed "s/^/fuzz $$0: /"; exit $$rc
fuzz: $(VENV)/.installed ## every libFuzzer target, two at a time: SECONDS=30 each, or e.g. SECONDS=0 RUNS=5000000 (apt-get install clang-14 libclang-rt-14-dev)
ifeq ($(FUZZCXX),)
	@echo "fuzz: skipped: no clang++ found (Debian: apt-get install clang-14 libclang-rt-14-dev)"
else
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --preset fuzz -DCMAKE_CXX_COMPILER=$(FUZZCXX) && PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build --preset fuzz --target fuzzers
	ls csrc/tests/fuzz | sed -n 's/\.cc$$//p' | xargs -P 2 -n 1 sh -c '$(FUZZ)'
endif

bench: build
	$(PY) -m benchmarks run $(or $(OPS),exit_step attach scheduler) $(ARGS)

# On a machine with a GPU, with the Python that has a CUDA torch: .venv where there is one, else the system's. Built for that GPU alone.
GPU_PY := $(shell test -x $(PY) && echo $(PY) || command -v $(PYTHON))
GPU_RUN = $(GPU_PY) -m
GPU_TEST = $(GPU_RUN) pytest -q -n auto --maxprocesses 12 -p no:cacheprovider -p tests.gpu.sticky
# A part of a target: at most so many seconds, and what fails stops no other part. 124: more than that.
PART = timeout -k 5 $(1) $(2) || failed="$$failed; exit $$? of $(2)"
define ON_GPU
	@why=$$($(GPU_PY) tests/gpu/here.py 2>&1) || { echo "$@: skipped: $$why"; exit 0; }; export PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}; \
	{ cmake -S . -B build-gpu -G Ninja -DPython_EXECUTABLE=$$(command -v $(GPU_PY)) -DFASTEE_TESTS=OFF && cmake --build build-gpu; } \
	  >build-gpu.log 2>&1 || { tail -20 build-gpu.log; echo "$@: no native parts for the CPU (Cython or Python's headers missing?); libfastee_cuda alone"; \
	    { cmake -S . -B build-cuda -G Ninja -DFASTEE_PYTHON=OFF -DFASTEE_TESTS=OFF && cmake --build build-cuda --target fastee_cuda; } >build-cuda.log 2>&1 \
	    || { tail -20 build-cuda.log; echo "$@: no libfastee_cuda; Triton's kernels run without it"; }; }; \
	$(1); test -z "$$failed" || { echo "$@: failed$$failed"; exit 1; }
endef

test-gpu: ## on a GPU: every op against its definition and float64, streams, graphs, compute-sanitizer (at most 3.5 minutes and the build)
	$(call ON_GPU,$(call PART,70,$(GPU_TEST) tests/gpu -k 'not sanitizer' $(ARGS)); \
	  $(call PART,75,env FASTEE_TEST_DEVICE=cuda $(GPU_TEST) tests/ops -k 'triton or cuda' $(ARGS)); \
	  $(call PART,60,$(GPU_TEST) tests/gpu -k sanitizer $(ARGS)))

bench-gpu: ## on a GPU: rows to benchmarks/results/<gpu>.jsonl, or to RESULTS=dir (at most 4.5 minutes and the build)
	$(call ON_GPU,$(call PART,270,$(GPU_RUN) benchmarks.gpu $(if $(RESULTS),--results $(RESULTS)) $(ARGS)))

plots: build
	$(PY) -m benchmarks plot

clean:
	rm -rf build build-* fastee/*.so build.log
