"""A root key that lives in AWS KMS. The only file that calls KMS.

Credentials come from where botocore looks for them; an endpoint of one's own from AWS_ENDPOINT_URL_KMS. Every wrapped key is bound to
its names by KMS' encryption context, which shows in its audit log.
"""

from __future__ import annotations

from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from plora_ray.errors import StoreError
from plora_ray.store.encryption.sealing import SealBroken

TIMEOUT_S = 10
ATTEMPTS = 4
_OF_ANOTHER_KEY = {"InvalidCiphertextException", "IncorrectKeyException"}


class KmsRootKey:
    """The KMS key `key_id` (id, ARN or alias). Opens no connection before it is used. Raises StoreError if KMS can't be asked."""

    def __init__(self, key_id: str, region: str | None) -> None:
        self._key_id = key_id
        config = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"mode": "standard", "total_max_attempts": ATTEMPTS})
        try:
            self._client = get_session().create_client("kms", region_name=region, config=config)
        except BotoCoreError as error:
            raise StoreError(f"can't reach KMS: {_one_line(error)}; set store.region or AWS_REGION") from error

    def wrap(self, key: bytes, bound_to: dict[str, str]) -> bytes:
        return bytes(self._call("encrypt", Plaintext=key, EncryptionContext=bound_to)["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, bound_to: dict[str, str]) -> bytes:
        return bytes(self._call("decrypt", CiphertextBlob=wrapped, EncryptionContext=bound_to)["Plaintext"])

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client, method)(KeyId=self._key_id, **arguments)
            return answer
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _OF_ANOTHER_KEY:
                raise SealBroken from error
            raise StoreError(f"KMS refused to {method} with {self._key_id}: {_one_line(error)}; check the key and its policy") from error
        except BotoCoreError as error:
            raise StoreError(f"can't reach KMS: {_one_line(error)}; check the network, region and credentials") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
