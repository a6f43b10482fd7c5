"""Maps: tables that programs in the kernel share with this one."""

import ctypes
import errno
import mmap
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Final

from relay.offload import syscall
from relay.offload.elf import MapDefinition
from relay.offload.syscall import NAME_LENGTH, Command, Owned

_POSSIBLE: Final = Path("/sys/devices/system/cpu/possible")
_UPDATE: Final = int(Command.MAP_UPDATE_ELEM)
_ELEMENT_SIZE: Final = ctypes.sizeof(syscall.Element)


class MapType(IntEnum):
    """Kinds of maps: one value for each index, or one for each index and CPU."""

    ARRAY = 2
    PERCPU_ARRAY = 6


class MapFlag(IntFlag):
    """How a map is made."""

    MMAPABLE = 1 << 10


@cache
def possible_cpus() -> int:
    """How many CPUs there can ever be: a value of a per-CPU map has as many parts.

    Raises:
        OSError: the kernel doesn't say.
    """
    # "0-3", "0,2-5"
    ranges = [each.split("-") for each in _POSSIBLE.read_text().strip().split(",")]
    return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)


class Map(Owned):
    """A map.

    Keys and values are bytes of exactly the sizes that the definition says. In a per-CPU map a value has a part for each
    possible CPU, one after the other. Threads may share it.

    Attributes:
        definition: as given.
        cpus: parts of a value: the possible CPUs for a per-CPU map, else 1.
        stride: bytes from one part of a value to the next, and from one element to the next in `mapped`.
        size: bytes of a value with all its parts.
    """

    def __init__(self, definition: MapDefinition) -> None:
        """Make it.

        Args:
            definition: its sizes; a name of more than 15 letters is cut.

        Raises:
            OSError: EPERM without CAP_BPF, EINVAL or E2BIG for sizes that the kernel doesn't take, ENOMEM.
        """
        per_cpu = definition.type == MapType.PERCPU_ARRAY
        self.definition = definition
        self.cpus = possible_cpus() if per_cpu else 1
        self.stride = -(-definition.value_size // 8) * 8
        self.size = self.stride * self.cpus if per_cpu else definition.value_size
        self._key_size = definition.key_size
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

    def update(self, key: bytes, value: bytes) -> None:
        """Replace an element.

        Raises:
            ValueError: key or value isn't as long as this map's.
            OSError: E2BIG if there is no such element.
        """
        if len(key) != self._key_size or len(value) != self.size:
            raise ValueError(f"{self._subject}: a key of {len(key)} bytes, a value of {len(value)}")
        element = syscall.Element(self.fd, key, value)
        if syscall.quick_call(syscall.NUMBER, _UPDATE, ctypes.addressof(element), _ELEMENT_SIZE):
            raise syscall.failure(Command.MAP_UPDATE_ELEM, self._subject)

    def lookup(self, key: bytes) -> bytes | None:
        """Tell an element's value, with all its parts; None if there is no such element.

        Raises:
            ValueError: the key isn't as long as this map's.
            OSError: the kernel won't.
        """
        if len(key) != self._key_size:
            raise ValueError(f"{self._subject}: a key of {len(key)} bytes")
        value = ctypes.create_string_buffer(self.size)
        asked = syscall.Lookup(self.fd, key, ctypes.addressof(value))
        if syscall.quick_call(syscall.NUMBER, Command.MAP_LOOKUP_ELEM, ctypes.addressof(asked), _ELEMENT_SIZE):
            error = syscall.failure(Command.MAP_LOOKUP_ELEM, self._subject)
            if error.errno == errno.ENOENT:
                return None
            raise error
        return value.raw

    def lookup_per_cpu(self, key: bytes) -> tuple[bytes, ...] | None:
        """Tell an element's value on each CPU; None if there is no such element.

        Raises:
            ValueError: the key isn't as long as this map's.
            OSError: the kernel won't.
        """
        value = self.lookup(key)
        if value is None:
            return None
        size = self.definition.value_size
        return tuple(value[at : at + size] for at in range(0, len(value), self.stride))

    def update_batch(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Replace elements.

        Raises:
            ValueError: keys or values aren't as long as this map's, or as many as each other.
            OSError: E2BIG if there is no such element; those before it have been replaced.
        """
        count = len(keys)
        joined_keys, joined = b"".join(keys), b"".join(values)
        if len(joined_keys) != count * self._key_size or len(values) != count or len(joined) != count * self.size:
            raise ValueError(f"{self._subject}: {len(values)} values of {len(joined)} bytes for {count} keys")
        batch = syscall.Batch(keys=joined_keys, values=joined, count=count, map=self.fd)
        syscall.call(Command.MAP_UPDATE_BATCH, batch, self._subject)

    def lookup_array(self, first: int = 0, count: int | None = None) -> bytes:
        """Tell the values of an array's elements, each `size` bytes: with all their parts, one after the other.

        Args:
            first: index of the first element.
            count: how many; None for all from there. Those that the array doesn't have aren't told.

        Raises:
            OSError: the kernel won't: ENOENT or EINVAL if there is no such element.
        """
        room = self.definition.max_entries - first
        wanted = room if count is None else min(count, room)
        if wanted <= 0 or first < 0:
            return b""
        values = ctypes.create_string_buffer(wanted * self.size)
        indexes = (ctypes.c_uint32 * wanted)()
        # The kernel begins after the one it is given, and at the very first if it is given none.
        after, last = ctypes.c_uint32(first - 1 if first else 0), ctypes.c_uint32()
        batch = syscall.LookupBatch(
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
            # So it says that it has reached the end.
            if error.errno != errno.ENOENT or not batch.count:
                raise
        return values.raw[: batch.count * self.size]

    def mapped(self) -> mmap.mmap:
        """Map an array that was made with `MapFlag.MMAPABLE` into memory, writable; its elements are `stride` bytes apart.

        It outlives this object.

        Raises:
            OSError: it wasn't made so.
        """
        try:
            return mmap.mmap(self.fd, self.stride * self.definition.max_entries, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise syscall.described(error.errno or 0, f"mmap of {self._subject}") from None
