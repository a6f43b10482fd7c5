"""The answer to ``GET /status``: what each field is. It is JSON, and this is all that imports nothing.

Times are seconds unless it is said otherwise, bytes are payload without any header. ``to_peer`` is what clients sent, on the
way to their peers; ``to_client`` is what peers sent. What may be null says so.
"""

from typing import TypedDict


class Flow(TypedDict):
    """What was relayed one way, on all data paths together."""

    packets: int
    bytes: int
    xdp_packets: int
    """Of these, those that the kernel relayed by itself."""
    xdp_bytes: int


class Rate(TypedDict):
    """What is relayed one way in a second, on the average of `Totals.rates_over`."""

    packets: float
    bytes: float


class Config(TypedDict):
    """What the relay was told at its start, as far as it is no secret."""

    public_addresses: list[str]
    bind_addresses: list[str]
    service_port: int
    lowest_port: int
    highest_port: int
    max_allocations: int
    max_allocations_per_address: int | None
    """Null: as many as in all."""
    max_channels: int
    """Of an allocation."""
    unauthenticated_rate: int
    """Answers a second to an address that has proven nothing; 0 for no limit."""
    unauthenticated_burst: int
    health_address: str
    control_address: str
    control_hostnames: list[str]
    portal_url: str | None
    """None for a relay that stands alone, and so is the next one."""
    name: str | None
    proxy: str | None
    """On the way to the portal, without a user or a password."""
    drain_timeout: float
    cpu_affinity: str
    switch_interval: float
    allow_peers: list[str]
    deny_peers: list[str]
    ebpf_offloading: list[str]
    """Interfaces; none if the kernel relays nothing."""
    ebpf_attach_mode: str | None
    otlp: bool
    """Whether metrics are pushed; where to may hold a password."""


class Portal(TypedDict):
    """How it is with the portal."""

    state: str
    """`joined` is what it should be; `docs/portal.md` has the others."""
    has_begun: bool
    """Whether the portal has said that clients are to be answered."""
    state_age: float | None
    """For how long it has been in this state; null before the first attempt."""
    joins: int
    last_failure: str | None
    """Why there was no connection, or none any more, the last time; null if that never was."""


class Userspace(TypedDict):
    """The sockets."""

    clients: list[str]
    """The addresses at which clients are answered."""


class Xdp(TypedDict):
    """The kernel."""

    interfaces: dict[str, str | None]
    """How each has the program: `driver`, `generic`, or null if it has it not."""
    failures: dict[str, str]
    """Why those that could have it don't."""
    channels: int
    """Those that the kernel relays."""
    channels_refused: int


class DataPaths(TypedDict):
    """What relays."""

    userspace: Userspace
    xdp: Xdp | None
    """Null if the relay was not told to use it."""


class Responses(TypedDict):
    """Answers to requests, by method."""

    successes: dict[str, int]
    errors: dict[str, dict[str, int]]
    """By method, then by error code."""
    withheld: dict[str, int]
    """Those that were not given, since their address had had enough of them."""


class Totals(TypedDict):
    """Counts since the start, and the moment's rates."""

    to_peer: Flow
    to_client: Flow
    rates_over: float | None
    """The seconds that rates are the average of, up to the last look at all allocations; null if nobody looked before."""
    to_peer_rate: Rate | None
    to_client_rate: Rate | None
    allocations: int
    """Now."""
    channels: int
    """Now, those that relay."""
    allocations_made: int
    allocations_freed: dict[str, int]
    """By reason."""
    responses: Responses
    drops: dict[str, int]
    """Datagrams that were neither relayed nor answered, by reason; `kernel` are those that found a socket full."""
    send_errors: dict[str, int]
    """Datagrams that the kernel refused to send, by error."""


class Channel(TypedDict):
    """A channel binding of an allocation."""

    number: int
    peer: str
    state: str
    """`live`; or `cooling`: it relays nothing, and number and peer are kept for each other."""
    time_left: float
    """In this state."""
    to_peer: Flow
    to_client: Flow


class Allocation(TypedDict):
    """A client's claim on a relayed port."""

    id: int
    """Never used again while the relay runs."""
    client: str
    state: str
    """`established`; or `binding`: its sockets are about to be opened."""
    relayed: list[str]
    """The public addresses at which peers reach it."""
    credential_expires_at: int | None
    """Unix time of the end of the credential that it was made with."""
    age: float
    time_left: float
    to_peer: Flow
    to_client: Flow
    to_peer_rate: float | None
    """Bytes a second, as are those of the totals; null if they are."""
    to_client_rate: float | None
    channel_count: int
    """All of them."""
    channels: list[Channel]
    """At most as many as were asked for, in the order in which they were first bound."""


class Page(TypedDict):
    """Which allocations are listed."""

    sort: str
    order: str
    limit: int
    offset: int
    channels: int


class Status(TypedDict):
    """All of it."""

    version: str
    time: float
    """Unix time of the answer."""
    uptime: float
    ready: bool
    """Whether new clients should be sent here, as /readyz has it."""
    config: Config
    portal: Portal | None
    """Null for a relay that stands alone."""
    data_paths: DataPaths
    totals: Totals
    page: Page
    allocations: list[Allocation]
