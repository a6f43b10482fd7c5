"""The last responses to clients with refused requests, to explain afterwards why a client could not connect.

A client has an entry from its first refused request on. Nearly all clients have one, because the first request gets 401. A
flood from forged addresses must not displace the rest, so clients that have proven their address by a nonce have a table of
their own. Both tables are bounded, and so is each entry: at most some 12 MB, and 1 KB for a usual client.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, TypeAlias

from relay.core.addresses import ClientAddress
from relay.core.errors import ErrorCode, Reason
from relay.core.stun import Method

MAX_CLIENTS: Final = 2048
"""Clients in each table. With one new client per second, a table reaches back half an hour."""

MAX_RECORDS: Final = 8
"""Records of a client. An attempt to connect that fails takes two or three."""

WITHHELD: Final = "withheld"
"""The cause of a response suppressed by the rate limit (`relay.core.limiter`)."""

_AFTER_NONCE = frozenset((Reason.OLD_NONCE, Reason.NO_CREDENTIAL_OF_OURS, Reason.CREDENTIAL_EXPIRED, Reason.WRONG_PASSWORD))
"""Reasons for refusals of unauthenticated requests with a nonce of this relay."""


@dataclass(slots=True)
class RequestRecord:
    """Equal responses to a client, one after the other."""

    method: Method
    code: ErrorCode | None
    """None: success."""
    cause: str
    """A `Reason`, `Limit` or `PeerRule`, the name of the code, or `WITHHELD`; "" for a success."""
    about: str
    """The denied peer, or the expiry of the credential in Unix time."""
    first: float
    """Monotonic seconds."""
    last: float
    count: int = 1


Records: TypeAlias = OrderedDict[ClientAddress, list[RequestRecord]]
"""The records of clients. The client with the latest refusal is the last."""


class History:
    """The records. Other threads may copy the tables, and the lists in them, at any time."""

    def __init__(self) -> None:
        self.proven: Records = OrderedDict()
        self.unproven: Records = OrderedDict()
        self.complete_since = 0.0
        """Monotonic time from which no client with a refused request is missing."""

    def note(  # noqa: PLR0913 - the fields of a record
        self,
        client: ClientAddress,
        method: Method,
        now: float,
        code: ErrorCode | None = None,
        cause: str = "",
        about: str = "",
        *,
        authenticated: bool = False,
    ) -> None:
        """Record a response. A success, without a cause, is only recorded if the client has an entry."""
        records = self.proven.get(client) or self.unproven.get(client)
        last = None if records is None else records[-1]
        if last is not None and last.method is method and last.code is code and last.cause == cause:
            # In a flood, most requests end here.
            last.about, last.last = about, now
            last.count += 1
            return
        if records is None:
            if not cause:
                return
            records = []
        records.append(RequestRecord(method, code, cause, about, now, now))
        del records[:-MAX_RECORDS]
        if cause:
            self._keep(client, records, is_proven=authenticated or cause in _AFTER_NONCE or client in self.proven)

    def _keep(self, client: ClientAddress, records: list[RequestRecord], *, is_proven: bool) -> None:
        table = self.proven if is_proven else self.unproven
        for each in (table, self.unproven):
            each.pop(client, None)
        table[client] = records
        if len(table) > MAX_CLIENTS:
            _, forgotten = table.popitem(last=False)
            self.complete_since = max(self.complete_since, forgotten[-1].last)
