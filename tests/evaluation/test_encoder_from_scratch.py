"""The small encoder that benchmarks make: of the rows it may see, and a model like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.encoder_from_scratch import IGNORED, SPECIAL, batches, hide, main
from plora_ray.adapters.pretrained import load_plm, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of 300 people with two rows; others wrote more, or later."""
    people = [
        (f"u{number}", f"{'좋아요' if number % 2 else '싫어요'} 영화 {number % 7}", number % 2, "2012-01-01") for number in range(300)
    ] * 2
    many = [("busy", "바쁜사람만쓰는말", 1, "2012-01-01")] * 16
    late = [(f"v{number}", "나중에나온말", 0, "2014-01-01") for number in range(50)]
    made = tmp_path_factory.mktemp("encoder")
    pd.DataFrame([*people, *many, *late], columns=["user_id", "text", "label", "timestamp"]).to_parquet(made / "rows.parquet")
    main(
        made / "rows.parquet",
        "2013-01-01",
        made / "model",
        most_rows=15,
        vocabulary=200,
        width=64,
        layers=1,
        max_length=16,
        epochs=4,
        seed=0,
    )
    return made / "model"


def test_nobody_with_many_rows_and_nothing_later_is_read(folder: Path) -> None:
    letters = "".join(load_tokenizer(str(folder)).get_vocab())
    assert all(letter in letters for letter in "좋아요싫영화") and not any(letter in letters for letter in "바쁜사람나중")


def test_it_loads_as_any_model_and_tells_what_labels_said(folder: Path) -> None:
    plm, tokenizer = load_plm(str(folder)), load_tokenizer(str(folder))
    texts = [f"{word} 영화 {number}" for word in ("좋아요", "싫어요") for number in range(7)]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = plm(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
    means = ((hidden * encoded["attention_mask"][..., None]).sum(1) / encoded["attention_mask"].sum(1, keepdim=True)).double()
    liked, disliked = means[:7].mean(0), means[7:].mean(0)
    sides = (means - (liked + disliked) / 2) @ (liked - disliked)
    assert (sides[:7] > 0).all() and (sides[7:] < 0).all()


def test_hidden_pieces_are_the_only_ones_asked_for_and_most_are_masked() -> None:
    ids = torch.randint(len(SPECIAL), 500, (64, 40))
    ids[:, 0], ids[:, -1] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    shown, wanted = hide(ids, 500, torch.Generator().manual_seed(0))
    asked = wanted != IGNORED
    assert 0.12 < asked[:, 1:-1].float().mean() < 0.18 and not asked[:, [0, -1]].any()
    assert torch.equal(wanted[asked], ids[asked]) and torch.equal(shown[~asked], ids[~asked])
    assert 0.74 < (shown[asked] == SPECIAL.index("[MASK]")).float().mean() < 0.86


def test_a_pass_has_every_row_once_and_batches_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 1000).tolist()
    found = batches(lengths, 128, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(found).tolist()) == list(range(1000))
    spread = [max(lengths[row] for row in batch.tolist()) - min(lengths[row] for row in batch.tolist()) for batch in found]
    assert max(spread) <= 8
