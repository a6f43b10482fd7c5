"""Kinds of clients."""

from random import Random
from typing import Any, NamedTuple

DAY = 86400.0


class Profile(NamedTuple):
    """A client's behaviour."""

    name: str
    is_ipv6: bool
    """Family of the connection to the relay."""
    asks: int
    """1 for a relayed address of IPv4, 2 for one of IPv6, 3 for both."""
    first_shows_credential: bool
    """The first request has a username and no nonce, as in Firezone."""
    fingerprint: bool
    even_port: bool
    lifetime: int | None
    refreshes: bool
    """Whether the client refreshes its allocation."""
    channels: int
    rebinds_after: float
    """Seconds between channel refreshes. Channels expire after 600 and are removed after 900."""
    is_hasty: bool
    """Sends packets right behind each ChannelBind, like Firezone."""
    swaps: bool
    """Binds expired numbers and peers to new partners."""
    stays: bool
    """Starts each session from the same address with new credentials."""
    leaves: bool
    """Whether the client deletes its allocation at the end."""
    roams_after: float
    """Average seconds until the client moves to another address with the same username; 0 for never."""
    credential_lives: float
    impatience: float
    session: float
    """Seconds, on average."""
    pause: float
    gap: float
    """Average seconds between packets."""


def profile_of(random: Random, pace: float) -> Profile:
    """Draw a client of a random kind."""
    name, changes = random.choice(_KINDS)
    asks = random.choice((1, 1, 2, 3))
    common = Profile(
        name=name,
        is_ipv6=random.random() < 0.3,
        asks=asks,
        first_shows_credential=False,
        fingerprint=random.random() < 0.5,
        even_port=random.random() < 0.1,
        lifetime=random.choice((None, None, 600, 777, 1800, 5000)),
        refreshes=True,
        channels=random.choice((1, 1, 2, 4)),
        rebinds_after=random.choice((240.0, 300.0, 500.0)),
        is_hasty=False,
        swaps=False,
        stays=False,
        leaves=random.random() < 0.6,
        roams_after=0.0,
        credential_lives=DAY,
        impatience=0.02,
        session=900 * pace,
        pause=300 * pace,
        gap=20 * pace,
    )
    return common._replace(**changes)


_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ICE", {"channels": 4, "session": 400.0, "leaves": True}),
    (
        "Firezone",
        {"is_hasty": True, "first_shows_credential": True, "stays": True, "leaves": False, "channels": 3, "session": 500.0},
    ),
    ("roaming", {"roams_after": 200.0}),
    ("impatient", {"impatience": 0.5}),
    ("forgetful", {"refreshes": False}),
    ("late to rebind", {"rebinds_after": 700.0, "lifetime": 3600}),
    ("rebinding others", {"rebinds_after": 700.0, "swaps": True, "lifetime": 2000}),
    ("binding anew", {"rebinds_after": 950.0, "swaps": True, "lifetime": 3600}),
    ("vanishing", {"leaves": False, "session": 150.0, "pause": 900.0}),
    ("of short credentials", {"credential_lives": 400.0}),
    ("dual", {"asks": 3, "channels": 4, "is_hasty": True}),
    ("plain", {}),
)
