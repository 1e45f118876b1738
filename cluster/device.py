"""What a rank wants to know of the device it sits on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ringspan.errors import BadInput


def device_named(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`: the process's current GPU where there is one."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise BadInput("--device cuda was asked for, but torch sees no CUDA device here")
        return torch.device("cuda", torch.cuda.current_device())
    if name not in ("auto", "cpu"):
        raise BadInput(f"unknown device {name!r}; known: auto, cpu, cuda")
    return torch.device("cpu")


def on_device(device: torch.device) -> Any:
    """Makes it the thread's current device: loopback ranks are threads."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def product_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"
