"""``drivetrain swap``: exchange parts of a running server."""

from __future__ import annotations

from threading import TIMEOUT_MAX
from typing import Annotated, Any

import typer

from drivetrain.cli.console import format_number, print_json, print_table
from drivetrain.config import parse_assignment
from drivetrain.errors import ConfigError, SwapError


def swap(
    url: Annotated[str, typer.Argument(help="The server, such as http://127.0.0.1:8000.", show_default=False)],
    parts: Annotated[
        list[str],
        typer.Argument(
            help="KIND=NAME, and KIND.OPTION=VALUE for its options.", metavar="KIND=NAME...", show_default=False
        ),
    ],
    admin_token: Annotated[str | None, typer.Option(help="The server's admin token.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; change nothing.")] = False,
    timeout_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=TIMEOUT_MAX,
            help="Time limit; by default the server's engine.swap_timeout_seconds.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Exchange parts of a running server; requests in flight go on. Exits with 1 when it was rolled back.

    Example: drivetrain swap http://127.0.0.1:8000 scheduler=priority --admin-token secret
    """
    body = parse_parts(parts) | ({"dry_run": True} if dry_run else {})
    if timeout_seconds is not None:
        body["timeout_seconds"] = timeout_seconds
    report = _post(url.rstrip("/"), body, admin_token)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 1 if report["outcome"] == "rolled back" else 0


def parse_parts(parts: list[str]) -> dict[str, Any]:
    """``["attention=sdpa", "attention.block_size=8"]`` as the server's table."""
    body: dict[str, dict[str, Any]] = {}
    for text in parts:
        path, value = parse_assignment(text, where="KIND=NAME")
        if len(path) > 2:
            raise ConfigError("too deep a path", found=text, allowed="KIND=NAME or KIND.OPTION=VALUE")
        body.setdefault(path[0], {})["name" if len(path) == 1 else path[1]] = value
    return dict(body)


def _post(url: str, body: dict[str, Any], token: str | None) -> dict[str, Any]:
    import httpx

    # As bytes: a token may hold any character, and what a header may hold without saying so is ASCII.
    headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
    try:
        response = httpx.post(f"{url}/v1/admin/swap", json=body, headers=headers, timeout=None, trust_env=False)
        answer = response.json()
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError("no address of a server", found=url, allowed="such as http://127.0.0.1:8000") from error
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"no server answers: {error}", where=url, hint="Start one with drivetrain serve.") from error
    if response.status_code == 404:
        raise SwapError("this server lets nobody swap", where=url, hint="Start it with --admin-token TOKEN.")
    if response.status_code != 200:
        raise SwapError(answer["error"]["message"], where=url)
    return dict(answer)


def _origin(weights: dict[str, Any]) -> str:
    """``reload of the files, dequantized from 5.0 bits a weight``."""
    kept = format_number(weights["resident_bytes"], "bytes")
    text = "reload of the files" if weights["source"] == "reload" else f"resident copy of {kept}"
    bits = weights["dequantized_from_bits"]
    return text if bits is None else f"{text}, dequantized from {bits:.1f} bits a weight"


def _show(report: dict[str, Any]) -> None:
    rows = [(kind, f"{old} -> {new}") for kind, (old, new) in report["changes"].items()]
    rows += [
        ("outcome", report["outcome"]),
        ("keys and values", report["cache"]),
        ("epoch", report["epoch"]),
        ("pause", f"{report['pause_seconds'] * 1000:.2f} ms"),
        ("extra memory", format_number(report["extra_memory_bytes"], "bytes")),
        ("most memory while preparing", format_number(report["peak_memory_bytes"], "bytes")),
        ("requests kept, recomputed", f"{report['requests_kept']}, {report['requests_recomputed']}"),
    ]
    if report["weights"]:
        rows.append(("weights from", _origin(report["weights"])))
    if report["reason"]:
        rows.append(("reason", report["reason"]))
    print_table(("swap", "result"), rows)
