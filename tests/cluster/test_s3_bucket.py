"""A server that starts empty gets its bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from s3fs import S3FileSystem
from typer.testing import CliRunner

from cluster import s3_bucket
from cluster.node_process import free_port
from cluster.s3_server import S3Server

single = typer.Typer()
single.command()(s3_bucket.main)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def test_a_bucket_is_made_and_a_second_time_does_no_harm(tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        storage = S3FileSystem(**server.storage_options)
        assert not storage.exists("plora")
        s3_bucket.make_bucket("plora", server.endpoint_url)
        storage.pipe_file("plora/kept", b"x")
        again = CliRunner().invoke(single, ["plora", "--endpoint-url", server.endpoint_url, "--wait-s", "5"])
        assert again.exit_code == 0 and storage.cat_file("plora/kept") == b"x"


def test_a_server_that_does_not_answer_is_one_line_that_names_it() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    failed = CliRunner().invoke(single, ["plora", "--endpoint-url", url])
    assert failed.exit_code == 1 and failed.output.count("\n") == 1 and url in failed.output
