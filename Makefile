# Each target is a plain sequence of commands that you can also type yourself:
# `make -n TARGET` prints it, `make help` lists them. The versions and their
# reasons are in setup.cfg.

PYTHON ?= python3

# openmmlab: mmengine, mmcv, mmdet and mmsegmentation; onedl: their maintained
# forks. Each stack has an environment of its own.
STACK ?= openmmlab
VENV := $(if $(filter onedl,$(STACK)),.venv-onedl,.venv)
EXTRA := $(if $(filter onedl,$(STACK)),onedl,mm)
MMCV := $(if $(filter onedl,$(STACK)),onedl-mmcv,mmcv)

# What pip installs as torch. Choose a build for another machine once, with
# TORCH='torch==VERSION+BUILD --index-url URL'; later calls keep it.
CHOSEN := $(or $(shell cat $(VENV)/torch 2>/dev/null),torch==2.13.0)
TORCH ?= $(CHOSEN)

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := $(VENV)/ready
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile
DETECTOR := configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py
DETECTED := work_dirs/demo/detector
SEGMENTOR := configs/shapes/upernet-carafe_r18_shapes.py
SEGMENTED := work_dirs/demo/segmentor

.PHONY: help setup demo test test-fast lint docs sanitize wheel

help:  ## Print this list.
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## Install everything that is needed into .venv, once.

demo: $(READY) data/shapes  ## Train and test a detector and a segmentor.
	$(call TRAIN_AND_TEST,$(DETECTOR),$(DETECTED))
	$(call TRAIN_AND_TEST,$(SEGMENTOR),$(SEGMENTED),\
		--cfg-options load_from="$$(cat $(DETECTED)/last_checkpoint)")
	@$(BIN)/python tools/analysis/summarize.py $(DETECTED)
	@$(BIN)/python tools/analysis/summarize.py $(SEGMENTED)
	@echo 'Look at $(DETECTED).png and $(SEGMENTED).png'

define TRAIN_AND_TEST
$(BIN)/python tools/train.py $(1) --work-dir $(2) $(3)
$(BIN)/python tools/test.py $(1) "$$(cat $(2)/last_checkpoint)" \
	--work-dir $(2) --show-dir pictures
$(BIN)/python tools/analysis/contact_sheet.py $(1) \
	"$$(cat $(2)/last_checkpoint)" --out $(2).png
endef

test: $(READY)  ## Run the tests, JOBS files at a time.
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: $(READY)  ## Run only the files of tests that take seconds.
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

lint: $(READY)  ## Check style and format of Python and C++.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror mmcarafe/ops/cpu.cpp

docs: $(READY)  ## Write the tables of README.md and docs/ anew.
	$(BIN)/python tools/update_docs.py

# The CPU library's tests under AddressSanitizer and UBSan. `pytest`, because
# `python -m pytest` would find the libraries of this checkout first.
sanitize: $(READY)  ## Run the CPU library's tests under AddressSanitizer.
	CFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined' \
		$(BIN)/python setup.py -q build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) \
$$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize/lib $(BIN)/pytest \
		tests/test_ops_cpu.py -k 'not install and not report'

# One wheel for every Python and torch, and one without the CPU library for
# other platforms, both from the sdist. auditwheel refuses what a system of
# that age lacks, and names the wheel so.
wheel: $(READY)  ## Build the wheels and the sdist into dist.
	rm -rf build/wheel dist
	$(BIN)/python -m build --no-isolation --sdist
	MMCARAFE_WITH_OPS=1 $(WHEEL) -w build/wheel dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --only-plat \
		--plat manylinux_2_28_$$(uname -m) -w dist build/wheel/*.whl
	MMCARAFE_WITH_OPS=0 $(WHEEL) -w dist dist/*.tar.gz

WHEEL = $(PIP) --no-cache-dir wheel --no-deps --no-index --no-build-isolation

data/shapes: tools/dataset_converters/shapes.py | $(READY)
	rm -rf $@
	$(BIN)/python tools/dataset_converters/shapes.py $@

# The set-up runs again when a version changes or another torch is chosen.
ifneq ($(TORCH),$(CHOSEN))
.PHONY: $(READY)
endif

ifeq ($(filter openmmlab onedl,$(STACK)),)
$(error STACK is $(STACK), expected openmmlab or onedl)
endif

$(READY): setup.cfg setup.py mmcarafe/ops/cpu.cpp Makefile
	@$(CHECK_MACHINE)
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	@test '$(TORCH)' = '$(CHOSEN)' || echo '$(TORCH)' >$(VENV)/torch
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[$(EXTRA)-build]'
	@$(MMCV_IS_BUILT) || $(SAY_HOW_LONG)
	$(INSTALL_ALL)
	@$(MMCV_RUNS) || { $(SAY_HOW_LONG); $(PIP) uninstall -y $(MMCV); \
		$(INSTALL_ALL) --no-cache-dir && $(MMCV_RUNS); }
	@touch $@

# Names all that is missing in one sentence, before anything is downloaded.
define CHECK_MACHINE
need() { "$$@" >/dev/null 2>&1 || missing="$$missing $$package"; }; \
package='python3 python3-venv python3-dev'; need $(PYTHON) -c ''; \
if test -z "$$missing"; then \
	package=python3-venv; need $(PYTHON) -c 'import ensurepip'; \
	package=python3-dev; need $(PYTHON) -c 'import os, sysconfig; \
		os.stat(sysconfig.get_path("include") + "/Python.h")'; \
	package=libgl1; need $(PYTHON) -c 'import ctypes; \
		ctypes.CDLL("libGL.so.1")'; \
	package=libglib2.0-0; need $(PYTHON) -c 'import ctypes; \
		ctypes.CDLL("libgthread-2.0.so.0")'; \
fi; \
package=g++; need command -v $${CXX:-c++}; \
test -z "$$missing" || { \
	echo "Please install what is missing: sudo apt install$$missing"; \
	exit 1; }; \
$(PYTHON) -c 'import sys; \
	sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
	echo "Please choose Python 3.10, 3.11 or 3.12 (torch has no wheels for" \
	"older ones, numpy 1 for newer ones): make setup PYTHON=python3.12"; \
	exit 1; }
endef

# mmcv comes as source only. Debug symbols, which Python's own compiler flags
# ask for, would take 40 % of the time. Without ninja, which pip puts beside
# python, one file would be compiled after another.
INSTALL_ALL = PATH="$(CURDIR)/$(BIN):$$PATH" \
	CFLAGS=-g0 CXXFLAGS=-g0 MMCV_WITH_OPS=1 \
	$(BIN)/python tools/watch_build.py $(PIP) install --no-build-isolation -e '.[$(EXTRA),test]'

# pip caches the mmcv that it built, but does not know for which torch: the
# cached one may not fit this torch, or may lack CUDA.
define MMCV_RUNS
$(BIN)/python -c 'import torch; from mmcv.ops import nms; \
	x = torch.rand(4, 4).to("cuda" if torch.cuda.is_available() else "cpu"); \
	nms(x, x[0], 0.5)'
endef

define MMCV_IS_BUILT
{ $(PIP) show -q $(MMCV) || $(PIP) cache list $(subst -,_,$(MMCV)) | grep -q "$$($(PYTHON) -c \
	'import sys; print("cp%d%d" % sys.version_info[:2])')"; } 2>/dev/null
endef

define SAY_HOW_LONG
echo 'mmcv is compiled now: 5 to 25 minutes on 2 cores.'
endef
