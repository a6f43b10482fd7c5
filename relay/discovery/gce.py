"""Google Compute Engine (https://cloud.google.com/compute/docs/metadata/default-metadata-values)."""

from http import HTTPStatus

from relay.discovery.metadata import Answer, Metadata

_INTERFACE = "/computeMetadata/v1/instance/network-interfaces/0"
_FLAVOR = {"Metadata-Flavor": "Google"}
"""Sent, it shows that no page of a browser asks; received, that it is Google who answers."""


class Gce:
    """What Google says of a machine's first interface."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def ip4(self) -> list[str]:
        """Give its external IPv4 address; the machine itself does not have it."""
        return self._ask("access-configs/0/external-ip")

    def ip6(self) -> list[str]:
        """Give its IPv6 addresses, internal ones among them."""
        return self._ask("ipv6s")

    def _ask(self, what: str) -> list[str]:
        answer = self._metadata.ask(f"{_INTERFACE}/{what}", _FLAVOR)
        self._recognise(answer)
        # There is no such thing, or it is empty: both are seen.
        return [] if answer.status == HTTPStatus.NOT_FOUND else self._metadata.require(answer, what).split()

    def _recognise(self, answer: Answer) -> None:
        if answer.headers.get("metadata-flavor") != "Google":
            raise self._metadata.fault("what answers is not Google's metadata server: is this machine there?")
