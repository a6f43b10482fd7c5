"""The expected response to each request: the rules of the RFCs in their order."""

from typing import TYPE_CHECKING

from tests.simulation import wire
from tests.simulation.budgets import network_of
from tests.simulation.holdings import Allocation
from tests.simulation.wire import Address, Wire

if TYPE_CHECKING:
    from tests.simulation.referee import Referee

_METHODS = (wire.BINDING, wire.ALLOCATE, wire.REFRESH, wire.CREATE_PERMISSION, wire.CHANNEL_BIND)
_KNOWN = (1, 6, 8, 9, 0xA, 0xC, 0xD, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x20, 0x22)


class Judge:
    """Predicts the response to a request, and records its effects."""

    def __init__(self, referee: "Referee") -> None:
        self._referee = referee
        self._keys: dict[str, bytes] = {}

    def judge(self, request: Wire, client: Address, now: float, unix: float) -> None:
        if request.method not in _METHODS:
            self._referee.drops["STUN"] += 1
            return
        username = None if request.method == wire.BINDING else _username(request.get(wire.USERNAME))
        key = None if username is None else self._key_of(username)
        if any(type_ < 0x8000 and type_ not in _KNOWN for type_, _ in request.attributes):
            self._owe_unproven(client, request, 420, key, now)
        elif request.method == wire.BINDING:
            mapped = (wire.MAPPED_ADDRESS, wire.address(client, request.transaction))
            self._owe_unproven(client, request, 0, None, now, mapped)
        elif code := self._challenge(request, client, now, unix):
            self._owe_unproven(client, request, code, key, now)
        elif username is not None and key is not None:
            self._judge_proven(request, client, username, key, now)

    def _challenge(self, request: Wire, client: Address, now: float, unix: float) -> int:
        """Return the error code of the credentials; 0 for valid credentials."""
        nonce = request.get(wire.NONCE)
        if request.mac is None or nonce is None:
            return 401
        named = request.get(wire.USERNAME)
        if named is None or request.get(wire.REALM) is None:
            return 400
        if not self._referee.knows_nonce(nonce, client, now):
            return 438
        username = _username(named)
        if username is None or int(username.split(":")[0]) < unix or not request.is_signed_with(self._key_of(username)):
            return 401
        return 0

    def _judge_proven(self, request: Wire, client: Address, username: str, key: bytes, now: float) -> None:
        held = self._referee.holdings.by_client.get(client)
        match request.method:
            case wire.ALLOCATE:
                code = self._allocate(request, client, username, key, now)
                if code:
                    self._owe(client, request, code, key)
            case wire.REFRESH:
                self._refresh(request, client, username, key, now)
            case _ if held is None or not held.is_established:
                self._owe(client, request, 437, key)
            case _ if held.username != username:
                self._owe(client, request, 441, key)
            case wire.CREATE_PERMISSION:
                self._owe(client, request, self._permission(request, held), key)
            case _:
                self._owe(client, request, self._channel(request, held, now), key)

    def _allocate(self, request: Wire, client: Address, username: str, key: bytes, now: float) -> int:
        """Record a new allocation that waits for its sockets, or return an error code; 0 without an error."""
        referee, holdings = self._referee, self._referee.holdings
        held = holdings.by_client.get(client)
        if held is not None:
            return self._repeat(request, held, username, key)
        wanted: tuple[int, ...] = (1,) if request.get(wire.REQUESTED_FAMILY) is None else (2,)
        if request.get(wire.ADDITIONAL_FAMILY) is not None:
            wanted = (1, 2)
        served = tuple(family for family in wanted if family in referee.rules.hosts)
        if not served:
            return 440
        if request.mac in referee.over:
            referee.drops["STUN"] += 1
            return 0
        even = request.get(wire.EVEN_PORT) is not None
        old = holdings.by_username.get(username)
        regained = [] if old is None else [port for port in old.ports if not even or port % 2 == 0]
        if referee.is_draining or not (holdings.free_ports(even=even) or regained):
            return 508
        if self._is_over_quota(client, old):
            return 486
        referee.over.add(request.mac)
        if old is not None:
            referee.end(old, "replaced")
        missing = tuple(family for family in wanted if family not in served)
        lifetime = _granted(request.number(wire.LIFETIME))
        transaction, fingerprint = request.transaction, request.fingerprint
        referee.begin(
            Allocation(client, username, key, transaction, fingerprint, served, missing, even, lifetime, ends=now), now
        )
        return 0

    def _is_over_quota(self, client: Address, old: Allocation | None) -> bool:
        """Return whether a limit is reached, without counting the allocation to be replaced."""
        held, setting = self._referee.holdings.by_client, self._referee.rules.setting
        if len(held) - (old is not None) >= setting.quota:
            return True
        if setting.per_address is None:
            return False
        networks = [network_of(each.client) for each in held.values() if each is not old]
        return networks.count(network_of(client)) >= setting.per_address

    def _repeat(self, request: Wire, held: Allocation, username: str, key: bytes) -> int:
        if (held.transaction, held.username) != (request.transaction, username):
            return 437
        if held.is_established:
            self._referee.owe_again(held.client, request, key, held.success)
        else:
            self._referee.drops["STUN"] += 1
        return 0

    def _refresh(self, request: Wire, client: Address, username: str, key: bytes, now: float) -> None:
        referee = self._referee
        held = referee.holdings.by_client.get(client)
        lifetime = request.number(wire.LIFETIME)
        family = (request.get(wire.REQUESTED_FAMILY) or b"\0")[0]
        code = 0
        if held is None or (not held.is_established and lifetime != 0):
            code = 437
        elif held.username != username and lifetime != 0:
            code = 441
        elif family and family not in held.families:
            code = 443
        if code or held is None:
            self._owe(client, request, code, key)
            return
        if lifetime != 0:
            held.lifetime = _granted(lifetime)
            referee.holdings.end_at(held, now + held.lifetime)
            self._owe(client, request, 0, key, (wire.LIFETIME, held.lifetime.to_bytes(4, "big")))
            return
        if request.mac in referee.over:
            # Answered again, without an effect.
            pass
        elif family and len(held.families) > 1:
            held.drop_family(family)
        else:
            referee.end(held, "deleted")
        referee.over.add(request.mac)
        self._owe(client, request, 0, key, (wire.LIFETIME, bytes(4)))

    def _permission(self, request: Wire, held: Allocation) -> int:
        peers = [wire.read_address(value, request.transaction) for value in request.get_all(wire.PEER_ADDRESS)]
        if not peers:
            return 400
        if any(_family(peer) not in held.families for peer in peers):
            return 443
        # The port in a permission is ignored.
        rules = self._referee.rules
        return 403 if any(rules.is_forbidden((peer[0], rules.setting.ports[0])) for peer in peers) else 0

    def _channel(self, request: Wire, held: Allocation, now: float) -> int:
        number, value = request.get(wire.CHANNEL_NUMBER), request.get(wire.PEER_ADDRESS)
        if number is None or value is None or not 0x40 <= number[0] <= 0x7F:
            return 400
        peer = wire.read_address(value, request.transaction)
        if _family(peer) not in held.families:
            return 443
        if self._referee.rules.is_forbidden(peer):
            return 403
        kept = [each for each in held.channels.values() if each.is_kept(now)]
        is_new = all(each.number != number[0] << 8 | number[1] and each.peer != peer for each in kept)
        if is_new and len(kept) >= self._referee.rules.setting.max_channels:
            return 508
        channel = held.bind(number[0] << 8 | number[1], peer, now)
        if channel is None:
            return 400
        self._referee.bound.append((held, channel))
        self._referee.relay_early(held, channel, now)
        return 0

    def _owe(self, client: Address, request: Wire, code: int, key: bytes | None, *values: tuple[int, bytes]) -> None:
        self._referee.owe_answer(client, request, code, key, values)

    def _owe_unproven(
        self, client: Address, request: Wire, code: int, key: bytes | None, now: float, *values: tuple[int, bytes]
    ) -> None:
        """Expect an unauthenticated response, unless the rate limit suppresses the response."""
        nonce = request.get(wire.NONCE)
        # An old nonce proves the address.
        is_proven = code == 438 and nonce is not None and self._referee.made_nonce(nonce, client)
        if is_proven or self._referee.budgets.take(client, now):
            self._owe(client, request, code, key, *values)
        else:
            self._referee.withhold(request, code)

    def _key_of(self, username: str) -> bytes:
        key = self._keys.get(username)
        if key is None:
            if len(self._keys) >= 4096:
                self._keys.clear()
            key = self._keys[username] = wire.long_term_key(username, self._referee.rules.secret)
        return key


def _username(value: bytes | None) -> str | None:
    """Parse a username; return None for a username not created by the portal."""
    text = "" if value is None else value.decode(errors="replace")
    expiry, _, salt = text.partition(":")
    return text if expiry.isascii() and expiry.isdigit() and ":" in text and ":" not in salt else None


def _granted(asked: int | None) -> int:
    return min(max(asked or 0, 600), 3600)


def _family(address: Address) -> int:
    return 2 if ":" in address[0] else 1
