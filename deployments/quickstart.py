"""The quickstart's story: train an adapter for every user, serve them, onboard new users, and say what was seen.

Runs the same commands a user types; everything it starts it stops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from plora_ray.client import Client
from plora_ray.config import Settings, load_settings
from plora_ray.data.synthetic import SyntheticParams, new_user, rows_of_user, true_probability
from plora_ray.opening import open_store

CONFIG = Path(__file__).with_name("quickstart.yaml")
SHOWN_CONFIG = "deployments/quickstart.yaml"
NEW_USERS = 100
EXAMPLES = 8
ASKED_USERS = 300
READY_WITHIN_S = 180

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Tell the story; the exit code says whether all of it worked."""
    settings = load_settings(CONFIG)
    params = SyntheticParams.from_url(settings.data.source)
    console.rule("1. Train an adapter for every user")
    console.print(
        f"{params.users:,} made-up people rate films. They disagree: the same text, different answers.\n"
        "One frozen MiniLM (22.7 M parameters) is shared by all; "
        f"each person gets {settings.adapter.user_dim} numbers of their own.\n\n"
        f"[dim]$ python -m plora_ray.train_all --config {SHOWN_CONFIG}[/dim]"
    )
    published = _train()
    _tell_training(settings, published)
    console.rule("2. Serve all of them from one model")
    with _server() as client:
        _tell_same_text(client, params)
        console.rule("3. New people, online in a moment")
        _tell_new_users(client, params)
    _tell_rest(settings, published)
    return 0


def _train() -> dict[str, Any]:
    command = [sys.executable, "-m", "plora_ray.train_all", "--config", str(CONFIG)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _tell_training(settings: Settings, published: dict[str, Any]) -> None:
    store = open_store(settings.store)
    report = json.loads(store.objects.read(f"generations/{published['generation']}/report.json"))
    test, ceilings = report["test"], report["ceilings"]
    console.print(
        f"\n[bold]{published['users']:,} adapters[/bold] from {published['examples']:,} ratings in {published['seconds']:.0f} s, "
        f"published as generation {published['generation']}.\n"
    )
    table = Table("on ratings held back from training", "accuracy", "best possible")
    table.add_row("the model without knowing who asks", f"{test['without_user']['accuracy']:.1%}", f"{ceilings['without_user']:.1%}")
    table.add_row("the user's past ratings alone, text unread", f"{test['user_label_prior']['accuracy']:.1%}", "")
    table.add_row(
        "[bold]the model with the user's adapter[/bold]",
        f"[bold]{test['with_user']['accuracy']:.1%}[/bold]",
        f"{ceilings['with_user']:.1%}",
    )
    console.print(table)
    gain = test["accuracy_gain"]
    console.print(
        f"Knowing the user is worth {gain['mean']:+.1%} accuracy "
        f"(95 % interval {gain['low']:+.1%} to {gain['high']:+.1%}, resampled by user).\n"
    )


@contextmanager
def _server() -> Iterator[Client]:
    """The serving application in a process group of its own, stopped by its own handle."""
    port = _free_port()
    command = [sys.executable, "-m", "plora_ray.cli", "serve", "--config", str(CONFIG), "--port", str(port)]
    console.print(f"[dim]$ plora serve --config {SHOWN_CONFIG} --port {port}[/dim]")
    log = Path("var/quickstart-serve.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        with Client(f"http://127.0.0.1:{port}") as client, console.status("starting Ray Serve and loading the generation ..."):
            deadline = time.monotonic() + READY_WITHIN_S
            while not client.ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start; its log is {log}:\n{log.read_text()[-2000:]}")
                time.sleep(0.3)
        with Client(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tell_same_text(client: Client, params: SyntheticParams) -> None:
    users = [f"user-{index:05d}" for index in range(min(ASKED_USERS, params.users))]
    text = next(row.text for row in rows_of_user(params, 0) if row.split == "test")
    answers = sorted(client.predict([(user, text) for user in users]), key=lambda answer: answer["scores"]["like"])
    console.print(f"\nOne text, three users, one forward pass:\n  [italic]{text}[/italic]")
    table = Table("user", "the model says", "P(like)", "in truth")
    for answer in (answers[0], answers[len(answers) // 2], answers[-1]):
        truth = true_probability(params, int(answer["user_id"].removeprefix("user-")), text)
        table.add_row(answer["user_id"], answer["label"], f"{answer['scores']['like']:.2f}", f"{truth:.2f}")
    console.print(table)
    nobody = client.predict([("somebody unknown", text)])[0]
    console.print(
        f"Somebody unknown gets the population's answer: {nobody['label']}, P(like) {nobody['scores']['like']:.2f}, "
        f'marked "{nobody["personalization"]}".\n'
    )


def _tell_new_users(client: Client, params: SyntheticParams) -> None:
    right_before = right_after = asked = 0
    seconds = []
    for index in track(range(NEW_USERS), description="onboarding", console=console, transient=True):
        rows = new_user(params, index)
        name = rows[0].user_id
        examples = [(row.text, row.label) for row in rows if row.split != "test"][:EXAMPLES]
        tests = [row for row in rows if row.split == "test"]
        before = client.predict([(name, row.text) for row in tests])
        adapted = client.adapt(name, examples)
        after = client.predict([(name, row.text) for row in tests])
        seconds.append(adapted["seconds"])
        right_before += sum(answer["label"] == row.label for answer, row in zip(before, tests, strict=True))
        right_after += sum(answer["label"] == row.label for answer, row in zip(after, tests, strict=True))
        asked += len(tests)
        if index == 0:
            console.print(f"[dim]$ curl -X PUT .../v1/users/{name}/examples -d '{{\"examples\": [...{EXAMPLES} ratings...]}}'[/dim]")
            table = Table(f"a text {name} never rated", "before", f"after {EXAMPLES} examples", "truly rated")
            for old, new, row in zip(before, after, tests, strict=True):
                table.add_row(
                    row.text, f"{old['label']} {old['scores']['like']:.2f}", f"{new['label']} {new['scores']['like']:.2f}", row.label
                )
            console.print(table)
    console.print(
        f"{NEW_USERS} new people, {asked} texts: {right_before / asked:.1%} right before, "
        f"[bold]{right_after / asked:.1%} right after {EXAMPLES} examples each[/bold].\n"
        f"An adapter took {sorted(seconds)[len(seconds) // 2]:.2f} s (median). No restart, nothing retrained.\n"
    )


def _tell_rest(settings: Settings, published: dict[str, Any]) -> None:
    store = open_store(settings.store)
    reader = store.open_generation(published["generation"])
    record = reader.manifest.width * 4
    console.rule("What is where")
    console.print(
        f"A user weighs {record} bytes; a million users {record * 10**6 / 2**20:,.0f} MiB.\n"
        f"Adapters and manifest   {store.uri}/generations/{published['generation']}\n"
        f"Report                  {published['report_html']}\n"
        "Everything that was started is stopped again.\n\n"
        "Next: serve it yourself  plora serve --config deployments/quickstart.yaml   (after: source .venv/bin/activate)\n"
        "      your own data      docs/train.md\n"
        "      a real cluster     docs/operate.md"
    )


if __name__ == "__main__":
    sys.exit(main())
