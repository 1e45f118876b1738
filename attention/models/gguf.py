"""GGUF files, dequantised by transformers and converted once to safetensors.

Reading a GGUF costs a full dequantisation in Python (13 s for 135 M parameters) and private memory
in every rank; the converted folder is memory-mapped, so ranks of one host share its pages.

The converted weights are fp32 up to a billion parameters: that holds every dequantised value (a
4-bit code times an fp16 scale plus an fp16 minimum needs more than bf16's 8 bits) and is what CPU
ranks compute in. Larger models are kept in bf16: half the disk, and its rounding (2^-9) is far
below the quantisation step that the file has already taken.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringspan.attention.models.cache import cache_folder, file_sha256, published
from ringspan.attention.models.quiet import quiet
from ringspan.errors import BadInput, RingspanError

FP32_MAX_PARAMS = 1_000_000_000
CONVERT_TIMEOUT_S = 1800.0
_FORM = "v1"  # of the converted folder; a new one leaves the old entries unread


def converted_folder(path: Path) -> Path:
    """The folder with `path`'s weights as safetensors, its config and its tokenizer.

    Converts on the first call for a file's content (smollm2: some 30 s on one core), under a lock
    that the other ranks wait at. Raises BadInput for a file that transformers cannot read.
    """
    root = cache_folder() / "gguf"
    digest = file_sha256(path, root / "hashes")
    return published(
        root / f"{digest[:32]}-{_FORM}", lambda folder: _convert(path, folder), CONVERT_TIMEOUT_S
    )


def _convert(path: Path, folder: Path) -> None:
    origin = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # transformers' GGUF reader has its own progress bar, which only knows stderr.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**origin)
            # transformers takes a dequantised model for a quantised one and would not save it.
            model.hf_quantizer = None
            model.is_quantized = False
            model.quantization_method = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            large = sum(p.numel() for p in model.parameters()) > FP32_MAX_PARAMS
            dtype = torch.bfloat16 if large else torch.float32
            model.to(dtype)
            model.config.dtype = dtype
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (RingspanError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"cannot read the GGUF file {path}: {reason[0]}") from error
