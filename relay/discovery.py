"""Discover the public addresses of this machine, which no interface has, from its cloud's metadata service.

The service has the same address in all clouds and no proxy. Another server may respond there: a response has a maximum
length, and all requests share one time limit.
"""

import json
import re
import time
from collections.abc import Callable, Container, Iterator
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple, TypeAlias

from relay.config import DiscoveryMethod, UsageError
from relay.core.addresses import Family
from relay.net.endpoint import Endpoint
from relay.net.http import Response, request
from relay.net.routes import own_addresses

AT = Endpoint("169.254.169.254", 80)
"""A name would depend on a name server."""

SECONDS = 10.0
"""Time limit of all requests together, with retries."""

ATTEMPT_SECONDS = 3.0
"""Time limit of one attempt."""

MAX_RESPONSE = 64 * 1024
"""Bytes of a response. Azure's list of all network interfaces is the longest: half a kilobyte for each address."""

FIRST_PAUSE = 0.25
"""Seconds before the second attempt; doubled before each further attempt."""

_SHOWN_CHARACTERS = 40
"""Characters of a response in an error."""

_RETRY = {410, 429, 500, 502, 503, 504}
"""Transient errors, according to the services' manuals. Azure: 410 during updates, and 429 after five requests in a second.
Google: 503 if the service is not there yet."""


class Metadata:
    """A client of the metadata service. All requests together may take `SECONDS` from now on."""

    def __init__(self, method: DiscoveryMethod) -> None:
        self._method = method
        self._until = time.monotonic() + SECONDS

    def ask(self, target: str, headers: dict[str, str], verb: str = "GET") -> Response:
        """Send a request for a path and query, and retry until there is a final response.

        Raises:
            UsageError: there is no HTTP response in time.
        """
        pause = FIRST_PAUSE
        headers = {"Host": AT.host} | headers
        while True:
            until = min(self._until, time.monotonic() + ATTEMPT_SECONDS)
            try:
                answer = request(AT, target, headers, until, limit=MAX_RESPONSE, method=verb)
            except TimeoutError:
                why = "timed out"
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
            else:
                if answer.status not in _RETRY:
                    return answer
                why = f"{answer.status} {HTTPStatus(answer.status).phrase}"
            if time.monotonic() + pause >= self._until:
                raise self.fault(f"{AT.host} gave no answer within {SECONDS:g} s ({why}): is this machine there?")
            time.sleep(pause)
            pause *= 2

    def text(self, answer: Response, what: str) -> str:
        """Return the text of a response.

        Raises:
            UsageError: the status is not 200.
        """
        if answer.status != HTTPStatus.OK:
            raise self.fault(f"{AT.host} answers {answer.status} to a question for {what}: is this machine there?")
        return answer.body.decode("utf-8", "replace")

    def words(self, answer: Response, what: str) -> list[str]:
        """Return the words of a response; none if the status is 404, or raise UsageError for another status than 200."""
        return [] if answer.status == HTTPStatus.NOT_FOUND else self.text(answer, what).split()

    def parse(self, answer: Response, what: str) -> Any:  # noqa: ANN401 - as JSON is
        """Parse a response in JSON.

        Raises:
            UsageError: the status is not 200, or the text is not JSON.
        """
        text = self.text(answer, what)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.fault(f"{_shown(text)} is not JSON: is this machine there?") from error

    def fault(self, text: str) -> UsageError:
        """Return an error with the reason and the remedy."""
        return UsageError(
            f"no public address by {self._method.value}: {text} Else give --public-ip4-addr or --public-ip6-addr"
        )


def _shown(text: str) -> str:
    """Return the beginning of a response, printable in one line of an error."""
    return ascii(text[:_SHOWN_CHARACTERS]) + ("..." if len(text) > _SHOWN_CHARACTERS else "")


Cloud: TypeAlias = Callable[[Metadata, Container[Family]], Iterator[str]]
"""Returns at least the addresses of the wanted families, the primary address first, internal addresses among them."""

_GCE = "/computeMetadata/v1/instance/network-interfaces/0"
_GCE_FLAVOR = "Google"
"""A required header of requests, against requests of web pages. In a response, proof of Google's server."""

_AWS = "/latest/meta-data"
_AWS_LIFETIME = "60"
"""The token's lifetime in seconds: longer than discovery takes."""
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,1024}")

_AZURE_INTERFACES = "/metadata/instance/network?api-version=2021-02-01&format=json"
_AZURE_BALANCER = "/metadata/loadbalancer?api-version=2020-10-01&format=json"


def _gce(metadata: Metadata, wanted: Container[Family]) -> Iterator[str]:
    """See https://cloud.google.com/compute/docs/metadata/default-metadata-values."""
    for family, name in ((Family.IPV4, "access-configs/0/external-ip"), (Family.IPV6, "ipv6s")):
        if family in wanted:
            answer = metadata.ask(f"{_GCE}/{name}", {"Metadata-Flavor": _GCE_FLAVOR})
            if answer.headers.get("metadata-flavor") != _GCE_FLAVOR:
                raise metadata.fault("what answers is not Google's metadata server: is this machine there?")
            yield from metadata.words(answer, name)


def _aws(metadata: Metadata, wanted: Container[Family]) -> Iterator[str]:
    """See https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html.

    Each request has a token, so that it works with version 1 of the service disabled.
    """
    token = {"X-aws-ec2-metadata-token": _aws_token(metadata)}

    def ask(name: str) -> list[str]:
        return metadata.words(metadata.ask(f"{_AWS}/{name}", token), name)

    if Family.IPV4 in wanted:
        yield from ask("public-ipv4")
    if Family.IPV6 in wanted:
        mac = " ".join(ask("mac"))
        if _MAC.fullmatch(mac) is None:
            raise metadata.fault(f"{_shown(mac)} is not a MAC address: is this machine there?")
        yield from ask(f"network/interfaces/macs/{mac}/ipv6s")


def _aws_token(metadata: Metadata) -> str:
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": _AWS_LIFETIME, "Content-Length": "0"}
    try:
        answer = metadata.ask("/latest/api/token", headers, "PUT")
    except UsageError as error:
        # Only the response with the token has a hop limit, which a container's network exceeds.
        raise metadata.fault(
            "the metadata service gave no token: is this machine there, is the service switched on and, in a container "
            "with a network of its own, its hop limit 2?"
        ) from error
    token = metadata.text(answer, "a token").strip()
    if _TOKEN.fullmatch(token) is None:
        raise metadata.fault(f"{_shown(token)} is not a token: is this machine there?")
    return token


def _azure(metadata: Metadata, _: Container[Family]) -> Iterator[str]:
    """See https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service.

    A public address of the Basic SKU is listed with the network interface. An address of the Standard SKU, the only SKU for
    new addresses, is an empty text there; it is listed under load balancers, even without a load balancer.
    """
    headers = {"Metadata": "true"}
    yield from _texts(metadata.parse(metadata.ask(_AZURE_INTERFACES, headers), "network interfaces"), "publicIpAddress")
    balancer = metadata.ask(_AZURE_BALANCER, headers)
    if balancer.status != HTTPStatus.NOT_FOUND:
        yield from _texts(metadata.parse(balancer, "public addresses"), "publicIpAddresses", "frontendIpAddress")


def _texts(value: object, *names: str) -> Iterator[str]:
    """Yield all texts under these names, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from _texts(each, *names)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(each, *(names[1:] if names[:1] == (key,) else names))
    elif isinstance(value, str) and value and not names:
        yield value


CLOUDS: dict[DiscoveryMethod, Cloud] = {
    DiscoveryMethod.GCE_METADATA: _gce,
    DiscoveryMethod.AWS_EC2_METADATA: _aws,
    DiscoveryMethod.AZURE_IMDS: _azure,
}


class PublicAddresses(NamedTuple):
    """The public addresses of this machine, by their names in `Config`."""

    public_ip4: IPv4Address | None
    public_ip6: IPv6Address | None


def has_ip6() -> bool:
    """Return whether this machine has an IPv6 address for the internet."""
    addresses = (ip_address(each) for each in own_addresses())
    return any(each.version == 6 and not each.is_link_local and not each.is_loopback for each in addresses)  # noqa: PLR2004


def discover(method: DiscoveryMethod, ip4: IPv4Address | None, ip6: IPv6Address | None) -> PublicAddresses:
    """Return the given public addresses, with missing addresses from the cloud.

    No request is sent if no address is missing. A public IPv6 address is useless to a machine without IPv6.

    Raises:
        UsageError: the service does not respond, its response is invalid, or there is not an address at all.
    """
    wanted = {Family.IPV4} if ip4 is None else set()
    if ip6 is None and has_ip6():
        wanted.add(Family.IPV6)
    if not wanted:
        return PublicAddresses(ip4, ip6)
    metadata = Metadata(method)
    for text in CLOUDS[method](metadata, wanted):
        try:
            address = ip_address(text)
        except ValueError as error:
            raise metadata.fault(f"{_shown(text)} is not an address: is this machine there?") from error
        if not address.is_global or address.is_multicast:
            continue  # internal addresses may come first
        if isinstance(address, IPv4Address):
            ip4 = ip4 or address
        elif Family.IPV6 in wanted:
            ip6 = ip6 or address
    if ip4 is None and ip6 is None:
        raise metadata.fault("this machine has none there: assign it one.")
    return PublicAddresses(ip4, ip6)
