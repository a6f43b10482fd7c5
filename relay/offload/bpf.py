"""The system call bpf(2): maps, programs, links, and test runs. Nothing here knows what a program is for.

Every failure of the kernel's is an `OSError` with its number, whose text says what was tried. What a class here makes is its
own: `close` gives it back, and so does the end of a `with` block.
"""

import ctypes
from enum import IntEnum
from typing import Final, NamedTuple

from relay.offload import syscall
from relay.offload.maps import Map, MapFlag, MapType, possible_cpus
from relay.offload.syscall import NAME_LENGTH, Command, Owned

__all__ = [
    "Link",
    "Map",
    "MapFlag",
    "MapType",
    "Outcome",
    "Program",
    "Verdict",
    "VerifierError",
    "XdpMode",
    "possible_cpus",
]

_XDP_PROGRAM: Final = 6
_XDP_ATTACHMENT: Final = 37
_LIVE_FRAMES: Final = 1 << 1
_LOG_SIZE: Final = 1 << 24
_LOG_LINES: Final = 3
"""That an error shows of the verifier's log: the last ones tell the reason."""
_GROWTH: Final = 256
"""Bytes that a packet may have gained in a test run: the headroom that a program gets."""


class XdpMode(IntEnum):
    """Where on the way of a packet a program gets it: from the kernel's stack, or from the driver."""

    GENERIC = 1 << 1
    DRIVER = 1 << 2


class Verdict(IntEnum):
    """What an XDP program answers."""

    ABORTED = 0
    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


class VerifierError(OSError):
    """The kernel has refused a program.

    Attributes:
        log: what the verifier has said, possibly many thousand lines; empty if the program wasn't even looked at.
    """

    log: str = ""


class Outcome(NamedTuple):
    """What a program made of a packet.

    Attributes:
        verdict: what it answered; a number that is no `Verdict` means ABORTED to the kernel.
        data: the packet afterwards.
        nanoseconds: that a run took, on average.
    """

    verdict: int
    data: bytes
    nanoseconds: int


class Program(Owned):
    """An XDP program that the kernel has taken."""

    def __init__(self, instructions: bytes, *, license: str, name: str = "") -> None:  # noqa: A002 - the kernel's word
        """Load it.

        Args:
            instructions: 8 bytes each, with descriptors of maps in their places.
            license: which functions of the kernel it may call depends on it.
            name: shown by tools, at most 15 letters, digits, dots and underscores; more are cut.

        Raises:
            VerifierError: EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL, EACCES or E2BIG if the verifier doesn't take it.
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
        """Try again, to learn the reason; what failed by chance (EAGAIN) may pass now."""
        log = ctypes.create_string_buffer(_LOG_SIZE)
        arguments.log_level, arguments.log_size, arguments.log = 1, _LOG_SIZE, ctypes.addressof(log)
        try:
            return syscall.call(Command.PROG_LOAD, arguments, self._subject)
        except OSError:
            text = log.value.decode(errors="replace")
        end = "; ".join(text.strip().splitlines()[-_LOG_LINES:])
        error = VerifierError(first.errno, f"{first.strerror}{end and ': '}{end}")
        error.log = text
        raise error from None

    def test_run(self, packet: bytes, *, ifindex: int = 0, repeat: int = 1) -> Outcome:
        """Run it on a packet, as often as told; from the second time on it gets what it left the time before.

        Args:
            packet: an Ethernet frame of 14 bytes to nearly a page (4,096 bytes, less 576 for the kernel).
            ifindex: the interface that it is to seem to have come by, of this thread's network; 0 for the loopback one.
                Some drivers have to have a program attached for this.
            repeat: how many times.

        Raises:
            OSError: EINVAL for a packet or an interface that won't do, EINTR if a signal came.
        """
        out = ctypes.create_string_buffer(len(packet) + _GROWTH)
        context = syscall.XdpContext(data_end=len(packet), ingress_ifindex=ifindex)
        run = syscall.TestRun(
            program=self.fd,
            data_in=packet,
            size_in=len(packet),
            data_out=ctypes.addressof(out),
            size_out=len(out),
            context_in=ctypes.addressof(context),
            context_size_in=ctypes.sizeof(context),
            repeat=repeat,
        )
        syscall.call(Command.PROG_TEST_RUN, run, self._subject)
        return Outcome(run.verdict, out.raw[: run.size_out], run.duration)

    def send_live(self, packet: bytes, *, ifindex: int, repeat: int, batch_size: int = 64) -> None:
        """Run it on copies of a packet, and do with each what it answers: send it, redirect it, or let the kernel have it.

        Args:
            packet: an Ethernet frame.
            ifindex: the interface that they are to seem to have come by, of this thread's network.
            repeat: how many copies.
            batch_size: how many of them are run before they are sent, 1 to 256.

        Raises:
            OSError: as `test_run`.
        """
        context = syscall.XdpContext(data_end=len(packet), ingress_ifindex=ifindex)
        run = syscall.TestRun(
            program=self.fd,
            data_in=packet,
            size_in=len(packet),
            context_in=ctypes.addressof(context),
            context_size_in=ctypes.sizeof(context),
            repeat=repeat,
            flags=_LIVE_FRAMES,
            batch_size=batch_size,
        )
        syscall.call(Command.PROG_TEST_RUN, run, self._subject)


class Link(Owned):
    """A program at an interface, which is taken away when the link is closed: with its process at the latest."""

    def __init__(self, program: Program, ifindex: int, mode: XdpMode) -> None:
        """Attach it.

        Args:
            program: what is to run.
            ifindex: the interface, of this thread's network.
            mode: where on a packet's way.

        Raises:
            OSError: EBUSY or EEXIST if something is attached there already, EOPNOTSUPP if the driver can't, ENODEV or EINVAL
                without such an interface.
        """
        self._subject = f"link to interface {ifindex}"
        arguments = syscall.LinkCreate(program=program.fd, ifindex=ifindex, attach_type=_XDP_ATTACHMENT, flags=mode)
        super().__init__(syscall.call(Command.LINK_CREATE, arguments, self._subject))
