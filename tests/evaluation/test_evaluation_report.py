"""The report's files: complete, self-contained, about nobody in particular, and honest."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from plora_ray.evaluation.comparison import POPULATION, WITH_USER, Comparison, compare
from plora_ray.evaluation.protocols import BASELINES, evaluate_store
from plora_ray.evaluation.verdict import verdict

if TYPE_CHECKING:
    from tests.evaluation.conftest import World

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "deeper"
    evaluate_store(world.settings, "all", list(BASELINES), folder)
    return folder


def test_the_folder_holds_json_html_and_plots(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html", "gain_per_user.png", "few_shot.png"}
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))
    report = json.loads((folder / "report.json").read_text())
    assert report["generation"] == "g1" and report["plots"] == ["gain_per_user.png", "few_shot.png"]


def test_the_html_stands_alone(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2 and all(base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(PNG) for source in sources)
    assert "<link" not in html and "<script" not in html and "http" not in html
    assert json.loads((folder / "report.json").read_text())["verdict"].split(":")[0] in html


def test_no_file_names_a_user_or_quotes_a_text(world: World, folder: Path) -> None:
    keys = [world.store.key(secret).hex() for secret in world.secrets if "person" in secret]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in [*world.secrets, *keys] if secret.encode() in content]


def test_pictures_of_an_earlier_run_do_not_stay_beside_other_numbers(world: World, tmp_path: Path) -> None:
    evaluate_store(world.settings, "full", [], tmp_path)
    evaluate_store(world.settings, "zero", [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def comparison(with_user: float, population: float, users: int = 50) -> Comparison:
    """Fifty users of ten rows; each predictor is right on the given share of every user's rows, at random."""
    generator = np.random.default_rng(0)
    labels = np.zeros(10 * users, np.int64)

    def right(share: float) -> np.ndarray:
        return np.log(np.where(generator.random(len(labels))[:, None] < share, [[0.8, 0.2]], [[0.2, 0.8]]))

    predicted = {WITH_USER: right(with_user), POPULATION: right(population)}
    return compare(WITH_USER, predicted, labels, np.repeat(np.arange(users), 10), "classification")


def test_the_verdict_says_gain_only_where_the_interval_is_above_zero() -> None:
    assert "without: a gain of" in verdict(comparison(0.9, 0.6), (), None)


def test_the_verdict_says_so_when_no_gain_could_be_shown() -> None:
    assert "no gain could be shown" in verdict(comparison(0.7, 0.7), (), None)


def test_the_verdict_says_so_when_the_users_are_worse_off() -> None:
    assert "a LOSS of" in verdict(comparison(0.5, 0.9), (), None)


def test_the_verdict_concludes_nothing_from_a_handful_of_users() -> None:
    assert "too few to conclude" in verdict(comparison(0.9, 0.5, users=4), (), None)
