"""Keeps transformers' warnings and progress bars off the terminal while it works for us."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

_GUESTS = ("accelerate", "gguf", "huggingface_hub", "tokenizers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors still come through; levels and bars are put back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    levels = {name: logging.getLogger(name).level for name in _GUESTS}
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in _GUESTS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
