"""Who may use the page: whoever has the address that was printed, and no other page of the same browser.

A page on the web can make a browser send requests to this machine, under names of its own choice (DNS rebinding). So:
only this machine's own names are served; a token from the printed address, kept in a cookie that no other site's
request carries, opens everything; nothing changes by GET; and what changes something says that it comes from here.
"""

import hmac
import secrets
from collections.abc import Mapping

# No script, style or frame but our own; nobody may put the page into a frame.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with "no-referrer" a browser does not say where its forms come from
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE_LIFE_S = 30 * 86_400
TOKEN_BYTES = 24


class Guard:
    """The rules of one page; `refusal` is asked about each request."""

    def __init__(self, port: int, token: str = "") -> None:
        """`port` is the page's own; without a token there is a new one."""
        self._token = token or secrets.token_urlsafe(TOKEN_BYTES)
        self._port = port
        self.cookie = f"dps_emulator_{port}"  # cookies do not tell ports apart
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    @property
    def address(self) -> str:
        """What opens the page; whoever has it may do what the page can do."""
        return f"http://127.0.0.1:{self._port}/?token={self._token}"

    @property
    def set_cookie(self) -> str:
        """The header's value that keeps the token in the browser."""
        return f"{self.cookie}={self._token}; Path=/; Max-Age={COOKIE_LIFE_S}; HttpOnly; SameSite=Strict"

    def opens(self, token: str) -> bool:
        """Whether this is the token of the address."""
        return hmac.compare_digest(token.encode(), self._token.encode())

    def refusal(self, method: str, headers: Mapping[str, str], cookies: Mapping[str, str]) -> tuple[int, str] | None:
        """HTTP status and sentence for a request that is refused, or None; names of headers in lower case."""
        host = headers.get("host", "")
        if host not in self._hosts:
            return 421, f"the page is at 127.0.0.1:{self._port} and under no other name"
        if not self.opens(cookies.get(self.cookie, "")):
            return 403, "open the address that 'dps-emulator serve --web' has printed: it has the token in it"
        if method in ("GET", "HEAD"):
            return None
        if (
            headers.get("origin", "") != f"http://{host}"
            or headers.get("sec-fetch-site", "same-origin") != "same-origin"
        ):
            return 403, "this request comes from another page"
        return None
