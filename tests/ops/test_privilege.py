"""Whose root is refused: the machine's, not that of a container which is nobody outside."""

import os
from pathlib import Path

import pytest

from relay.config import BadUseError
from relay.ops.privilege import refuse_root

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused")


@pytest.mark.parametrize("users", ["         0          0 4294967295\n", "0 0 1\n1 100000 65536\n", "0 0 1000\n", ""])
def test_root_that_is_root_outside_is_refused(tmp_path: Path, users: str) -> None:
    path = tmp_path / "uid_map"
    path.write_text(users)
    with pytest.raises(BadUseError, match="this is root"):
        refuse_root(path)


def test_root_is_refused_where_nobody_tells_who_it_is_outside(tmp_path: Path) -> None:
    with pytest.raises(BadUseError, match="this is root"):
        refuse_root(tmp_path / "uid_map")


@pytest.mark.parametrize("users", ["         0       1000          1\n         1 100000 65536\n", "0 231072 65536\n"])
def test_root_of_a_users_own_namespace_is_not_refused(tmp_path: Path, users: str) -> None:
    path = tmp_path / "uid_map"
    path.write_text(users)
    refuse_root(path)
