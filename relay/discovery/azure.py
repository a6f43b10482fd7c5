"""Microsoft Azure (https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service).

A public address of the Basic SKU is told with the network interface; one of the Standard SKU, which is all that can be made
any more, is there an empty text, and told under the name of load balancers, whether or not there is one.
"""

from collections.abc import Iterator
from http import HTTPStatus

from relay.discovery.metadata import Metadata

_INTERFACES = "/metadata/instance/network?api-version=2021-02-01&format=json"
_LOAD_BALANCER = "/metadata/loadbalancer?api-version=2020-10-01&format=json"
_HEADERS = {"Metadata": "true"}


class Azure:
    """What Azure says of a machine's interfaces."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._found: list[str] | None = None

    def ip4(self) -> list[str]:
        """Give its public IPv4 addresses; the machine itself has none of them."""
        return [each for each in self._addresses() if ":" not in each]

    def ip6(self) -> list[str]:
        """Give its public IPv6 addresses, likewise."""
        return [each for each in self._addresses() if ":" in each]

    def _addresses(self) -> list[str]:
        if self._found is None:
            interfaces = self._metadata.parse(self._metadata.ask(_INTERFACES, _HEADERS), "network interfaces")
            found = list(_texts(interfaces, "publicIpAddress"))
            balancer = self._metadata.ask(_LOAD_BALANCER, _HEADERS)
            if balancer.status != HTTPStatus.NOT_FOUND:
                parsed = self._metadata.parse(balancer, "public addresses")
                found += _texts(_under(parsed, "loadbalancer", "publicIpAddresses"), "frontendIpAddress")
            self._found = found
        return self._found


def _under(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _texts(value: object, name: str) -> Iterator[str]:
    """Give all texts that have a name, however deep."""
    if isinstance(value, list):
        for each in value:
            yield from _texts(each, name)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == name and isinstance(each, str) and each:
                yield each
            else:
                yield from _texts(each, name)
