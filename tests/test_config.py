"""Settings are validated at the door, in words that say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plora_ray.config import load_settings, parse_settings
from plora_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modell": {}}, "unknown setting 'modell': did you mean 'model'"),
        ({"training": {"learning_rat": 1}}, "unknown setting 'training.learning_rat': did you mean 'training.learning_rate'"),
        ({"serving": {"limits": {"body_byte": 1}}}, "did you mean 'serving.limits.body_bytes'"),
        ({"serving": {"replicas": [3, 2]}}, r"'serving.replicas': write a number from 1, or \[min, max\] \(got \[3, 2\]\)"),
        ({"data": {"sorce": "x"}}, "did you mean 'data.source'"),
        ({"training": {"epochs": 0}}, "setting 'training.epochs'.*greater than or equal to 1.*got 0"),
        ({"adapter": {"rank": "many"}}, "^setting 'adapter.rank': Input should be a valid integer[^;]*$"),
        ({"adapter": {"kind": "lara"}}, "^setting 'adapter.kind': Input should be 'plora' or 'lora'[^;]*$"),
        ({"adapter": {"kind": "lora", "head_terms": "bias"}}, "adapter.head_terms means nothing with adapter.kind lora: remove it"),
        ({"training": {"num_workers": 9, "partitions": 8}}, "num_workers is 9: it must lie between 1 and partitions"),
        ({"training": {"num_workers": [2, 9], "partitions": 8}}, r"num_workers is \[2, 9\]: it must lie between 1 and partitions"),
        ({"training": {"num_workers": [3, 2]}}, r"num_workers is \[3, 2\]: in \[min, max\] the larger number comes last"),
        ({"training": {"num_workers": [0, 2]}}, r"'training.num_workers': write a number from 1, \[min, max\] or auto \(got \[0, 2\]\)"),
        ({"training": {"partitions": "many"}}, "'training.partitions': write a number from 1, or auto"),
        (
            {"model": {"max_length": 512}, "training": {"batch_tokens": 256}},
            "training.batch_tokens is 256: it must be at least model.max_length",
        ),
        ({"task": "ranking"}, "setting 'task'"),
        ({"adapter": {"kind": "lora"}, "training": {"user_solver": "newton"}}, "newton fits vectors only: .* set it to adam or auto"),
        ({"adapter": {"kind": "lora"}, "training": {"mutual_information": {"weight": 1}}}, "mutual_information needs user vectors"),
        ({"adapter": {"kind": "lora", "user_dim": 8}}, "adapter.user_dim means nothing with adapter.kind lora: remove it"),
        ({"training": {"user_solver": "adam", "adam": {"pull": 3}}}, "training.adam.pull means nothing with adapter.kind plora"),
        ({"training": {"num_workers": True}}, "'training.num_workers': write a number"),
        ({"training": {"activation_disk_mb": 9}}, "activation_disk_mb means nothing without adapter.top_layers"),
        ({"store": {"encryption": {}}}, "store.encryption.*set exactly one of key_file, key_env and kms_key_id, not none"),
        ({"store": {"encryption": {"key_env": "A", "kms_key_id": "b"}}}, "not key_env and kms_key_id"),
        ({"store": {"encryption": {"key_fil": "A"}}}, "did you mean 'store.encryption.key_file'"),
        ({"store": {"sse": {"mode": "AES256"}}}, "sse is S3's own encryption, and uri is var/store"),
        ({"store": {"uri": "s3://b/p", "sse": {"mode": "AES256", "kms_key_id": "k"}}}, "kms_key_id means nothing with mode AES256"),
        ({"training": {"user_solver": "adam", "guard": True}}, "training.guard means nothing to training.user_solver adam"),
        ({"data": {"columns": {"group": "text"}}}, "group is 'text', the column of user ids or texts"),
        ({"data": {"columns": {"user_id": "name", "group": "name"}}}, "group is 'name', the column of user ids or texts"),
        ({"task": "regression", "evaluation": {"cost_matrix": {}}}, "evaluation.cost_matrix is for classes, and task is regression"),
        ({"evaluation": {"cost_matrix": {1: {0: float("inf")}}}}, "the cost of answering 0 where 1 is right is inf: write a number"),
        ({"evaluation": {"cost_matrix": {1: {}, "1.0": {}}}}, "a class is named twice"),
        ({"training": {"adam": {"epochs": 3}}}, "training.adam.epochs means nothing to training.user_solver newton"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_settings(tree)
    assert "\n" not in str(error.value)


def test_overrides_lie_over_the_file_and_are_parsed_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"training": {"epochs": 5}}))
    settings = load_settings(path, ["training.epochs=2", "data.filter.cohort=a", "adapter.targets=[query, key]", "store.uri=s3://bucket/x"])
    assert settings.training.epochs == 2 and settings.data.filter == {"cohort": "a"}
    assert settings.adapter.targets == ("query", "key") and settings.store.uri == "s3://bucket/x"
    with pytest.raises(ConfigError, match="write key.path=value"):
        load_settings(path, ["training.epochs"])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a", "must hold a mapping"), (None, "cannot read")])
def test_a_file_that_is_no_settings_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_the_quickstart_and_the_defaults_are_valid_and_settings_survive_a_round_trip() -> None:
    quickstart = load_settings(Path(__file__).parents[1] / "deployments" / "quickstart.yaml")
    for settings in (quickstart, parse_settings({})):
        assert parse_settings(settings.model_dump(mode="json")) == settings


def test_s3_settings_hold_no_secret() -> None:
    settings = parse_settings({"store": {"uri": "s3://b/p", "endpoint_url": "http://127.0.0.1:9000", "region": "eu-west-1"}})
    assert settings.store.storage_options() == {"endpoint_url": "http://127.0.0.1:9000", "client_kwargs": {"region_name": "eu-west-1"}}
    elsewhere = {"uri": "gs://b/p", "options": {"project": "mine", "token": "google_default"}}
    assert parse_settings({"store": elsewhere}).store.storage_options() == elsewhere["options"]
    with pytest.raises(ConfigError, match="unknown setting 'store.secret'"):
        parse_settings({"store": {"secret": "x"}})


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"data": {"source": "https://me:hunter2@host/x.csv"}}, "data.storage_options"),
        ({"data": {"source": "simplecache::https://hunter2@host/x.csv"}}, "data.storage_options"),
        ({"store": {"uri": "s3://b/p", "endpoint_url": "http://key:hunter2@host:9000"}}, "AWS_SECRET_ACCESS_KEY"),
        ({"store": {"uri": "sftp://me:hunter2@host/store"}}, "by the environment"),
        ({"store": {"uri": "az://c/p", "options": {"account_key": "hunter2"}}}, "account_key may hold a secret"),
        ({"store": {"uri": "gs://b/p", "options": {"token": "hunter2"}}}, "token may hold a secret"),
        ({"store": {"uri": "s3://b/p", "options": {"anon": "hunter2"}}}, "s3:// has endpoint_url and region"),
    ],
)
def test_an_address_with_a_password_is_refused_in_one_line_that_names_its_place_and_does_not_repeat_it(
    tree: dict[str, object], where: str
) -> None:
    with pytest.raises(ConfigError, match=where) as error:
        parse_settings(tree)
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_a_signed_source_is_published_without_its_signature_and_ranks_get_nothing_of_the_source() -> None:
    url = "https://host/x.csv?X-Amz-Signature=hunter2"
    settings = parse_settings({"data": {"source": url, "storage_options": {"secret": "hunter2"}}})
    assert settings.data.source == url and settings.published()["data"]["source"] == "https://host/x.csv"
    assert "hunter2" not in str(settings.published()) + str(settings.for_ranks())
    assert parse_settings(settings.for_ranks()).training == settings.training


def test_a_kind_has_its_solver_and_its_learning_rate_unless_they_are_set() -> None:
    plora, lora = parse_settings({}), parse_settings({"adapter": {"kind": "lora"}})
    assert (plora.user_solver, lora.user_solver) == ("newton", "adam")
    assert lora.user_fit().steps.learning_rate < plora.user_fit().steps.learning_rate
    chosen = parse_settings({"training": {"user_solver": "adam", "adam": {"learning_rate": 0.5}}})
    assert chosen.user_fit().solver == "adam" and chosen.user_fit().steps.learning_rate == 0.5


@pytest.mark.parametrize("name", ["paper", "ours"])
def test_the_settings_of_the_papers_benchmarks_are_valid(name: str) -> None:
    settings = load_settings(Path(__file__).parents[1] / f"benchmarks/settings/{name}.yaml")
    assert settings.model.name == "bert-base-uncased" and settings.adapter.user_dim == {"paper": 512, "ours": 64}[name]


def test_what_all_users_share_is_larger_by_default_than_what_each_has_and_alpha_follows_the_rank() -> None:
    found = {kind: parse_settings({"adapter": {"kind": kind}}).adapter for kind in ("plora", "lora")}
    assert [(found[kind].rank, found[kind].alpha, found[kind].head_terms) for kind in found] == [(64, 128.0, "bias"), (16, 32.0, "none")]
    assert parse_settings({"adapter": {"rank": 5}}).adapter.alpha == 10
    assert parse_settings({"adapter": {"rank": 5, "alpha": 3}}).adapter.alpha == 3
    for adapter in found.values():  # what a report shows is a configuration again
        assert parse_settings({"adapter": adapter.model_dump(mode="json")}).adapter == adapter
