"""A generation that is tried out on a share of the users."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from plora_ray.cli import app as commands
from plora_ray.store import AdapterStore
from plora_ray.store.canary import Canary
from tests.deployments.in_process import Application, application, ask, scores
from tests.generations import publish

KNOWN = [f"known {place}" for place in range(40)]
USERS = [*KNOWN, *(f"stranger {place}" for place in range(40))]
EXAMPLES = {"examples": [{"text": "lovely", "label": "yes"}, {"text": "dull", "label": "no"}]}


@pytest.fixture
def store(tiny_plm: str, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g2", KNOWN, seed=5)
    publish(store, tiny_plm, "g1", KNOWN)
    return store


@pytest.fixture
def app(store: AdapterStore, tiny_plm: str) -> Iterator[Application]:
    with application(store, tiny_plm, {}) as app:
        yield app


def canary(store: AdapterStore, app: Application, tmp_path: Path, share: str) -> str:
    """Type the operator's command; what it says."""
    config = tmp_path / "settings.yaml"
    config.write_text(f"store: {{uri: {store.uri}}}")
    done = CliRunner().invoke(commands, ["generations", "canary", "g2", "--share", share, "--config", str(config)])
    app.service._current.follow()
    app.fits._current.follow()
    return done.output.strip()


def generation(app: Application, user: str) -> str:
    answer: str = ask(app, [(user, "x")]).json()["predictions"][0]["generation"]
    return answer


def test_a_share_of_the_users_known_or_not_is_answered_by_the_canary_until_it_ends(
    store: AdapterStore, app: Application, tmp_path: Path
) -> None:
    plain = {user: scores(ask(app, [(user, "x")])) for user in USERS[:4]}
    assert canary(store, app, tmp_path, "0.5") == "g2 serves 50.0% of the users"
    taken = {user for user in USERS if generation(app, user) == "g2"}
    assert taken == {user for user in USERS if Canary(generation="g2", share=0.5).takes(store.key(user))}
    assert 10 < len(taken & set(KNOWN)) < 30 and 10 < len(taken - set(KNOWN)) < 30  # 20 each expected, sd 3.2
    ready, listed = app.http.get("/readyz").json(), app.http.get("/v1/generations").json()["generations"]
    assert ready == {"status": "ready", "generation": "g1", "canary": {"generation": "g2", "share": 0.5}}
    assert {item["generation"]: (item["serving"], item["current"], item.get("share")) for item in listed} == {
        "g1": (True, True, None), "g2": (True, False, 0.5),
    }  # fmt: skip
    shown = CliRunner().invoke(commands, ["generations", "list", "--config", str(tmp_path / "settings.yaml")]).output.splitlines()
    assert ["canary 50.0%" in line for line in shown] == [line.split()[0] == "g2" for line in shown] and len(shown) == 2
    assert "serves everybody" in canary(store, app, tmp_path, "0") and "canary" not in app.http.get("/readyz").json()
    assert {user: scores(ask(app, [(user, "x")])) for user in plain} == plain


def test_one_answer_is_of_one_generation_the_canarys_only_if_it_takes_all_of_its_users(
    store: AdapterStore, app: Application, tmp_path: Path
) -> None:
    canary(store, app, tmp_path, "0.5")
    taken = [user for user in USERS if generation(app, user) == "g2"]
    other = next(user for user in USERS if user not in taken)
    for users, expected in ((taken, "g2"), ([*taken, other], "g1"), ([other], "g1")):
        predictions = ask(app, [(user, "x") for user in users]).json()["predictions"]
        assert {prediction["generation"] for prediction in predictions} == {expected}


def test_who_is_in_a_share_is_in_every_larger_one_and_another_canary_meets_other_users() -> None:
    keys = [np.random.default_rng(place).bytes(16) for place in range(4000)]
    small, large, other = (Canary(generation=name, share=share) for name, share in (("a", 0.05), ("a", 0.2), ("b", 0.05)))
    taken = {key for key in keys if small.takes(key)}
    assert taken < {key for key in keys if large.takes(key)}
    assert 140 < len(taken) < 260  # 200 expected, sd 13.8
    assert len(taken & {key for key in keys if other.takes(key)}) < 40  # 10 expected
    assert all(Canary(generation="a", share=1).takes(key) for key in keys)


def test_a_user_of_the_canary_is_adapted_on_it_and_personal_in_the_next_answer(
    store: AdapterStore, app: Application, tmp_path: Path
) -> None:
    canary(store, app, tmp_path, "0.5")
    for name in ("g1", "g2"):
        user = next(user for user in USERS[40:] if generation(app, user) == name)
        assert app.http.put(f"/v1/users/{user}/examples", json=EXAMPLES).json()["generation"] == name
        assert ask(app, [(user, "x")]).json()["predictions"][0]["personalization"] == "adapter"
        assert app.http.get(f"/v1/users/{user}").json()["generation"] == name
        assert app.http.delete(f"/v1/users/{user}").status_code == 204
        assert ask(app, [(user, "x")]).json()["predictions"][0]["personalization"] == "population"
