"""Maps, programs and links of bpf(2), without knowledge of a particular program.

A kernel error raises an `OSError` with its number and the failed action. Each object owns its file descriptor: `close`, or
the end of a `with` block, releases the descriptor.
"""

import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Final, Self

from relay.offload import syscall
from relay.offload.elf import MapDefinition
from relay.offload.syscall import NAME_LENGTH, Command, Owned

_POSSIBLE_CPUS: Final = Path("/sys/devices/system/cpu/possible")
_XDP_PROGRAM: Final = 6
_XDP_ATTACHMENT: Final = 37
_LOG_SIZE: Final = 1 << 24
_LOG_LINES: Final = 3
"""Lines of the verifier's log in an error message: the last lines contain the reason."""


class MapType(IntEnum):
    """Types of maps: one value per key, per index, or per index and CPU."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6


class XdpMode(IntEnum):
    """The place of an XDP program."""

    GENERIC = 1 << 1
    """In the network stack, where VLAN tags of received packets are removed and tags can't be inserted."""
    DRIVER = 1 << 2
    """In the driver, where VLAN tags are part of the packet."""


@cache
def possible_cpus(listed: Path = _POSSIBLE_CPUS) -> int:
    """Return the number of CPUs that the machine can ever have: a value of a per-CPU map has as many parts."""
    # "0-3", "0,2-5"
    ranges = [each.split("-") for each in listed.read_text().strip().split(",")]
    return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)


class Map(Owned):
    """A table shared with programs in the kernel. Several threads may use it.

    In a per-CPU map a value has one part for each possible CPU.

    Attributes:
        cpus: parts of a value: the number of possible CPUs in a per-CPU map, else 1.
        stride: bytes from one part of a value to the next.
        size: bytes of a value with all its parts.
    """

    def __init__(self, definition: MapDefinition) -> None:
        """Create the map.

        Raises:
            OSError: EPERM without CAP_BPF, EINVAL or E2BIG for sizes that the kernel rejects, ENOMEM.
        """
        per_cpu = definition.type == MapType.PERCPU_ARRAY
        self.definition = definition
        self.cpus = possible_cpus() if per_cpu else 1
        self.stride = -(-definition.value_size // 8) * 8
        self.size = self.stride * self.cpus if per_cpu else definition.value_size
        self._subject = f"map {definition.name}"
        arguments = syscall.MapCreate(
            type=definition.type,
            key_size=definition.key_size,
            value_size=definition.value_size,
            max_entries=definition.max_entries,
            flags=definition.flags,
            name=definition.name.encode()[:NAME_LENGTH],
        )
        super().__init__(syscall.call(Command.MAP_CREATE, arguments, self._subject))

    def update(self, values: Mapping[bytes, bytes]) -> None:
        """Add or replace elements.

        Raises:
            ValueError: a key or a value has another size than this map's.
            OSError: E2BIG if the map is full, or an index does not exist. The elements before it have been written.
        """
        for key, value in values.items():
            if len(key) != self.definition.key_size or len(value) != self.size:
                raise ValueError(f"{self._subject}: a key and a value of {len(key)} and {len(value)} bytes")
        self._change(Command.MAP_UPDATE_BATCH, values, b"".join(values.values()))

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete elements of a hash map.

        Raises:
            OSError: ENOENT if an element does not exist. The elements before it have been deleted.
        """
        self._change(Command.MAP_DELETE_BATCH, keys, None)

    def _change(self, command: Command, keys: Iterable[bytes], values: bytes | None) -> None:
        joined = b"".join(keys)
        if joined:
            count = len(joined) // self.definition.key_size
            syscall.call(command, syscall.Batch(keys=joined, values=values, count=count, map=self.fd), self._subject)

    def lookup(self, first: int = 0, count: int | None = None) -> bytes:
        """Return the values of consecutive elements of an array, each with all its parts: `size` bytes.

        Elements behind the end of the map are left out. Without a count, all are read.
        """
        wanted = self.definition.max_entries - first
        wanted = wanted if count is None else min(count, wanted)
        if wanted <= 0:
            return b""
        values = ctypes.create_string_buffer(wanted * self.size)
        indexes = (ctypes.c_uint32 * wanted)()
        # The kernel starts behind the index in `after`, or at the first element without `after`.
        after, last = ctypes.c_uint32(first - 1 if first else 0), ctypes.c_uint32()
        batch = syscall.Batch(
            after=ctypes.addressof(after) if first else None,
            last=ctypes.addressof(last),
            keys=ctypes.addressof(indexes),
            values=ctypes.addressof(values),
            count=wanted,
            map=self.fd,
        )
        try:
            syscall.call(Command.MAP_LOOKUP_BATCH, batch, self._subject)
        except OSError as error:
            # ENOENT with elements means that the kernel has reached the end of the map.
            if error.errno != errno.ENOENT or not batch.count:
                raise
        return values.raw[: batch.count * self.size]


class Program(Owned):
    """A loaded XDP program."""

    def __init__(self, instructions: bytes, *, license: str, name: str = "") -> None:  # noqa: A002 - the kernel's word
        """Load the program.

        Raises:
            OSError: EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL, EACCES or E2BIG if the verifier rejects the program.
        """
        self._subject = f"program {name}"
        terms = license.encode()
        arguments = syscall.ProgramLoad(
            type=_XDP_PROGRAM,
            instruction_count=len(instructions) // 8,
            instructions=instructions,
            license=terms,
            name=name.encode()[:NAME_LENGTH],
            attach_type=_XDP_ATTACHMENT,
        )
        try:
            fd = syscall.call(Command.PROG_LOAD, arguments, self._subject)
        except OSError as error:
            fd = self._load_with_log(arguments, error)
        super().__init__(fd)

    def _load_with_log(self, arguments: syscall.ProgramLoad, first: OSError) -> int:
        """Load the program again, to get the reason of the failure. After EAGAIN the second attempt may succeed."""
        log = ctypes.create_string_buffer(_LOG_SIZE)
        arguments.log_level, arguments.log_size, arguments.log = 1, _LOG_SIZE, ctypes.addressof(log)
        try:
            return syscall.call(Command.PROG_LOAD, arguments, self._subject)
        except OSError:
            text = log.value.decode(errors="replace")
        end = "; ".join(text.strip().splitlines()[-_LOG_LINES:])
        raise OSError(first.errno, f"{first.strerror}{end and ': '}{end}") from None


class XdpLink(Owned):
    """A program attached to an interface, until all descriptors of the link are closed.

    Args:
        fd: a descriptor of the link, perhaps from another process.
    """

    @classmethod
    def create(cls, program: Program, ifindex: int, mode: XdpMode) -> Self:
        """Attach a program to an interface of this thread's network namespace.

        Raises:
            OSError: EBUSY or EEXIST if another program is attached, EOPNOTSUPP without support by the driver, ENODEV or
                EINVAL without such an interface.
        """
        arguments = syscall.LinkCreate(program=program.fd, ifindex=ifindex, attach_type=_XDP_ATTACHMENT, flags=mode)
        return cls(syscall.call(Command.LINK_CREATE, arguments, f"link to interface {ifindex}"))

    def update(self, program: Program) -> None:
        """Replace the program, between two packets.

        Raises:
            OSError: ENOLINK if the interface is gone.
        """
        syscall.call(Command.LINK_UPDATE, syscall.LinkUpdate(link=self.fd, program=program.fd), "link")
