"""Makes a bucket, for S3 servers that start empty: `python -m cluster.s3_bucket plora --endpoint-url http://plora-s3:9000`.

Knows one S3 call and how to wait for a server that is still starting. Credentials come from the environment, as boto reads them.
"""

from __future__ import annotations

import time
from typing import Annotated

import botocore.config
import botocore.exceptions
import botocore.session
import typer

RETRY_S = 2.0
OWNED = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_bucket(name: str, endpoint_url: str, *, wait_s: float = 0.0) -> None:
    """Make the bucket if it is missing. Tries again for `wait_s` seconds while the server doesn't answer.

    Raises botocore's errors.
    """
    one_try = botocore.config.Config(retries={"total_max_attempts": 1})  # the loop below tries again
    client = botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url, region_name="us-east-1", config=one_try)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            client.create_bucket(Bucket=name)
            return
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in OWNED:
                return
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < 500 or time.monotonic() > deadline:
                raise
        except botocore.exceptions.ConnectionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def main(
    bucket: str,
    endpoint_url: Annotated[str, typer.Option(help="Address of the S3 server.")],
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for a server that is starting.")] = 0.0,
) -> None:
    """Make BUCKET if it is missing."""
    try:
        make_bucket(bucket, endpoint_url, wait_s=wait_s)
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        typer.echo(f"error: no bucket {bucket!r} at {endpoint_url}: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"bucket {bucket} is there")


if __name__ == "__main__":
    typer.run(main)
