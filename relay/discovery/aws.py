"""Amazon EC2, version 2 of its service (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html)."""

import re
from http import HTTPStatus

from relay.config import BadUseError
from relay.discovery.metadata import Metadata, shown

_DATA = "/latest/meta-data"

_LIFETIME = "60"
"""Seconds for which the token is good: longer than all that is asked takes."""

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,1024}")


class Aws:
    """What Amazon says of a machine's first interface.

    Everything is asked with a token that is asked for first, which also works where version 1 is switched off.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._token: dict[str, str] = {}

    def ip4(self) -> list[str]:
        """Give its public or elastic IPv4 address; the machine itself does not have it."""
        return self._ask("public-ipv4")

    def ip6(self) -> list[str]:
        """Give its IPv6 addresses, which the machine itself has."""
        macs = self._ask("mac")
        if not macs or _MAC.fullmatch(macs[0]) is None:
            raise self._metadata.fault(f"{shown(' '.join(macs))} is no MAC address: is this machine there?")
        return self._ask(f"network/interfaces/macs/{macs[0]}/ipv6s")

    def _ask(self, what: str) -> list[str]:
        if not self._token:
            self._token = {"X-aws-ec2-metadata-token": self._new_token()}
        answer = self._metadata.ask(f"{_DATA}/{what}", self._token)
        return [] if answer.status == HTTPStatus.NOT_FOUND else self._metadata.require(answer, what).split()

    def _new_token(self) -> str:
        try:
            answer = self._metadata.ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": _LIFETIME}, "PUT")
        except BadUseError as fault:
            # The answer to this question, and to no other, is thrown away by the second router on its way.
            raise self._metadata.fault(
                "the metadata service gave no token: is this machine there, is the service switched on and, in a container "
                "with a network of its own, its hop limit 2?"
            ) from fault
        token = self._metadata.require(answer, "a token").strip()
        if _TOKEN.fullmatch(token) is None:
            raise self._metadata.fault(f"{shown(token)} is no token: is this machine there?")
        return token
