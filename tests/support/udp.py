"""UDP socket options missing in Python."""

import socket
import struct

from relay.core.addresses import Family

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104


SO_RCVBUFFORCE = 33


def receive_whole(sock: socket.socket) -> tuple[bytes, int]:
    """Receive a GRO batch; return its data and the segment size, 0 for a single datagram."""
    data, control, *_ = sock.recvmsg(65535, 256)
    segments = [struct.unpack_from("=i", value)[0] for level, kind, value in control if (level, kind) == (SOL_UDP, UDP_GRO)]
    return data, segments[0] if segments else 0


CLASS_OPTIONS = {
    Family.IPV4: (socket.IPPROTO_IP, socket.IP_TOS, socket.IP_RECVTOS),
    Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, socket.IPV6_RECVTCLASS),
}
