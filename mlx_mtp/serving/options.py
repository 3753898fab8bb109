"""What a server allows, and the names of hosts and web pages that it lets in, in the spelling of HTTP's headers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlx_mtp.errors import OptionError
from mlx_mtp.generation import checks
from mlx_mtp.generation.types import Sampling

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# A Host header: a name, an IPv4 address or an IPv6 address in brackets; perhaps a port (RFC 9110, 7.2; RFC 3986, 3.2).
HOST = re.compile(r"(?:(?P<name>[\w.~%!$&'()*+,;=-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(?::[0-9]{0,5})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server allows. Sizes in bytes, times in seconds.

    model: the name it serves the engine under; others: names it also takes. api_key: None = none is needed, for
    loopback only. hosts: names in the Host header that are let in, None = all. origins: web pages that may ask (CORS).
    tokens: of a reply whose request names no number; most_tokens: that a request may ask for, None = the context.
    sampling, seed: where a request leaves them open. session_bytes: K/V kept between requests. body_seconds: for a
    body to arrive. stall_seconds: for a client to take what was sent. quiet_seconds: of silence after which a streamed
    reply gets a comment that says what it waits for. lenient: fields of a request that are not known are dropped and
    named in a header, in place of being refused.
    """

    model: str = "default"
    others: Collection[str] = ()
    api_key: str | None = None
    hosts: Collection[str] | None = LOOPBACK_NAMES
    origins: Collection[str] = ()
    tokens: int = 1024
    most_tokens: int | None = None
    sampling: Sampling = Sampling()
    seed: int | None = None
    session_bytes: int = 1_000_000_000
    body_bytes: int = 8_000_000
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    quiet_seconds: float = 3.0
    lenient: bool = False

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and key == key.strip()):
            raise OptionError("The API key must be printable ASCII characters without blanks around them.")
        if self.hosts is not None:
            object.__setattr__(self, "hosts", frozenset(map(allowed_host, self.hosts)))
        object.__setattr__(self, "origins", [allowed_origin(one) for one in self.origins])
        for name, low in {"tokens": 1, "most_tokens": 1, "seed": 0, "body_bytes": 1, "session_bytes": 0}.items():
            if (value := getattr(self, name)) is not None:
                checks.whole(name, value, low, 2**64 - 1)


def hosts_of(host: str, others: Collection[str], api_key: str | None) -> Collection[str] | None:
    """The names that a server which listens on `host` lets in: None, which is all, where a key is needed and no others
    are named. OptionError where more than this machine can reach it without a key; names but localhost count so."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if api_key is None and not loopback:
        raise OptionError(
            f"Others can reach {host}: give a key with --api-key (or MLX_MTP_API_KEY), or listen on 127.0.0.1."
        )
    return None if api_key is not None and not others else {*LOOPBACK_NAMES, host, *others}


def host_name(header: str) -> str | None:
    """The name in a Host header, in one spelling: in lower case, without port, brackets and the root's dot, an IPv6
    address compressed. None for what is no such header.
    """
    match = HOST.fullmatch(header)
    if match is None:
        return None
    if match["name"] is not None:
        return match["name"].lower().removesuffix(".") or None
    try:
        return ipaddress.IPv6Address(match["address"]).compressed
    except ValueError:
        return None


def allowed_host(name: str) -> str:
    """A name or address of a server as `host_name` spells it; OptionError for anything else, a port among it."""
    found = host_name(f"[{name.strip('[]')}]" if ":" in name else name)
    if found is None or "*" in name:
        raise OptionError(
            f"{name!r} is no host: give a name or an address without a port, such as host.docker.internal."
        )
    return found


def allowed_origin(text: str) -> str:
    """A web page's origin as browsers send it, '*' or 'null'; OptionError for what no browser would ever send."""
    if text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text.strip())
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:  # UnicodeError too
        host, port, parts = "", None, urlsplit("")
    bare = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc or "*" in host)
    if not parts.scheme or not host or not bare:
        raise OptionError(
            f"{text!r} is no origin of a web page: give one such as https://app.example or http://localhost:3000, "
            "'*' or 'null'."
        )
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{host}" + ("" if port in (None, usual) else f":{port}")
