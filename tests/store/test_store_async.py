"""Reads within an event loop: the same bytes, nobody waits for anybody else, and few threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from plora_ray.store import AdapterStore
from plora_ray.store.objects import READ_THREADS


def test_many_pulls_at_once_give_what_one_after_the_other_gives(
    store: AdapterStore, publish: Callable[..., None], make_users: Callable[..., Any], make_fresh: Callable[..., Any]
) -> None:
    users = make_users(60)
    publish("g1", users)
    reader = store.open_generation()
    store.put_fresh(make_fresh("user-3", reader.basis))
    store.erase(store.key("user-4"))
    keys = [*users, store.key("nobody")]

    async def all_at_once() -> tuple[list[Any], dict[bytes, Any]]:
        pulled = await asyncio.gather(*(store.pull_async(reader, key) for key in keys))
        return pulled, await reader.get_many_async(keys)

    pulled, many = asyncio.run(all_at_once())
    expected = [store.pull(reader, key) for key in keys]
    assert [found and (found.key, found.version, found.record.tobytes()) for found in pulled] == [
        found and (found.key, found.version, found.record.tobytes()) for found in expected
    ]
    assert {key: found.record.tobytes() for key, found in many.items()} == {
        key: found.record.tobytes() for key, found in reader.get_many(keys).items()
    }


@pytest.mark.parametrize("place", ["memory"], indirect=True)
def test_a_pull_that_is_cancelled_leaves_the_others_whole_and_waiting_ones_take_no_more_threads(
    store: AdapterStore, publish: Callable[..., None], make_users: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(200)
    publish("g1", users)
    reader, read, before = store.open_generation(), store.objects._backend.read, set(threading.enumerate())
    may_answer, most = threading.Event(), 0

    def slow(*arguments: Any) -> bytes:
        may_answer.wait()
        return read(*arguments)

    monkeypatch.setattr(store.objects._backend, "read", slow)

    async def one_gives_up() -> dict[bytes, Any]:
        nonlocal most
        pulls = {key: asyncio.ensure_future(store.pull_async(reader, key)) for key in users}
        await asyncio.sleep(0)  # all have asked, and the loop still runs
        given_up = [*list(pulls)[:3], *list(pulls)[-3:]]  # being read, and waiting to be
        for key in given_up:
            pulls[key].cancel()
        most = len(set(threading.enumerate()) - before)
        may_answer.set()
        found = dict(zip(pulls, await asyncio.gather(*pulls.values(), return_exceptions=True), strict=True))
        assert [key for key, answer in found.items() if isinstance(answer, asyncio.CancelledError)] == given_up
        return {key: answer for key, answer in found.items() if key not in given_up}

    found = asyncio.run(one_gives_up())
    assert {key: answer.record.tobytes() for key, answer in found.items()} == {key: users[key][0].tobytes() for key in found}
    assert len(found) == 194 and 0 < most <= READ_THREADS
