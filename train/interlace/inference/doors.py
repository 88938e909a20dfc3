"""Who may come in: the port, and what a request has to show before it is read. Without torch, so that a port in use is told at once."""

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from interlace.errors import InputError

try:
    import uvicorn  # noqa: F401 - needed later, and told now
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise InputError('--web and --serve need Starlette and uvicorn: pip install -e ".[serve]"') from None

from interlace.inference.endpoint import Refusal

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that hears `host` (a name or an address) at `port`; 0 takes a free one.

    Raises:
        InputError: the port is in use or not allowed, or the host is none of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port: expected 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise InputError(f"{host} port {port} cannot be opened: {reason}; give another --port (0 takes a free one) or --host") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


class Guard:
    """Lets requests through that are meant for us, and gives every answer its headers.

    A page of another site may not ask (Origin), nor one that has given its own name our address (Host: only addresses, localhost and our own names are taken),
    nor, with a key, anybody who does not have it.

    Args:
        app: what is guarded. names: of this machine, beside its addresses. api_key: "" for none. open_paths: need no key.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], api_key: str = "", open_paths: frozenset[str] = frozenset()):
        self.app, self.names, self.api_key, self.open_paths = app, names | {"localhost"}, api_key, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
        except Refusal as refusal:
            while (await receive()).get("more_body"):  # a client that still writes would not read the answer
                pass
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            await JSONResponse(refusal.body, refusal.status, headers)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check(self, headers: Headers, path: str) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refusal(403, f"the host {', '.join(hosts)[:200]!r} is not this server; use its address, or start it with this name as --host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != hosts[0]:
            raise Refusal(403, f"pages of {origin[:200]!r} may not use this server")
        given = headers.get("authorization", "")
        if self.api_key and path not in self.open_paths and not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise Refusal(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
