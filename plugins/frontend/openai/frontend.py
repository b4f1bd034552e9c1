"""The ``openai`` frontend: takes a socket, serves, drains and stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.frontend import Frontend
from drivetrain.errors import ConfigError
from drivetrain.plugins.frontend.openai.config import OpenAIConfig

if TYPE_CHECKING:
    import uvicorn

    from drivetrain.serving.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_CLOSE_SECONDS = 3
"""Time that connections get to take the last bytes once the engine has stopped."""
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_BIND_PROBLEMS = {
    errno.EADDRINUSE: ("port {port} of {host} is in use", "Choose another with frontend.port, or 0 for any free one."),
    errno.EACCES: ("port {port} of {host} needs more rights", "Choose a frontend.port above 1023."),
    errno.EADDRNOTAVAIL: ("{host} is no address of this machine", "Set frontend.host to 127.0.0.1 or 0.0.0.0."),
}


class OpenAIFrontend(Frontend):
    """HTTP server that speaks the OpenAI API, with a chat page, health and metrics."""

    Config = OpenAIConfig
    config: OpenAIConfig

    def __init__(self, config: OpenAIConfig) -> None:
        super().__init__(config)
        self._socket: socket.socket | None = None
        self._stopper: _Stopper | None = None

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"reserve"})

    def reserve(self) -> str:
        """Take the address before the model is loaded; returns the URL. :meth:`serve` uses what is taken here.

        Raises ConfigError when the address can't be had.
        """
        if self._socket is None:
            self._socket = _bind(self.config.host, self.config.port)
        return self.url

    @property
    def url(self) -> str:
        """Where the server is reached from this machine. Needs :meth:`reserve` or :meth:`serve` before."""
        if self._socket is None:
            raise ConfigError("no address is taken yet", where="frontend", hint="Call reserve() first.")
        host, port = self._socket.getsockname()[:2]
        host = _ANY_ADDRESS.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self, engine: AsyncEngine) -> None:
        """Serve until SIGTERM, SIGINT or :meth:`stop`; drain, shut ``engine`` down and return.

        While it drains, new requests are answered 503. A second signal stops at once. Signals are only seen in the
        main thread. Raises ConfigError when the address can't be had.
        """
        try:
            self.reserve()
            self._listen()
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve(engine))
        finally:
            self._release()

    def stop(self) -> None:
        """Do what a first SIGTERM does, and on a second call what a second one does. From any thread."""
        if self._stopper is not None:
            self._stopper.stop()

    def _listen(self) -> None:
        assert self._socket is not None
        # Two sockets may share a port until one of them listens, so this can fail though bind did not.
        try:
            self._socket.listen(_BACKLOG)
        except OSError as error:
            raise _bind_problem(error, self.config.host, self.config.port) from error
        self._socket.setblocking(False)

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _serve(self, engine: AsyncEngine) -> None:
        assert self._socket is not None
        self._stopper = stopper = _Stopper(asyncio.get_running_loop())
        server = _make_server(engine, self.config)
        with stopper.on_signals():
            serving = asyncio.create_task(server.serve(sockets=[self._socket]))
            try:
                print(f"Serving {engine.model_name} at {self.url} (stop with Ctrl+C)", flush=True)
                await _first_of(serving, stopper.first)
                await self._drain(engine, stopper)
            finally:
                await asyncio.to_thread(engine.shutdown)
                server.should_exit = True
                await _first_of(serving, stopper.second)
                server.force_exit = True
                await serving
                self._stopper = None

    async def _drain(self, engine: AsyncEngine, stopper: _Stopper) -> None:
        logger.info("draining: new requests are refused, running ones get %g s", self.config.drain_seconds)
        draining = asyncio.create_task(engine.drain(self.config.drain_seconds))
        await _first_of(draining, stopper.second)
        if not draining.done():
            draining.cancel()
            logger.warning("stopped before running requests were done")
        elif not draining.result():
            logger.warning("running requests were not done after %g s and are cut off", self.config.drain_seconds)


class _Stopper:
    """Two events, set one after the other by signals or calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: everything has stopped
            self.loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop, while inside; elsewhere than in the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            self.loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in numbers:
                self.loop.remove_signal_handler(number)


async def _first_of(task: asyncio.Task[Any], event: asyncio.Event) -> None:
    """Return when ``task`` is done or ``event`` is set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )[0]
    except socket.gaierror as error:
        raise ConfigError("the host has no address", where="frontend.host", found=host) from error
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a server start again at once after another; a port that somebody listens on is refused all the same.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise _bind_problem(error, host, port) from error
    return taken


def _bind_problem(error: OSError, host: str, port: int) -> ConfigError:
    what, hint = _BIND_PROBLEMS.get(
        error.errno or 0, (f"can't listen on {{host}} port {{port}}: {error.strerror}", None)
    )
    return ConfigError(what.format(host=host, port=port), where="frontend", hint=hint)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ModuleNotFoundError:  # not made for Windows
        return None
    return uvloop.new_event_loop


def _make_server(engine: AsyncEngine, config: OpenAIConfig) -> uvicorn.Server:
    # Imported here, so that describing this plugin does not import a web framework.
    import uvicorn

    from drivetrain.plugins.frontend.openai.app import create_app

    class Server(uvicorn.Server):
        """uvicorn's server, with the signals left to the frontend, which drains the engine first."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    settings = uvicorn.Config(
        create_app(engine, config),
        log_config=_log_config(config.log_level),
        log_level=config.log_level,
        access_log=config.log_level in ("info", "debug"),
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        server_header=False,
        lifespan="off",
        ws="none",
        http="auto",
        proxy_headers=False,
    )
    return Server(settings)


def _log_config(level: str) -> dict[str, Any]:
    """Lines of the server on stderr, so that stdout carries the address alone."""
    handler = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
            "access": {
                "()": "uvicorn.logging.AccessFormatter",
                "fmt": '%(asctime)s %(client_addr)s "%(request_line)s" %(status_code)s',
            },
        },
        "handlers": {
            "plain": handler | {"formatter": "plain"},
            "access": handler | {"formatter": "access"},
        },
        "loggers": {
            "uvicorn": {"handlers": ["plain"], "level": level.upper(), "propagate": False},
            "uvicorn.access": {"handlers": ["access"], "level": level.upper(), "propagate": False},
            "drivetrain.plugins.frontend.openai": {"level": level.upper()},
        },
    }
