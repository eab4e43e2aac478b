"""The bench of loading runs, keeps its promise, and tells what it could not measure; its times are nobody's test."""

import json
import sys
from pathlib import Path

import pytest

from bench import loading
from bench.surroundings import ROOT
from bench.watching import ProcessEnded


@pytest.mark.slow
def test_a_small_model_and_a_small_mixture_keep_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layers", "1", "--width", "128", "--rounds", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["loading", *arguments])

    assert loading.main() == 0

    (file,) = tmp_path.iterdir()
    llama, mixtral = json.loads(file.read_text())["models"]
    assert [row["contender"] for row in llama["rows"]] == ["ours", "bitsandbytes"]
    assert [row["contender"] for row in mixtral["rows"]] == ["ours"]
    # Embeddings and head of 4,000 rows in 16 bits, and four attention and three feed-forward matrices in 4.127 of them.
    result = 2 * 2 * 4_000 * 128 + (4 * 128 * 128 + 3 * 128 * 352) * 4.127 / 8
    assert llama["rows"][0]["result_bytes"] == pytest.approx(result, rel=0.01)
    assert "mixtral: " in capsys.readouterr().out


def test_a_load_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProcessEnded, match=r"ours .* ended with 1 .*config\.json"):
        loading.measure("ours", tmp_path)


def test_results_are_kept_in_the_repository() -> None:
    assert loading.RESULTS == ROOT / "bench" / "results"
