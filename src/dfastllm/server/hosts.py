"""Which names a server answers to (the Host header): the defence of a server on this machine against web pages.

A page of another site can have its own name resolve to 127.0.0.1 once it is loaded ("DNS rebinding"); the browser then
takes this server for a part of that site and lets the page read every answer. It sends the site's name as Host, by
which it is known. A name that pages can have belongs to the public DNS and so has a dot; addresses, names without a dot
and the names that are reserved for the machine itself cannot be rebound, and are always taken.
"""

from __future__ import annotations

import ipaddress

from dfastllm.settings import Settings

__all__ = ["Hosts", "host_of", "is_loopback"]

# Names with a dot that mean this machine: RFC 6761, and what containers call their host.
_OWN = ("localhost.localdomain", "host.docker.internal", "host.containers.internal")
_OWN_SUFFIX = ".localhost"


class Hosts:
    """The names of one server.

    checked  whether names are looked at: where `allowed_hosts` names some, and by default where the server listens on
             a loopback address without an API key (a page does not have the key; a server for others has a name that
             only its owner knows).
    names    those that are taken besides the ones that cannot be rebound; "*.example.com" is any name below that.
    """

    def __init__(self, settings: Settings) -> None:
        names = tuple(name.lower().rstrip(".") for name in settings.allowed_hosts)
        keyed = settings.api_key is not None or settings.tenants_db is not None
        alone = settings.uds is None and not keyed and is_loopback(settings.host)
        self.checked = "*" not in names and (bool(names) or alone)
        self.names = frozenset((*names, settings.host.lower(), *_OWN))

    def takes(self, header: str) -> bool:
        """Whether a Host header of this value is one of ours. An empty one is: browsers always send theirs."""
        if not self.checked:
            return True
        host = host_of(header)
        if "." not in host or host in self.names or host.endswith(_OWN_SUFFIX) or _address(host) is not None:
            return True
        parents = host.split(".")[1:]
        return any("*." + ".".join(parents[at:]) in self.names for at in range(len(parents)))


def host_of(header: str) -> str:
    """The name or address of a Host header, in lower case, without port, brackets and the root's dot."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    address = _address(host.strip("[]"))
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
