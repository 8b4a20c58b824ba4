"""Start and shut down the HTTP server.

The server binds the port, loads and warms up the model, and only then answers connections. SIGTERM or SIGINT drains the
server: new windows get 503, admitted requests are completed, and the exit code is 0. A second signal ends the process
at once with exit code 128 + signal number. SIGHUP is ignored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import uvicorn

from ctxtrain.errors import ConfigError
from ctxtrain.export.predictor import MinConfidence, Predictor
from ctxtrain.serve.app import make_app
from ctxtrain.serve.service import Limits, Service

IDLE_SECONDS = 75  # keep-alive timeout; longer than that of common proxies, so that the proxy closes first
BACKLOG = 2048  # uvicorn's default
SHUTDOWN_SECONDS = 5  # for clients to receive their responses after a drain
Announce = Callable[[str], None]


def serve(
    open_model: Callable[[], Predictor],
    address: tuple[str, int],
    limits: Limits,
    *,
    min_confidence: MinConfidence,
    access_log: bool,
    announce: Announce,
) -> None:
    """Serve a model at `address` (host and port) until a signal arrives. Port 0 selects a free port.

    `open_model` is called once the port is bound.

    When the server is ready, `announce` is called with one line of text that contains the URL. Raises ConfigError if
    the address cannot be bound, and the errors of `open_model` and `predict`.
    """
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # closing the terminal must not end the server
    with bind_socket(*address) as listener:
        service = Service(open_model(), limits, min_confidence)
        service.warm_up()
        config = uvicorn.Config(
            make_app(service, access_log=access_log),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        model = service.predictor
        _Server(config, service, lambda: announce(f"model {model.version} answers in {model.dtype} at {url}")).run(
            [listener]
        )


@contextmanager
def bind_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that is bound and listens. Raises ConfigError if the address is invalid or in use.

    Listening detects an address in use: with SO_REUSEADDR two processes can bind it, but only the first can listen.
    Clients that connect while the model loads wait until it is loaded.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only with a protocol: 40 ms less
    except (OSError, ValueError) as error:  # ValueError: an invalid host name
        raise ConfigError(
            f"--host must be an address of this machine, got {host!r} ({error}). Try 127.0.0.1."
        ) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"--host and --port must be a free address of this machine, got {host}:{port} ({error.strerror}). "
                "Give another --port or --host."
            ) from None
        yield listener


class _Server(uvicorn.Server):
    """A uvicorn server that calls `ready` when it accepts connections, and stops once the service is drained."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service = service
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.is_drained

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._drain_or_exit, number)
        yield

    def _drain_or_exit(self, number: int) -> None:
        if self.service.is_draining:
            os._exit(128 + number)
        self.service.drain()
