"""The operator's door: swap parts of a served engine, and nobody else may."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from drivetrain import AsyncEngine
from support.command_line import run_command
from support.live_server import LiveServer

TOKEN = "an-admin-token"


@pytest.fixture(scope="module")
def url(engine: AsyncEngine) -> Iterator[str]:
    with LiveServer(engine, admin_token=TOKEN, api_key="a-user-key") as running:
        yield running.url


def post(url: str, body: object, token: str | None = TOKEN) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.post(f"{url}/v1/admin/swap", json=body, headers=headers, timeout=60, trust_env=False)


def test_a_swap_is_made_shown_and_undone(url: str, engine: AsyncEngine) -> None:
    before = engine.loop.engine.epoch
    report = post(url, {"scheduler": {"name": "priority", "max_running": 5}, "probation_steps": 2}).json()
    assert report["outcome"] == "finalized"
    assert report["changes"] == {"scheduler": ["fcfs", "priority"]}
    shown = httpx.get(f"{url}/debug/selection", headers={"Authorization": "Bearer a-user-key"}, trust_env=False).json()
    assert shown["epoch"] == before + 1
    assert TOKEN not in str(shown)
    assert post(url, {"scheduler": "fcfs"}).json()["epoch"] == before + 2


def test_answers_tell_their_epochs_when_asked(url: str, engine: AsyncEngine) -> None:
    headers = {"Authorization": "Bearer a-user-key"}
    body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    plain = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False).json()
    told = httpx.post(
        f"{url}/v1/completions", json=body | {"return_epochs": True}, headers=headers, timeout=60, trust_env=False
    ).json()
    assert "epochs" not in plain["choices"][0]
    assert told["choices"][0]["epochs"] == [engine.loop.engine.epoch]


@pytest.mark.parametrize("token", [None, "wrong", "a-user-key"])
def test_only_the_admin_may(url: str, engine: AsyncEngine, token: str | None) -> None:
    before = engine.loop.engine.epoch
    response = post(url, {"scheduler": "priority"}, token)
    assert response.status_code == 401
    assert "admin token" in response.json()["error"]["message"]
    assert engine.loop.engine.epoch == before


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"attention": "spda"}, 400, "Did you mean 'sdpa'"),
        ({"attention": {"name": "sdpa", "blok_size": 1}}, 400, "block_size"),
        ({"atention": "sdpa"}, 400, "attention"),
        ({"attention": 5}, 400, "attention"),
        ({"scheduler": "priority", "dry_run": "yes"}, 400, "dry_run"),
        ({"scheduler": "priority", "probation_steps": -1}, 400, "probation_steps"),
        ({"scheduler": "priority", "timeout_seconds": 0}, 400, "timeout_seconds"),
        ({"scheduler": "priority", "timeout_seconds": True}, 400, "timeout_seconds"),
        ({"scheduler": "priority", "timeout_seconds": 1e-9}, 409, "nothing has changed"),
        ({"scheduler": "priority", "timeout_seconds": 10**400}, 400, "timeout_seconds"),
        ({"scheduler": "priority", "engine": {"max_waiting": 3}}, 409, "settings stay as they are"),
        ({"platform": "cpu"}, 409, "can't exchange its platform"),
        ({}, 409, "nothing to exchange"),
        ([], 400, "object"),
    ],
)
def test_bad_input_changes_nothing(url: str, engine: AsyncEngine, body: object, status: int, message: str) -> None:
    before = engine.loop.engine.epoch
    response = post(url, body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert engine.loop.engine.epoch == before


def test_the_command_swaps_and_says_so(url: str) -> None:
    done = run_command("swap", url, "scheduler=priority", "--admin-token", TOKEN, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "fcfs -> priority" in done.stdout
    rebuilt = run_command("swap", url, "quantizer=none", "--admin-token", TOKEN, "--dry-run")
    assert "reload of the files" in rebuilt.stdout
    late = run_command("swap", url, "quantizer=int8", "--admin-token", TOKEN, "--timeout-seconds", "0.001")
    assert late.returncode == 1, late.stdout
    assert "0.001 s" in late.stderr
    refused = run_command("swap", url, "scheduler=nothing", "--admin-token", TOKEN)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    stranger = run_command("swap", url, "scheduler=priority", "--admin-token", "sésame")
    assert "this needs the admin token" in stranger.stderr


def test_quantizers_with_rules_are_swapped_by_request_and_by_command(url: str) -> None:
    """A dry run tells the bytes that the swap then takes; a rule that fits no layer is the caller's error."""
    part = {"name": "int8", "rules": {"lm_head": "none"}}
    plan = post(url, {"quantizer": part, "dry_run": True}).json()
    made = post(url, {"quantizer": part, "probation_steps": 0}).json()
    assert made["outcome"] == "finalized"
    assert plan["extra_memory_bytes"] == made["extra_memory_bytes"] < made["peak_memory_bytes"]
    refused = post(url, {"quantizer": {"name": "int8", "rules": {"lm_haed": "none"}}})
    assert refused.status_code == 400
    assert "Did you mean 'lm_head'" in refused.json()["error"]["message"]
    done = run_command("swap", url, "quantizer=none", "quantizer.rules={layers.0: int8}", "--admin-token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert "int8 -> none" in done.stdout
    assert "most memory while preparing" in done.stdout
    assert post(url, {"quantizer": "none"}).json()["changes"] == {"quantizer": ["none", "none"]}


def test_without_a_token_there_is_no_door(engine: AsyncEngine) -> None:
    # The last test of this module: a server that ends shuts its engine down.
    with LiveServer(engine) as running:
        assert post(running.url, {"scheduler": "priority"}).status_code == 404
