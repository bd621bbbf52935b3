"""What every server here needs: a listening socket, a check of the Host header, and a limit on slow requests."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Iterable
from typing import Any

from alter.core import UserError
from alter.serving.protocol import error_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address.

    Raises:
        UserError: it is taken, or not an address of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # the port is held while the model loads
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Give another `port` (0 takes any) or `host`."
        ) from None
    return listener


def address(host: str, listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _name(host: str) -> str:
    """Return a Host header's name without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


class HostGuard:
    """An ASGI application that answers only under its own names.

    A page of another site can make a browser send requests to this machine under that site's name (DNS rebinding); those
    are refused. An IP address is no name that a site could point elsewhere, so it is always taken.

    Args:
        app: the application behind.
        host: address that it listens on.
        allowed: further names; "*" takes all.
    """

    def __init__(self, app: Any, host: str, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.names = {name.lower() for name in (*LOOPBACK, host, *allowed)}

    def takes(self, host: str) -> bool:
        """Tell whether requests under this Host header are answered."""
        name = _name(host)
        if "*" in self.names or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a connection on, or refuse it with status 400."""
        given = dict(scope.get("headers") or []).get(b"host", b"").decode("latin-1")
        if scope["type"] == "lifespan" or self.takes(given):
            await self.app(scope, receive, send)
            return
        text = f"This server does not answer under the name {given!r}: `allowed_hosts` adds names."
        body = json.dumps(error_body(text)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def patient_for(seconds: float) -> Any:
    """Return uvicorn's HTTP protocol class with a time limit on a request's head once it has begun."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self.late is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self.late = self.loop.call_later(seconds, self.transport.close)

        def _stop(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Patient
