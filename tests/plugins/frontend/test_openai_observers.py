"""Routes that an installed observer adds."""

from __future__ import annotations

from pathlib import Path

from support.distributions import run_python, write_distribution

TESTS = Path(__file__).parents[2]

OBSERVER = """
from drivetrain.observers import hookimpl

@hookimpl
def add_routes(app):
    @app.get("/acme/hello", tags=["acme"])
    async def hello() -> dict[str, str]:
        return {"hello": "you"}
"""

ASK = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import httpx
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

with LiveServer(FakeEngine(), api_key="a-key") as server:
    print(server.get("/acme/hello").status_code)
    print(server.get("/acme/hello", headers={{"authorization": "Bearer a-key"}}).json())
    print("/acme/hello" in server.get("/openapi.json").json()["paths"])
"""


def test_a_route_of_an_observer_is_served_behind_the_key_and_documented(tmp_path: Path) -> None:
    write_distribution(
        tmp_path, "acme", {"drivetrain.observer": {"routes": "acme_routes"}}, {"acme_routes.py": OBSERVER}
    )
    assert run_python(ASK, tmp_path).splitlines()[-3:] == ["401", "{'hello': 'you'}", "True"]
