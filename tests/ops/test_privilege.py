"""Root of the machine is rejected, but root of an unprivileged user namespace is accepted."""

import os
from pathlib import Path

import pytest

from relay.config import UsageError
from relay.ops.privilege import refuse_root

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused")


@pytest.mark.parametrize("users", ["         0          0 4294967295\n", "0 0 1\n1 100000 65536\n", "0 0 1000\n", ""])
def test_root_of_the_initial_user_namespace_is_rejected(tmp_path: Path, users: str) -> None:
    path = tmp_path / "uid_map"
    path.write_text(users)
    with pytest.raises(UsageError, match="this is root"):
        refuse_root(path)


def test_root_is_rejected_without_a_uid_map(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is root"):
        refuse_root(tmp_path / "uid_map")


@pytest.mark.parametrize("users", ["         0       1000          1\n         1 100000 65536\n", "0 231072 65536\n"])
def test_root_of_an_unprivileged_user_namespace_is_accepted(tmp_path: Path, users: str) -> None:
    path = tmp_path / "uid_map"
    path.write_text(users)
    refuse_root(path)
