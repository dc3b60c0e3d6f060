"""A root key in KMS: wraps and unwraps over HTTP, bound to its store; S3 is told how to encrypt what it is given."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from botocore.session import get_session
from moto.server import ThreadedMotoServer

from plora_ray.config import parse_settings
from plora_ray.errors import StoreError
from plora_ray.opening import open_store, rotate_root_key
from plora_ray.store import AdapterStore, RootKeySource, UserAdapter, new_version
from plora_ray.store.encryption.kms import KmsRootKey
from plora_ray.store.encryption.sealing import SealBroken

REGION = "eu-west-1"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server that speaks KMS and S3 over HTTP."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def key_id(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A key of KMS, which the environment leads to."""
    for name, value in {"AWS_ENDPOINT_URL_KMS": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    return str(get_session().create_client("kms", region_name=REGION).create_key()["KeyMetadata"]["KeyId"])


def test_a_key_that_kms_wrapped_unwraps_for_its_store_only(key_id: str) -> None:
    root, key, place = KmsRootKey(key_id, REGION), b"k" * 32, {"plora-store": "s", "plora-ring-version": "1"}
    wrapped = root.wrap(key, place)
    assert key not in wrapped and root.unwrap(wrapped, place) == key
    with pytest.raises(SealBroken):
        root.unwrap(wrapped, {**place, "plora-store": "another"})


def test_a_store_goes_from_a_root_key_in_a_file_to_one_in_kms_and_a_key_that_kms_refuses_is_one_line(
    key_id: str, tmp_path: Any
) -> None:
    (tmp_path / "root.key").write_text("0f" * 32)
    store = {"uri": str(tmp_path / "store"), "region": REGION, "encryption": {"key_file": str(tmp_path / "root.key")}}
    before = parse_settings({"store": store}).store
    opened = open_store(before, create=True)
    adapter = UserAdapter(opened.key("u"), np.ones(3, np.float32), 1, "g", new_version(), "now", "fresh", "0" * 64)
    opened.put_fresh(adapter)
    kms = parse_settings({"store": {**store, "encryption": {"kms_key_id": key_id}}}).store
    assert kms.root_key() == RootKeySource(kms_key_id=key_id, region=REGION)
    assert rotate_root_key(before, kms.root_key(), True, lambda done, total: None) == 2
    assert open_store(kms).get_fresh(adapter.key).record.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(StoreError, match="under another root key"):
        open_store(before)
    with pytest.raises(StoreError, match="KMS refused to decrypt with .*; check the key and its policy") as caught:
        open_store(parse_settings({"store": {**store, "encryption": {"kms_key_id": str(uuid.uuid4())}}}).store)
    assert "\n" not in str(caught.value)


def test_kms_that_cannot_be_reached_is_one_line(key_id: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    monkeypatch.setattr("plora_ray.store.encryption.kms.ATTEMPTS", 1)
    with pytest.raises(StoreError, match="can't reach KMS: .*; check the network"):
        AdapterStore(str(tmp_path / "store"), encryption=RootKeySource(kms_key_id=key_id, region=REGION))


@pytest.mark.parametrize("sse", [{"mode": "AES256"}, {"mode": "aws:kms", "kms_key_id": "alias/adapters"}])
def test_every_object_is_put_with_the_server_side_encryption_that_is_set(
    endpoint: str, sse: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{uuid.uuid4().hex}"
    client = get_session().create_client("s3", region_name=REGION, endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    settings = parse_settings({"store": {"uri": f"s3://{bucket}/a", "endpoint_url": endpoint, "region": REGION, "sse": sse}}).store
    store = open_store(settings, create=True)
    store.erase(store.key("u"))  # creates, replaces and writes
    listed = client.list_objects_v2(Bucket=bucket)["Contents"]
    heads = [client.head_object(Bucket=bucket, Key=item["Key"]) for item in listed]
    assert len(heads) == 3
    assert all((head["ServerSideEncryption"], head.get("SSEKMSKeyId")) == (sse["mode"], sse.get("kms_key_id")) for head in heads)
