"""Why the relay can't belong to its portal any more, in one line that says what to do about it."""

EXPIRED = (
    "the token has expired: make a new one in the portal and set it as FIREZONE_TOKEN or --token-file, then start again"
)


def join_refused(reason: str) -> str:
    """Say that the portal answered the join with an error."""
    return (
        f"the portal refused this relay ({reason}): check its public addresses, its name and its version, and that the "
        "portal is the one that the token was made in"
    )


def retries_spent(host: str, patience: str, last_failure: str | None) -> str:
    """Say that it was tried for long enough."""
    last = last_failure or "no attempt was made"
    return (
        f"no channel of the portal {host} could be joined for {patience} (last: {last}): check FIREZONE_API_URL, "
        "the network, and whether the portal is up"
    )
