"""Which requests are let in: those of the page itself, from people it knows, and of a size it has use for."""

import base64
import functools
import hmac
import ipaddress
import socket
from collections import deque
from collections.abc import Mapping
from time import monotonic
from urllib.parse import urlsplit

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
MAX_UPLOAD = 20 * 2**20
MAX_UPLOADS = 200 * 2**20  # within the time that they are kept
UPLOADS_KEPT_SECONDS = 3600
MAX_BODY = 2**20  # of any other request, and of what surrounds the file in an upload
# The page may ask nobody but its own server for anything.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class Guard:
    """Lets in requests that name this machine as their host, that come from no other web page, that know the
    password where there is one, and that are not too large.

    A page of somebody else's in the same browser could otherwise draw, read and fill the disk: by DNS rebinding
    (Host) or by simple requests across origins (Origin).
    """

    def __init__(self, app: ASGIApp, any_address: bool = False, password: str = "") -> None:
        self.app, self.any_address, self.password = app, any_address, password
        self._uploads: deque[tuple[float, int]] = deque()  # when, and how many bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 411 or 413, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._stranger(headers) or self._too_large(scope["path"], headers)
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self.app(scope, receive, functools.partial(_with_policy, send))

    def _stranger(self, headers: Mapping[str, str]) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_here(host) or origin not in (None, f"http://{host}", f"https://{host}"):
            return Response("This address does not belong to this server.", 403)
        if self.password and not self._knows(headers.get("authorization", "")):
            ask = {"WWW-Authenticate": 'Basic realm="ldm", charset="UTF-8"'}
            return Response("Name and password are needed.", 401, ask)
        return None

    def _is_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or (self.any_address and name == socket.gethostname().lower()) if host else False
        return self.any_address or address.is_loopback

    def _knows(self, header: str) -> bool:
        expected = "Basic " + base64.b64encode(self.password.encode()).decode("ascii")
        return hmac.compare_digest(header.encode(), expected.encode())

    def _too_large(self, path: str, headers: Mapping[str, str]) -> Response | None:
        """By what the request says of itself: the HTTP server reads no more than that."""
        if "transfer-encoding" in headers:
            return Response("The length of the request is needed.", 411)
        length, uploads = int(headers.get("content-length", 0)), path.rstrip("/") == UPLOAD
        if length > MAX_BODY + (MAX_UPLOAD if uploads else 0):
            return Response("That is too large.", 413)
        if uploads:
            now = monotonic()
            while self._uploads and self._uploads[0][0] < now - UPLOADS_KEPT_SECONDS:
                self._uploads.popleft()
            if sum(size for _, size in self._uploads) + length > MAX_UPLOADS:
                return Response("Too much was uploaded within the last hour; try again later.", 413)
            self._uploads.append((now, length))
        return None


async def _with_policy(send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        headers = message.setdefault("headers", [])
        assert isinstance(headers, list)
        headers.append((b"content-security-policy", POLICY.encode("ascii")))
    await send(message)
