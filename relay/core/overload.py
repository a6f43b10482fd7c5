"""The overload policy: every threshold, side by side. Mechanisms are elsewhere and hold no numbers of their own.

====================  ==================================================================  ==========================
while                 the relay                                                           mechanism
====================  ==================================================================  ==========================
reading keeps up      reads batches of `BATCH_DATAGRAMS` or `SHARED_BATCH_DATAGRAMS`      `relay.net.receiver`
a socket stays full   shrinks its receive buffer to `BUFFER_DELAY` of traffic:            `relay.net.backlog`
                      the kernel drops excess packets before they cost CPU
requests are in       looks at `UNAUTHENTICATED_REQUESTS` of a batch from clients         `relay.core.server`
excess                without an allocation, and at `CLIENT_REQUESTS` of each other
the core is in use    waits for `CORE_WAIT`, then drops the packets but keeps requests    `relay.actors.mailbox`
nobody reads          drops all packets that waited for `STALE_AFTER`, but not requests   `relay.net.receiver`
a message is long     lets others have the core after each `TURN`, and handles            `relay.core.server`
                      passed deadlines in portions of `EXPIRIES`
many readers wait     yields the CPU after each batch                                     `relay.net.threads.Load`
others use the CPU    lets readers preempt other processes, and each other                `relay.net.neighbours`
data comes before     holds the data for `EARLY_AGE`, up to `EARLY_CLIENT_BYTES` of a     `relay.core.early`
its ChannelBind       client, `EARLY_BYTES` of all clients, and the `EARLY_SHARE` of each
====================  ==================================================================  ==========================
"""

from typing import Final

# Batches.

BATCH_DATAGRAMS: Final = 48
"""Datagrams and GRO batches that a reader of one allocation reads in one go: enough to share the cost of a message, few
enough not to delay other allocations."""

SHARED_BATCH_DATAGRAMS: Final = 128
"""The same for a socket that clients share. There are few such readers, and a larger batch has more datagrams of each
flow."""

BATCH_BYTES: Final = 160 * 1024
"""Bytes in a batch, for both."""

DATAGRAM_BYTES: Final = 128
"""Bytes of a batch that each datagram of a GRO batch counts in addition: a batch has at most 1,280 tiny datagrams, which the
kernel sends in 2 ms. Bytes alone would permit 8,192."""

# Receive buffers.

BUFFER_DELAY: Final = 0.011
"""Seconds of reading that a small buffer holds, approximately: a packet then waits for this long."""

BURST: Final = 0.010
"""Seconds for which a socket is never empty before its buffer is shrunk. A burst is over by then."""

BUFFER_REVIEW: Final = 0.1
"""Seconds between two checks of a small buffer: whether it still drops, and how much is read."""

BUFFER_CALM: Final = 1.0
"""Seconds without a drop after which a buffer is large again."""

LEAST_WAITING: Final = 48
"""Datagrams for which a small buffer of an allocation has room in any case. With less room, a reader that has to wait for
the core would find too little afterwards."""

SHARED_LEAST_WAITING: Final = 320
"""The same for a socket that clients share: a batch for each of a few busy clients. With four such sockets this is 8 ms of
the packets that one CPU relays."""

# Packets that are too late.

CORE_WAIT: Final = 0.020
"""Seconds for which packets wait for the core. Later packets have little worth for their receiver, and delay the packets
behind them."""

HANDOVER_WAIT: Final = 1.0
"""The same during a handover, which must not lose packets."""

STALE_AFTER: Final = 1.0
"""Seconds in a socket after which packets are dropped. An overload delays packets by some 10 ms, so no thread has run for
this long: the process or its machine was stopped. The senders have sent the packets again or given up, and relaying
megabytes of them would leave no room for new packets."""

# Data that is early.

EARLY_AGE: Final = 1.0
"""Seconds for which ChannelData of an unbound channel waits for its ChannelBind, which usually follows within a
millisecond. A client retransmits a lost ChannelBind after half a second (RFC 8489 §6.2.1)."""

EARLY_CLIENT_BYTES: Final = 512 * 1024
"""Early data of one client. 200 packets of 1,200 bytes take 370 KB."""

EARLY_BYTES: Final = 8 * 1024 * 1024
"""Early data of all clients."""

EARLY_SHARE: Final = 8
"""A client may hold an eighth of the room that is left. So the share of each shrinks as more clients flood, and the next
client has as much: 512 KiB for 8 clients, 78 KB for 100."""

EARLY_OVERHEAD: Final = 1024
"""Bytes that count for each datagram besides its data. Its objects take up to 640 bytes, and time counts too: one
ChannelBind relays at most 510 datagrams, in 3 ms, and at most 8,160 channels expire together, in 5 ms."""

# Requests.

UNAUTHENTICATED_REQUESTS: Final = 16
"""Requests from addresses without an allocation that are looked at in one batch during a flood. Reading and dropping a
request costs 3 µs, answering it 30 to 60 µs: with batches of 128, a flood has to be several times as large until reading it
takes all the time."""

CLIENT_REQUESTS: Final = 16
"""The same for each client with an allocation."""

# Readers that compete for the CPU.

LOAD_CHECK_INTERVAL: Final = 64
"""Batches between two checks of the load."""

LOAD_WAITING: Final = 4
"""Readers that had a batch ready at a check make the load high. One or two now and then do not: yielding to them costs more
than it saves."""

LOAD_BATCH_SECONDS: Final = 0.0005
"""Mean duration of one batch, at most: a full batch on a slow machine. If a check takes longer, the CPU went to another
process, and yielding more often would not help."""

NEIGHBOUR_SHARE: Final = 0.1
"""Share of the relay's CPU, 0-1, that other processes use before readers preempt them. Readers that preempt each other too
cost 5 to 25 % more CPU. Readers that don't wait for the time slice of another process: beside two busy loops on two CPUs,
nine of ten packets took up to 3.0 ms instead of 0.3 ms."""

# Turns: limits of the time for which one message keeps the core.

TURN: Final = 0.002
"""Seconds of requests and mixed batches in one turn. The rest of a batch is handed in again, behind what waits."""

GIVE_WAY: Final = 0.0005
"""Seconds for which a thread with more work sleeps if other threads wait for the core."""

LONGEST_STUN: Final = 1500
"""Bytes. A STUN message fits the path's MTU (RFC 8489 §6.1). A message of 64 KiB could name 5,000 peers, and checking them
all delayed every packet by 130 ms."""

MIXED_DATAGRAMS: Final = 2048
"""Datagrams of a batch of several channels that are looked at: 0.8 ms. In a larger batch they have less than 80 bytes."""

MIXED_SENDS: Final = 128
MIXED_INTERVAL: Final = 0.005
"""Separate sends of one client's batches of several channels: 1 ms of 5. A full read has no more datagrams, unless the
kernel joined datagrams. The excess is dropped."""

REQUESTS_IN_A_BATCH: Final = 16
"""Requests of one GRO batch that are handled in one turn."""

EXPIRIES: Final = 256
"""Channels that expire in one turn: 1 ms, or 2 ms with their removal from the kernel. Other passed deadlines wait for the
next turn. Meanwhile each input first handles the passed deadlines of its own allocation and channel."""

COST_OF_FREEING: Final = 16
CHANNELS_PER_EXPIRY: Final = 16
"""The end of an allocation costs as much as 16 expiries, and its channels in memory a sixteenth of an expiry each. So does a
check that a channel's peer is no new address of this machine."""

STALE_DEADLINES: Final = 1024
"""Stale entries that are removed from the heap of deadlines in a row, in 1 ms. If 16,000 clients have refreshed together,
all their stale entries may reach the top at once: removing each would take 14 ms, a rebuild takes 2 ms."""

FORGOTTEN: Final = 4096
"""Remembered requests that are forgotten in one turn: 0.7 ms."""

KERNEL_PORTION: Final = 256
"""Channels that the kernel removes or extends in one turn, except for expiries: 2 ms."""
