"""`ringspan bench decode`: attention over encoded pages, beside cuDNN over bf16 keys."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringspan.deploy.bench.asked import check_repeats, device_for, heads_of, numbers_of
from ringspan.deploy.commands import options
from ringspan.errors import BadInput, UnknownName

KEYS = {"cuda": "1048576", "cpu": "8192"}


def decode(
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Keys; default: 1048576 on a GPU, 8192 on a CPU."),
    ] = None,
    codecs: Annotated[
        str, typer.Option("--codecs", help="Page codecs, such as int4,int8,fp8.")
    ] = "int4,int8,fp8",
    questions: Annotated[
        str, typer.Option("--questions", help="Questions that share the keys, such as 1,16.")
    ] = "1,16",
    heads: Annotated[str, typer.Option("--heads", help="q/kv heads, such as 32/8.")] = "32/8",
    head_dim: Annotated[int, typer.Option("--head-dim", help="Dimensions of a head.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed runs, after a first.")] = 5,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row a case to this file.")
    ] = None,
) -> int:
    """Attention of few rows over encoded pages, beside cuDNN (or torch) over the keys in bf16.

    What errs more than its limit is not timed, and the command then exits with 1.
    """
    import msgspec
    import torch

    from ringspan.deploy.bench.decode import LIMITS, DecodeWrong, bench_decode, decode_line

    check_repeats(repeats)
    kinds = codecs.split(",")
    for kind in kinds:
        if kind not in LIMITS:
            raise UnknownName("page codec", kind, list(LIMITS))
    if head_dim < 1:
        raise BadInput(f"--head-dim {head_dim}: wanted at least 1")
    q_heads, kv_heads = heads_of(heads)
    device = device_for(device)
    wrong = 0
    for keys in numbers_of("--tokens", tokens or KEYS[device]):
        for row in bench_decode(
            kinds,
            keys=keys,
            questions=numbers_of("--questions", questions),
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            device=torch.device(device),
            repeats=repeats,
            seed=seed,
            command=shlex.join(["ringspan", *sys.argv[1:]]),
        ):
            if isinstance(row, DecodeWrong):
                wrong += 1
                print(
                    f"WRONG, not timed: {row.kind}, {row.questions} questions: its error is "
                    f"{row.error_ratio:.2f} of decoding first, at most {row.limit}",
                    flush=True,
                )
                continue
            if json is not None:
                with json.open("ab") as file:
                    file.write(msgspec.json.encode(row) + b"\n")
            print(decode_line(row), flush=True)
    return 1 if wrong else 0
