"""The command that makes credentials for clients of a standalone relay."""

import json
import secrets
import time
from pathlib import Path

import click

from relay.core.credentials import SALT_BYTES, mint
from relay.options import FILE, LIFETIME, read_secret


@click.command(name="credentials", short_help="Make a username and a password for a client.")
@click.option(
    "--relay-secret-file",
    type=FILE,
    envvar="RELAY_SECRET_FILE",
    show_envvar=True,
    required=True,
    help="File with the relay's secret.",
)
@click.option(
    "--ttl",
    type=LIFETIME,
    default="1d",
    help="Lifetime of the credential: 90s, 15m, 12h, 1d.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def credentials(relay_secret_file: Path, ttl: int, *, as_json: bool) -> None:
    """Make a username and a password. Every relay with the same secret accepts them until they expire.

    Exit codes: 0, or 2 usage error.
    """
    expiry = int(time.time()) + ttl
    credential = mint(read_secret(relay_secret_file), expiry, secrets.token_urlsafe(SALT_BYTES))
    if as_json:
        click.echo(json.dumps({**credential._asdict(), "expires_at": expiry}))
    else:
        click.echo(f"username: {credential.username}\npassword: {credential.password}")
