"""Decides who may see the dashboard and what they may change: a WSGI layer around it.

optuna-dashboard has no authentication and no protection against requests that another site makes a
browser send, and it would delete studies on request. So this layer decides on every request,
whatever it asks for: pages, API, report.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import html
import ipaddress
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from mergesearch.merging import InputError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Where a token is looked for if there is no file.
TOKEN_VARIABLE = "MERGESEARCH_DASHBOARD_TOKEN"
#: Fewer characters could be guessed.
SHORTEST_TOKEN = 16
#: Characters of a token file that are read.
TOKEN_LIMIT = 1 << 16
#: A browser is let in for so many seconds before it needs the token again.
SESSION_SECONDS = 12 * 3600
#: The only writes there are: the notes of a study and of its trials. All others would change or
#: delete results.
NOTE_PATH = re.compile(r"/api/studies/\d+(/\d+)?/note/?")
READS = ("GET", "HEAD")
SAFETY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Referrer-Policy", "same-origin"),
)


@dataclass(frozen=True)
class Access:
    """Conditions on a request; each that is given must hold.

    Args:
        token: Secret that every request brings: once as ``?token=``, then as a cookie, or as
            ``Authorization: Bearer``.
        proxy_header: Header that a reverse proxy sets once it knows the user, as
            ``X-Forwarded-User``.
        allow_writes: Whether notes may be edited, from the dashboard's own pages.
        any_host: Whether it may be opened by any name; otherwise only by a loopback name.
    """

    token: str | None = None
    proxy_header: str | None = None
    allow_writes: bool = False
    any_host: bool = False

    def __post_init__(self) -> None:
        if self.token is not None:
            _check_token(self.token, "token")
        if self.proxy_header is not None and not re.fullmatch(
            r"[A-Za-z][A-Za-z0-9-]*", self.proxy_header
        ):
            raise InputError(
                "proxy header: expected a header's name like X-Forwarded-User, received "
                f"{self.proxy_header!r}"
            )
        if self.allow_writes and self.token is None:
            raise InputError(
                "writes: expected a token for a dashboard that can be written to, received none; "
                "give one"
            )


def read_token(path: Path) -> str:
    """The token in ``path``; a missing file is made, with a new token that only its owner reads.

    Raises:
        InputError: If others can read the file, if it cannot be read or made, or if the token is
            too short.
    """
    with contextlib.suppress(FileExistsError):
        return _new_token(path)
    if not path.is_file() and not path.is_dir():  # a pipe would wait for ever
        raise InputError(f"{path}: expected a file with a token, received a pipe or device")
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            token = file.read(TOKEN_LIMIT).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected a file with a token, received: {_reason(error)}"
        ) from None
    if mode & 0o077:
        raise InputError(
            f"{path}: expected a token that only its owner can read, received mode {mode:04o}; run "
            "`chmod 600` on it, and make a new one if others may have read it"
        )
    return _check_token(token, str(path))


def find_token(path: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token in the file if one is named, else in ``MERGESEARCH_DASHBOARD_TOKEN``, else None.

    Raises:
        InputError: As :func:`read_token`.
    """
    if path is not None:
        return read_token(path)
    token = environment.get(TOKEN_VARIABLE, "").strip()
    return _check_token(token, TOKEN_VARIABLE) if token else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded(application: WSGIApplication, access: Access) -> WSGIApplication:
    """``application``, for the requests that ``access`` allows."""

    def guard(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        refused = _refusal(environ, access)
        if refused is not None:
            return answer(environ, start_response, *refused)
        if access.token is not None and "token" in dict(_query(environ)):
            return _let_in(environ, start_response, access.token)
        return application(environ, start_response)

    return _with_safety_headers(guard)


def answer(
    environ: WSGIEnvironment,
    start_response: StartResponse,
    status: str,
    body: str | bytes,
    headers: Mapping[str, str] | None = None,
    kind: str = "text/plain",
) -> list[bytes]:
    """A whole answer; its body is left out for HEAD."""
    content = body.encode() if isinstance(body, str) else body
    common = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
    start_response(status, [*common.items(), *(headers or {}).items()])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]


def _refusal(environ: WSGIEnvironment, access: Access) -> tuple[str, str, dict[str, str]] | None:
    """Status, one line of help and headers, or None for a request that may pass."""
    if not access.any_host and not is_loopback(_name(environ.get("HTTP_HOST", ""))):
        text = (
            "expected to be opened as localhost, received another name; other names need a token\n"
        )
        return "403 Forbidden", text, {}
    if (
        access.proxy_header is not None
        and not environ.get(_variable(access.proxy_header), "").strip()
    ):
        return (
            "401 Unauthorized",
            f"expected {access.proxy_header}, received none; open it through the proxy\n",
            {},
        )
    if access.token is not None and not _is_known(environ, access.token):
        text = "expected the dashboard's token, received none or another; open /?token=TOKEN once\n"
        return (
            "401 Unauthorized",
            text,
            {"WWW-Authenticate": 'Bearer realm="dashboard"', "Cache-Control": "no-store"},
        )
    return None if environ["REQUEST_METHOD"] in READS else _write_refusal(environ, access)


def _write_refusal(
    environ: WSGIEnvironment, access: Access
) -> tuple[str, str, dict[str, str]] | None:
    if not access.allow_writes:
        return "405 Method Not Allowed", "This dashboard is read-only.\n", {"Allow": "GET, HEAD"}
    if environ["REQUEST_METHOD"] != "PUT" or not NOTE_PATH.fullmatch(environ.get("PATH_INFO", "")):
        return "405 Method Not Allowed", "Only notes can be written here.\n", {"Allow": "GET, HEAD"}
    if not _is_own(environ):
        return (
            "403 Forbidden",
            "expected a request from the dashboard's own page, received another site's\n",
            {},
        )
    return None


def _is_own(environ: WSGIEnvironment) -> bool:
    """Whether the dashboard's own page sent the request, or a program that is no browser.

    Browsers always name the origin of a write.
    """
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") != "same-origin":
        return False
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        return "HTTP_AUTHORIZATION" in environ
    # Browsers send "null" where they must not name the origin.
    return (
        bool(environ.get("HTTP_HOST"))
        and origin.partition("://")[2].lower() == environ["HTTP_HOST"].lower()
    )


def _is_known(environ: WSGIEnvironment, token: str) -> bool:
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer":
        return _same(credentials.strip(), token)
    given = dict(_query(environ)).get("token")
    return _same(given, token) if given is not None else _has_session(environ, token)


def _has_session(environ: WSGIEnvironment, token: str) -> bool:
    name = _cookie_name(token)
    for part in environ.get("HTTP_COOKIE", "").split(";"):
        key, _, value = part.strip().partition("=")
        until = value.partition(".")[0]
        if key == name and re.fullmatch(r"\d{1,12}", until) and int(until) > time.time():
            return _same(value, _session(token, int(until)))
    return False


def _session(token: str, until: int) -> str:
    """The cookie's value, which does not reveal the token and ends with it or at ``until``."""
    return f"{until}.{_digest(token, f'session until {until}')}"


def _cookie_name(token: str) -> str:
    # Cookies are shared by all ports of a host: two dashboards must not read each other's.
    return f"mergesearch_{_digest(token, 'name')[:12]}"


def _digest(token: str, message: str) -> str:
    return hmac.new(
        token.encode(), f"mergesearch dashboard: {message}".encode(), hashlib.sha256
    ).hexdigest()


def _same(given: str, expected: str) -> bool:
    # "surrogatepass": text that cannot be a token must be refused without an exception.
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def _let_in(environ: WSGIEnvironment, start_response: StartResponse, token: str) -> list[bytes]:
    """Redirect to the same page without the token, which would stay in the browser's history."""
    until = int(time.time()) + SESSION_SECONDS
    cookie = (
        f"{_cookie_name(token)}={_session(token, until)}; Path=/; Max-Age={SESSION_SECONDS}; "
        "HttpOnly"
    )
    secure = "; Secure" if environ.get("HTTP_X_FORWARDED_PROTO") == "https" else ""
    headers = {"Set-Cookie": f"{cookie}; SameSite=Strict{secure}", "Cache-Control": "no-store"}
    target = _without_token(environ)
    if environ.get("HTTP_SEC_FETCH_SITE") == "cross-site":
        # Browsers send no strict cookie along a redirect from another site; from a page of ours
        # they do.
        page = f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(target)}">'
        return answer(environ, start_response, "200 OK", page, headers, "text/html")
    return answer(environ, start_response, "303 See Other", "", headers | {"Location": target})


def _without_token(environ: WSGIEnvironment) -> str:
    # One slash: two slashes would name another host.
    path = "/" + quote(environ.get("PATH_INFO", "").encode("latin-1").lstrip(b"/\\"))
    rest = urlencode([(key, value) for key, value in _query(environ) if key != "token"])
    return f"{path}?{rest}" if rest else path


def _query(environ: WSGIEnvironment) -> list[tuple[str, str]]:
    try:
        return parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    except ValueError:  # too many fields
        return []


def _name(host: str) -> str:
    """The name in ``Host``, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _variable(header: str) -> str:
    return f"HTTP_{header.upper().replace('-', '_')}"


def _with_safety_headers(application: WSGIApplication) -> WSGIApplication:
    """``application`` with headers of ours, and without the leave for other sites to read files."""

    def safe(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status, headers, exc_info=None):  # type: ignore[no-untyped-def]
            kept = [each for each in headers if each[0].lower() != "access-control-allow-origin"]
            return start_response(status, [*kept, *SAFETY_HEADERS], exc_info)

        return application(environ, start)

    return safe


def _new_token(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(f"{token}\n")
    except FileExistsError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: expected a place for a new token, received: {_reason(error)}"
        ) from None
    return token


def _check_token(token: str, where: str) -> str:
    if (
        len(token) < SHORTEST_TOKEN
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise InputError(
            f"{where}: expected a token of {SHORTEST_TOKEN} or more ASCII characters without "
            f"spaces, received {len(token)} characters; name a file that does not exist to have "
            "one made"
        )
    return token


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
