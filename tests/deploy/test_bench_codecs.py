"""`bench codecs`: its figures by hand, our runs on a small model, the peers' process for real."""

import math
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from ringspan.deploy.bench import codec_report, codecs
from ringspan.deploy.bench.codec_loss import Queries, attended, page_loss, sqnr_db, token_loss
from ringspan.deploy.bench.codec_peers import MODULES
from ringspan.deploy.bench.codec_runs import Protocol
from ringspan.deploy.bench.codecs import Asked, CodecRow, at_equal_bits, bench_codecs
from ringspan.deploy.bench.peers_environment import check_environment
from ringspan.deploy.commands.bench_codecs import codecs as command
from ringspan.errors import BadInput, RingspanError

SMALL = Protocol(tokens=600, prefill=384, block=64, chunk_tokens=128)
"""The last block and the last page are short."""


def asked(**changes: object) -> Asked:
    usual = Asked(
        model="random:tiny",
        protocol=SMALL,
        codecs=("raw", "bf16", "int8"),
        margins=(),
        peers_python=None,
        device="cpu",
        threads=1,
        text="random ids",
        command="ringspan bench codecs",
    )
    return msgspec.structs.replace(usual, **changes)


@pytest.fixture(scope="module")
def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, SMALL.tokens, dtype=np.int32)


@pytest.fixture(scope="module")
def rows(token_ids: np.ndarray) -> dict[tuple[str, str], CodecRow]:
    return {(row.codec, row.tail): row for row in bench_codecs(asked(margins=(1.0,)), token_ids)}


def test_kl_and_perplexity_are_those_of_the_formulas() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    exact, lossy = p.log().repeat(4, 1), q.log().repeat(4, 1)
    loss = token_loss(exact, lossy, torch.eye(3), torch.tensor([0, 0, 2, 1]))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert loss.kl_mean == pytest.approx(kl, rel=1e-5)
    assert loss.kl_max == pytest.approx(kl, rel=1e-5)
    assert loss.perplexity == pytest.approx((0.25 * 0.5 * 0.25) ** (-1 / 3), rel=1e-5)
    assert loss.exact_perplexity == pytest.approx((0.5 * 0.25 * 0.25) ** (-1 / 3), rel=1e-5)
    assert loss.same_best == 0.0


def test_nothing_lost_is_no_loss() -> None:
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    loss = token_loss(hidden, hidden, torch.eye(4), torch.arange(9) % 4)
    assert (loss.kl_max, loss.hidden_error, loss.same_best) == (0.0, 0.0, 1.0)
    assert loss.perplexity == loss.exact_perplexity


def test_hidden_states_of_other_tokens_are_refused() -> None:
    hidden = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="expected both"):
        token_loss(hidden, hidden[:2], torch.eye(4), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("window", [None, 5], ids=str)
def test_attention_is_torchs(window: int | None) -> None:
    random = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 16, generator=random)
    k, v = torch.randn(2, 11, 2, 16, generator=random)
    seen = slice(0 if window is None else 11 - window, 11)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), *(x[seen].transpose(0, 1) for x in (k, v)), scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    found = attended(Queries(q, 0.3, 0.0, window), k, v)
    torch.testing.assert_close(found, wanted)


def test_sqnr_of_known_noise() -> None:
    x = torch.ones(100)
    assert sqnr_db(x, x * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(x, x) == math.inf
    layer = ((x.view(10, 1, 10),) * 2, (x.view(10, 1, 10),) * 2)
    queries = Queries(torch.ones(1, 1, 10), 1.0, 0.0, None)
    assert page_loss([(*layer, queries)]).k_sqnr_db is None


def test_raw_is_exact_wherever_it_lies(rows: dict[tuple[str, str], CodecRow]) -> None:
    for tail in ("raw", "sealed"):
        row = rows["raw", tail]
        assert row.loss.hidden_error < 1e-5
        assert row.bits.mean == 16.0
        assert row.pages is not None
        assert row.pages.k_sqnr_db is None


def test_a_codec_of_fewer_bits_loses_more_than_raw(
    rows: dict[tuple[str, str], CodecRow],
) -> None:
    for name in ("bf16", "int8"):
        for tail in ("raw", "sealed"):
            loss = rows[name, tail].loss
            assert 1e-4 < loss.hidden_error < 0.1
            assert 0 < loss.kl_mean <= loss.kl_max


def test_bits_count_the_tail(rows: dict[tuple[str, str], CodecRow]) -> None:
    int8 = rows["int8", "raw"].bits
    pages, tail = SMALL.prefill, SMALL.tokens - SMALL.prefill
    assert int8.prefill == 8.5  # head_dim 64: codes and one fp32 scale a row
    assert int8.end == pytest.approx((8.5 * pages + 16 * tail) / (pages + tail))
    sealed = rows["int8", "sealed"].bits
    assert sealed.prefill == 8.5
    open_page = tail % 128
    whole = SMALL.tokens - open_page
    assert sealed.end == pytest.approx((8.5 * whole + 16 * open_page) / SMALL.tokens)


def test_needles_are_found_at_full_margin(rows: dict[tuple[str, str], CodecRow]) -> None:
    for row in rows.values():
        [count] = row.needles
        assert count.planted == SMALL.prefill // 16
        assert count.found == count.planted


def test_a_narrow_margin_tells_noise_from_none(token_ids: np.ndarray) -> None:
    narrow = asked(codecs=("raw", "int8"), margins=(2.0**-9,))
    found = {row.codec: row.needles[0].found for row in bench_codecs(narrow, token_ids)}
    assert found["raw"] > found["int8"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"prefill": 200}, "whole pages of 128"),
        ({"prefill": 512, "tokens": 512}, "2 tokens more"),
        ({"block": 48}, "divisor of a page"),
        ({"chunk_tokens": 100}, "--chunk-tokens 100"),
    ],
    ids=["prefill", "tokens", "block", "chunk"],
)
def test_a_protocol_that_fits_no_pages_is_refused(changes: dict[str, int], wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted):
        msgspec.structs.replace(SMALL, **changes).check(128)


def test_an_interpreter_without_the_peers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="wanted a Python"):
        check_environment(tmp_path / "none", MODULES)
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\necho 'No module named hqq' >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(BadInput, match="No module named hqq"):
        check_environment(bare, MODULES)


@pytest.fixture
def own_peers(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The caches of transformers that need no other package, by this interpreter."""
    few = {name: codecs.CACHES[name] for name in ("transformers", "fp8")}
    monkeypatch.setattr(codecs, "CACHES", few)
    return asked(codecs=("int8",), margins=(1.0,), peers_python=Path(sys.executable))


@pytest.mark.slow
def test_peers_run_on_the_same_tokens(own_peers: Asked, token_ids: np.ndarray) -> None:
    rows = {(row.system, row.codec): row for row in bench_codecs(own_peers, token_ids)}
    exact, fp8 = rows["transformers", "transformers"], rows["transformers", "fp8"]
    assert exact.loss.hidden_error < 1e-4
    assert exact.bits.end == 16.0
    assert fp8.bits.end == pytest.approx(8.0, abs=1e-2)
    assert exact.pages is not None
    assert fp8.pages is not None
    assert exact.pages.attention_error < 1e-4
    assert 0.005 < fp8.pages.attention_error < 0.2
    assert exact.needles[0].found == exact.needles[0].planted


def test_exact_runs_that_differ_end_the_benchmark(
    own_peers: Asked, token_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "SAME", 1e-12)
    quick = msgspec.structs.replace(own_peers, margins=())
    with pytest.raises(RingspanError, match="nothing is compared"):
        list(bench_codecs(quick, token_ids))


def test_a_peer_meets_the_best_codec_of_its_bits(
    rows: dict[tuple[str, str], CodecRow],
) -> None:
    def peer(bits: float) -> CodecRow:
        counted = msgspec.structs.replace(rows["int8", "sealed"].bits, mean=bits)
        return msgspec.structs.replace(
            rows["int8", "sealed"], system="transformers", codec="hqq", bits=counted
        )

    ours = list(rows.values())
    int8 = rows["int8", "sealed"]
    assert at_equal_bits([*ours, peer(int8.bits.mean)])[0][1] is int8
    assert at_equal_bits([*ours, peer(int8.bits.mean - 0.2)]) == []
    assert at_equal_bits([*ours, peer(20.0)])[0][1] is rows["raw", "sealed"]


def test_the_command_writes_rows_tables_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    json, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    command(
        model="random:tiny", tokens=600, prefill=384, chunk_tokens=128, names="int8", margins="",
        device="cpu", threads=1, json=json, markdown=table, plots=tmp_path / "plots",
    )  # fmt: skip
    rows = codecs.read(json)
    assert [(row.codec, row.tail) for row in rows] == [("int8", "sealed"), ("int8", "raw")]
    assert codec_report.markdown(rows) == table.read_text()
    assert "| ringspan | int8 | sealed |" in table.read_text()
    assert (tmp_path / "plots" / "codecs_kl_over_bits.png").stat().st_size > 10_000
    assert "384 tokens prefilled" in capsys.readouterr().out


@pytest.mark.parametrize("margins", ["0", "2", "one"], ids=str)
def test_margins_beyond_the_retrievers_are_refused(margins: str) -> None:
    with pytest.raises(BadInput, match="--margins"):
        command(model="random:tiny", margins=margins)
