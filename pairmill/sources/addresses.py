"""Which addresses may be fetched: http and https on the public internet, checked before a socket is opened."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from schemas.reasons import Reason

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_NAME = re.compile(r"[a-z0-9_.\-]{1,253}")
_SAFE = "%/:=&?~+!$,;'@()*[]|"
"""Left as they are in paths and queries: %XX above all, since signed URLs break when they are quoted anew."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(Exception):
    """A URL that must not be fetched. Carries the row's reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Address:
    """A URL that may be fetched, quoted, without fragment."""

    url: str
    host: str
    """Lower case, in its ASCII form; an IPv6 address without brackets."""


def parse(url: str, allow_private: bool = False) -> Address:
    """Check a URL and quote what is not ASCII or is a space in it. Names are not resolved here.

    Raises:
        AddressRefused: another scheme, credentials, control characters, an invalid host or port, or, unless
            `allow_private`, an address that is not on the public internet, in any spelling.
    """
    text = url.strip(" ")
    if _CONTROL.search(text):
        raise AddressRefused(Reason.URL_INVALID, "a control character in the URL")
    if not (scheme := _SCHEME.match(text)):
        raise AddressRefused(Reason.URL_INVALID, "no scheme such as https:")
    if scheme[0].lower() not in ("http:", "https:"):
        raise AddressRefused(Reason.URL_SCHEME, f"the scheme {scheme[0][:20]!r}; only http and https are fetched")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(Reason.URL_INVALID, f"not a URL: {error}"[:200]) from error
    if "@" in parts.netloc:
        raise AddressRefused(Reason.URL_USERINFO, "credentials in the URL")
    host = _host(parts.hostname or "")
    if not allow_private and (ip := literal(host)) is not None and not is_public(ip):
        raise AddressRefused(Reason.URL_PRIVATE_ADDRESS, f"{host} is not on the public internet")
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port is not None else ""
    path = quote(parts.path, safe=_SAFE, errors="replace") or "/"
    query = f"?{quote(parts.query, safe=_SAFE, errors='replace')}" if parts.query else ""
    return Address(f"{parts.scheme.lower()}://{netloc}{path}{query}", host)


def redirect(base: Address, location: str, allow_private: bool = False) -> Address:
    """Where a redirect leads.

    Raises:
        AddressRefused: with reason ``url.redirect_refused``, when `parse` refuses it.
    """
    # header bytes that are not UTF-8 come as surrogates; as Latin-1 they are what the server meant
    target = location.encode("utf-8", "surrogateescape")
    try:
        text = target.decode("utf-8")
    except UnicodeDecodeError:
        text = target.decode("latin-1")
    try:
        return parse(urljoin(base.url, text.strip(" ")), allow_private)
    except (AddressRefused, ValueError) as error:
        raise AddressRefused(Reason.URL_REDIRECT_REFUSED, f"a redirect to a refused address: {error}") from error


def _host(name: str) -> str:
    host = name.lower()
    if not host:
        raise AddressRefused(Reason.URL_INVALID, "no host")
    if ":" in host:
        try:
            return str(ipaddress.ip_address(host))
        except ValueError as error:
            raise AddressRefused(Reason.URL_INVALID, "an invalid IPv6 address") from error
    if not host.isascii():
        host = _ascii_host(host)
    if not _HOST_NAME.fullmatch(host):
        raise AddressRefused(Reason.URL_INVALID, "an invalid host name")
    return host


def _ascii_host(host: str) -> str:
    """The IDNA form, with the mapping browsers apply: full-width digits become digits, so addresses show."""
    import idna

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError) as error:
        raise AddressRefused(Reason.URL_INVALID, "an invalid international host name") from error


IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def literal(host: str) -> IpAddress | None:
    """The IP address that a host spells, in any spelling that C libraries take (``127.1``, ``0x7f000001``,
    ``017700000001``, ``2130706433``), or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return None


def is_public(ip: IpAddress) -> bool:
    """Whether an address is on the public internet: not loopback, private, shared, link-local (where clouds keep their
    metadata), unique-local, multicast or reserved, nor an IPv6 form that carries such an IPv4 address."""
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64 or int(ip) >> 32 == 0:  # NAT64, and the old v4-compatible form
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(embedded)
        if ip.teredo is not None or ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def without_secrets(url: str) -> str:
    """A URL for messages: no credentials, no query, at most 200 characters."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]


def without_controls(text: str) -> str:
    """A server's words for messages: control characters become spaces."""
    return _CONTROL.sub(" ", text)
