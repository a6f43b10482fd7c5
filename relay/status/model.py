"""Fields of the response to ``GET /status``, which is JSON. This module imports nothing of the relay.

Times are seconds unless a field says otherwise. Bytes are payload without headers. ``to_peer`` is traffic from clients to
peers, ``to_client`` traffic from peers to clients. The types show which fields can be null.
"""

from typing import TypedDict


class FlowCounts(TypedDict):
    """Traffic in a direction, on all data paths."""

    packets: int
    bytes: int
    xdp_packets: int
    """The part relayed by the kernel."""
    xdp_bytes: int


class Flows(TypedDict):
    """Traffic in both directions."""

    to_peer: FlowCounts
    to_client: FlowCounts


class FlowRate(TypedDict):
    """Traffic per second in a direction: the average over `TotalsStatus.rates_over`."""

    packets: float
    bytes: float


class DrainStatus(TypedDict):
    """A shutdown, with or without time for allocations to end."""

    until: float
    """Unix time at which the relay ends, at the latest."""
    time_left: float
    allocations: int
    """Allocations that are left."""


class PortalStatus(TypedDict):
    """Connection to the portal."""

    state: str
    """Normally `joined`; `docs/metrics.md` lists all states."""
    has_begun: bool
    """Whether the portal has sent `init`, after which the relay answers clients."""
    state_age: float | None
    """Time in this state; null before the first attempt."""
    joins: int
    last_failure: str | None
    """Reason of the last failed or lost connection; null if there was none."""


class XdpStatus(TypedDict):
    """Data path in the kernel."""

    interfaces: dict[str, str | None]
    """Attach mode by interface: `driver`, `generic`, or null if the program is not attached."""
    failures: dict[str, str]
    """Reason of a failure to attach, by interface."""
    channels: int
    """Channels that the kernel relays."""
    channels_refused: int


class DataPathStatus(TypedDict):
    """All data paths."""

    userspace: dict[str, list[str]]
    """The sockets. `clients` are the addresses at which the relay answers clients."""
    xdp: XdpStatus | None
    """Null without offload."""


class ResponseCounts(TypedDict):
    """Responses to requests, by method."""

    successes: dict[str, int]
    errors: dict[str, dict[str, int]]
    """By method, then by error code."""
    withheld: dict[str, int]
    """Responses suppressed by the rate limit for unauthenticated addresses."""


class TotalsStatus(Flows):
    """Counts since the start, and current rates."""

    rates_over: float | None
    """Seconds between the last two scans of all allocations; null without a previous scan."""
    to_peer_rate: FlowRate | None
    to_client_rate: FlowRate | None
    allocations: int
    """Current number."""
    channels: int
    """Current number, without channels in their grace period."""
    allocations_made: int
    allocations_freed: dict[str, int]
    """By reason."""
    responses: ResponseCounts
    drops: dict[str, int]
    """Datagrams neither relayed nor answered, by reason; `kernel` counts full receive buffers."""
    send_errors: dict[str, int]
    """Datagrams that the kernel refused to send, by error."""


class ChannelStatus(Flows):
    """Channel binding of an allocation."""

    number: int
    peer: str
    state: str
    """`live`; or `cooling`, the grace period: no packets are relayed, number and peer stay reserved for each other."""
    time_left: float
    """Time left in this state."""


class AllocationStatus(Flows):
    """Allocation of a client."""

    id: int
    """Never reused while the relay runs."""
    client: str
    state: str
    """`established`; or `binding` until its sockets are open."""
    relayed: list[str]
    """Relayed addresses, to which peers send."""
    credential_expires_at: int | None
    """Expiry of the credential used for the Allocate, in Unix time."""
    username_sha256: str
    """First 12 hexadecimal digits of the SHA-256 of the username."""
    age: float
    time_left: float
    drops: dict[str, int]
    """Dropped datagrams of the client and of peers, by reason, without those in the kernel."""
    to_peer_rate: float | None
    """Bytes per second; null if the rates in `Totals` are null."""
    to_client_rate: float | None
    channel_count: int
    """All channels."""
    channels: list[ChannelStatus]
    """Channels in the order of their first binding, up to the parameter `channels`."""


class RecordedRequest(TypedDict):
    """Equal responses to a client, one after the other."""

    request: str
    code: int | None
    """Null: success."""
    cause: str
    """The reason, limit or rule, as in the log; `withheld` if the rate limit suppressed the response; empty: success."""
    about: str
    """The denied peer, or the expiry of the credential in Unix time."""
    count: int
    first_ago: float
    last_ago: float


class ClientHistory(TypedDict):
    """The last responses to a client, from its first refused request on."""

    client: str
    requests: list[RecordedRequest]


class Selection(TypedDict):
    """Parameters of the request."""

    sort: str
    order: str
    limit: int
    offset: int
    channels: int
    client: str | None
    """Network of the listed clients."""
    peer: str | None
    port: int | None


class Status(TypedDict):
    """The response."""

    version: str
    time: float
    """Unix time of the response."""
    uptime: float
    handovers: int
    """Times that a new process took over this relay."""
    ready: bool
    """Whether new clients should be sent to this relay (see /readyz)."""
    not_ready: list[str]
    """The reasons, as in /readyz; empty if the relay is ready."""
    drain: DrainStatus | None
    """Null unless the relay drains or stops."""
    config: dict[str, object]
    """Settings, without secrets. Null: unset; for a standalone relay also `portal_url`, `name` and `proxy`."""
    portal: PortalStatus | None
    """Null for a standalone relay."""
    data_paths: DataPathStatus
    totals: TotalsStatus
    page: Selection
    matching: int
    """Allocations that match `client`, `peer` and `port`, on all pages."""
    requests_complete_for: float
    """Time for which no client with a refused request is missing in `requests`."""
    requests: list[ClientHistory]
    """With the parameter `client`: its last requests, for at most 20 addresses. The latest address comes first."""
    allocations: list[AllocationStatus]
