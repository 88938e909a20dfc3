"""Downloads images and videos that data names by URL: only when the user allows it, within limits, and never from inside the own network."""

import ipaddress
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from interlace.data.sample import BadRow

_MOST_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """What may be downloaded.

    Args:
        allowed_hosts: the only hosts to ask, private ones included; empty means every host with a public address.
        max_bytes: largest file.
        timeout_seconds: longest time for one file, redirects included.
    """

    allowed_hosts: tuple[str, ...] = ()
    max_bytes: int = 256 << 20
    timeout_seconds: float = 60.0


def download(url: str, policy: UrlPolicy) -> bytes:
    """The body behind an http or https URL. Every address, that of each redirect too, is checked before it is connected to, and that very address is used.

    Raises:
        BadRow: `url` for a host or address that is not allowed, `url_error` for anything that goes wrong on the way.
    """
    deadline = time.monotonic() + policy.timeout_seconds
    first = url
    try:
        with httpx.Client(timeout=policy.timeout_seconds, follow_redirects=False, headers={"User-Agent": "interlace", "Accept-Encoding": "identity"}) as client:
            for _ in range(_MOST_REDIRECTS + 1):
                if time.monotonic() > deadline:
                    raise BadRow("url_error", f"{first[:200]}: not done after {policy.timeout_seconds:g} seconds")
                address = checked_address(httpx.URL(url), policy)
                target = httpx.URL(url)
                headers, settings = {"Host": target.netloc.decode("ascii")}, {"sni_hostname": target.host}
                with client.stream("GET", target.copy_with(host=address), headers=headers, extensions=settings) as response:
                    if response.is_redirect:
                        url = str(target.join(response.headers["location"]))
                        continue
                    response.raise_for_status()
                    return _body(response, first, policy, deadline)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, KeyError, UnicodeError) as error:
        raise BadRow("url_error", f"{first[:200]}: {type(error).__name__}: {error}") from None
    raise BadRow("url_error", f"{first[:200]}: more than {_MOST_REDIRECTS} redirects")


def checked_address(url: httpx.URL, policy: UrlPolicy) -> str:
    """The address to connect to for a URL.

    Raises:
        BadRow: no http(s) URL, a host that is not listed, or an address that is not public.
        OSError: the host has no address.
    """
    if url.scheme not in ("http", "https") or not url.host:
        raise BadRow("url", f"{str(url)[:200]}: only http and https URLs are downloaded")
    if policy.allowed_hosts and url.host not in policy.allowed_hosts:
        raise BadRow("url", f"{str(url)[:200]}: {url.host} is not in allowed_url_hosts")
    found = socket.getaddrinfo(url.host, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    private = [address for address in addresses if not _is_public(ipaddress.ip_address(address))]
    if private and not policy.allowed_hosts:
        raise BadRow("url", f"{str(url)[:200]}: {url.host} is {private[0]}, which is no public address; list the host in allowed_url_hosts if you mean it")
    return addresses[0]


# IPv6 addresses that stand for an IPv4 address, which may be any
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast and not any(address in network for network in _TRANSLATED)


def _body(response: httpx.Response, url: str, policy: UrlPolicy, deadline: float) -> bytes:
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > policy.max_bytes:
            raise BadRow("url_error", f"{url[:200]}: more than {policy.max_bytes} bytes")
        if time.monotonic() > deadline:
            raise BadRow("url_error", f"{url[:200]}: not done after {policy.timeout_seconds:g} seconds")
    return bytes(body)


def is_url(text: str) -> bool:
    """Whether a path is written as a URL."""
    return "://" in text


def hosts(values: Sequence[str] | None) -> tuple[str, ...]:
    """Host names as they are compared: lower case."""
    return tuple(value.lower() for value in values or ())
