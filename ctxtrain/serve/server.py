"""From a model's path to a process that answers HTTP, and its end.

The port is taken first, the model opened and warmed, and only then are connections accepted. SIGTERM or SIGINT drains:
new windows are refused with 503, what was let in is answered, and the process ends with 0, because nothing was lost. A
second signal ends it at once with 128 + its number. SIGHUP changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from ctxtrain.errors import ConfigError
from ctxtrain.export.predictor import MinConfidence, load_model
from ctxtrain.serve.app import make_app
from ctxtrain.serve.service import Limits, Service

IDLE_SECONDS = 75  # a connection without requests; longer than proxies commonly keep theirs, so that they close first
BACKLOG = 2048  # as uvicorn's
LAST_SECONDS = 5  # for clients to take their answers after a drain
Announce = Callable[[str], None]


def serve(
    model: Path,
    place: tuple[str, int],
    limits: Limits,
    *,
    min_confidence: MinConfidence,
    access_log: bool,
    announce: Announce,
) -> None:
    """Answer at host and port until a signal. `announce` is told the address once it answers; port 0 takes a free one.

    Raises ConfigError for an address that cannot be taken, and what `load_model` and `predict` raise.
    """
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a server outlives its terminal, as a run does
    with bound(*place) as listener:
        service = Service(load_model(model), limits, min_confidence)
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
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        address, taken = listener.getsockname()[:2]
        url = f"http://[{address}]:{taken}" if ":" in address else f"http://{address}:{taken}"
        _Server(config, service, lambda: announce(f"model {service.predictor.version} answers at {url}")).run(
            [listener]
        )


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address and listens: of two that have bound one, only the first to listen keeps it.

    Who connects before the model is open waits until it is.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # with its protocol, or asyncio leaves Nagle's delay on: 40 ms
    except (OSError, ValueError) as error:  # a name that no rule of names allows is a ValueError
        raise ConfigError(f"--host must be an address of this machine, got {host!r} ({error}).") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be taken ({error.strerror}). Give another --port or --host."
            ) from None
        yield listener


class _Server(uvicorn.Server):
    """uvicorn's server with our own end: it closes the port only when the service is drained."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service = service
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.drained

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        yield

    def _stop(self, number: int) -> None:
        if self.service.draining:
            os._exit(128 + number)
        self.service.drain()
