"""The command that runs the image lets a second container take over the relay."""

import re
import shlex
from pathlib import Path

TOP = Path(__file__).parents[2]
DOCKERFILE = (TOP / "Dockerfile").read_text()


def command(text: str) -> list[str]:
    """Return the words of the first `docker run` command with options."""
    found = re.search(r"docker run (?:.*\\\n)+.*", text)
    assert found is not None
    return shlex.split(found[0])


def test_the_socket_is_in_a_volume_that_belongs_to_the_user_of_the_image() -> None:
    words = command(re.sub(r"(?m)^# ?", "", DOCKERFILE))
    user = re.search(r"(?m)^USER (\d+):(\d+)$", DOCKERFILE)
    assert user is not None
    volume = next(each for each in words if each.startswith("firezone-relay:"))
    directory = volume.removeprefix("firezone-relay:")
    assert f"HANDOVER_SOCKET={directory}/handover.sock" in words
    assert f"RUN install --directory --owner={user[1]} --group={user[2]} --mode=0700 {directory}\n" in DOCKERFILE


def test_the_guide_has_the_same_command() -> None:
    assert command((TOP / "docs" / "firezone.md").read_text()) == command(re.sub(r"(?m)^# ?", "", DOCKERFILE))
