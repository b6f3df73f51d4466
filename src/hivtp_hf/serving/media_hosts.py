"""Hosts that images may be fetched from: those that the operator names, at addresses that are public or named as well."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable

ANY_HOST = "*"
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.IGNORECASE)
# IPv6 addresses that a translator turns into the IPv4 address in their last 32 bits.
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AllowedHosts:
    """What `--allowed-media-domains` names.

    Args:
        names: host names (exactly as in an address), IP addresses, networks (`10.0.0.0/8`), or `*` for every public host.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._networks: list[Network] = []
        for name in names:
            try:
                self._networks.append(ipaddress.ip_network(name))
            except ValueError:
                if name != ANY_HOST and not _HOST_NAME.fullmatch(name):
                    raise ValueError(
                        f"{name!r} is no host to fetch images from. Name a host (images.example.com, without https:// "
                        "and path), an IP address, a network (10.0.0.0/8), or * for every public host."
                    ) from None
                self._names.add(name.lower())

    def check_host(self, host: str) -> None:
        """A ValueError unless images may be fetched from a host of this name. Its addresses are another question."""
        address = _parsed(host)
        if ANY_HOST in self._names or (self._is_named(address) if address else host.lower() in self._names):
            return
        if not self._names and not self._networks:
            raise ValueError(
                "this server fetches no images from addresses. Send the image itself, as a data: URI, "
                "or have the server started with --allowed-media-domains."
            )
        raise ValueError(f"{host} is not among the hosts that this server fetches images from (--allowed-media-domains).")

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host that may be connected to.

        Whoever connects must take one of these and not the name: asked again, the name may stand for another address.
        """
        self.check_host(host)
        resolved = [host] if _parsed(host) else await _looked_up(host, port)
        allowed = [text for text in resolved if self._is_allowed(text)]
        if not allowed:
            raise ValueError(
                f"{host} is at an address that is not public, and this server fetches no images from there "
                "unless the address itself is named (--allowed-media-domains)."
            )
        return allowed

    def _is_allowed(self, text: str) -> bool:
        address = _parsed(text)
        return address is not None and (self._is_named(address) or all(map(_is_public, _meant(address))))

    def _is_named(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


async def _looked_up(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError(f"no address was found for {host}, from which an image was to be fetched.") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _parsed(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def _meant(address: Address) -> list[Address]:
    """An address, and the IPv4 address that it stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    inner: list[Address] = [address.sixtofour] if address.sixtofour else []
    if address in _TRANSLATED:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [address, *inner]


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast
