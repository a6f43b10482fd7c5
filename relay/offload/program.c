// An XDP program that relays packets of bound channels, before they reach the network stack.
//
// The kernel runs `relay` (at the end) for each packet that an interface receives:
//
//   read    parse the packet: Ethernet, an optional VLAN tag, IPv4 or IPv6, UDP
//   find    look up the channel: by (client, channel number) for packets from clients, by (peer, relayed port) for packets
//           from peers. A hairpin, in which the peer is another client of this relay, needs both lookups. Check that the
//           sender is where its address is.
//   route   read the next hop of the destination: interface, MAC addresses, source address
//   sum     compute the new UDP checksum from the old checksum
//   rewrite move the start of the packet, and write new headers in front of the payload, which does not move
//   count   update the counters
//
// Doubtful packets go to the relay's sockets (XDP_PASS), before the program has changed a byte. The program drops nothing,
// and makes no decisions: the relay writes channels, deadlines and next hops into the tables below, whose layout is also in
// relay/offload/layout.py.
//
// Time is CLOCK_MONOTONIC_COARSE in nanoseconds: up to a tick late (1 to 10 ms), and read in a tenth of the time of an exact
// clock. The relay writes deadlines that are a tick early.
//
// All addresses are IPv6 addresses, with IPv4 addresses as ::ffff:a.b.c.d, so that all packets use the same tables.
// Addresses, ports and channel numbers in tables are in network byte order.

#include "kernel.h"

enum {
    OWN_ADDRESSES = 16,
    DEVICES = 16,
    SIZES = 16,      // of a histogram, in steps of 128 bytes
    SIZE_SHIFT = 7,
    UDP = 17,
    MIN_FRAME = 60,  // bytes; not every driver pads shorter frames
    MAX_PADDED = 64,  // bytes of the longest frame with padding: a tag may be added to 60 bytes
    SECOND = 1000000000,  // ns
};

enum direction { TO_PEER, TO_CLIENT, DIRECTIONS };

// Reasons for leaving a datagram to the relay's sockets, in the order of PassReason in layout.py.
enum reason {
    NO_CHANNEL_DATA,   // from a client: a request, or an unknown message
    ODD_LENGTH,        // ChannelData with padding, or truncated
    UNBOUND,           // unknown channel number or peer
    EXPIRED,           // the channel or its allocation has expired
    NO_NEXT_HOP,       // the next hop is unknown, or on an interface without the program
    STALE_NEIGHBOUR,   // makes the kernel probe the next hop
    TOO_LONG,          // for the path MTU, with the new headers
    NO_CHECKSUM,       // UDP over IPv4 without a checksum, which can't be updated
    PARTIAL_CHECKSUM,  // an interface should have completed it, but the packet passed through none
    SHORT_FRAME,
    LAST_HOP,          // the hop limit is 1
    NO_ROOM,           // the driver's headroom is too small for longer headers
    WRONG_WAY,         // the sender is not where its address is: the kernel may reject the packet
    REASONS,
};

// ------------------------------------------------------------------------------------------------------- the tables

struct address {
    u32 word[4];
};

struct end {  // one of the two ends of a channel
    struct address address;
    u16 port;
    u16 tag;  // of a client: the channel number; of a peer: the relayed port
};

// A channel, as seen from one of its ends: the entry of `clients` for its client, or of `peers` for its peer.
struct channel {
    u64 expires;  // not later than the allocation
    u64 check;
    struct end other;
    u32 slot;   // of the counters; and HAIRPIN
    u32 place;  // in `ways`, of the host at this end
};
enum { HAIRPIN = 1u << 31 };  // the peer is a relayed address of this relay

struct mac {
    u16 part[3];
} IN_PACKET(2);

struct macs {  // the start of a frame
    struct mac to, from;
} IN_PACKET(4);

struct next_hop {
    u32 ifindex;
    struct address source;
    struct macs macs;
    u16 vlan;  // 0: none
    u16 mtu;
    u32 flags;
    u64 check;
    u64 nudged;  // time of the last STALE_NEIGHBOUR; only the program writes this
};
enum { STALE = 1 };

struct own {
    struct address address;
    u16 vlan;  // of packets for the address; 0: none
    u16 unused;
};

struct device {
    u32 ifindex;
    struct mac mac;
    u16 flags;
    u32 upper;  // the bond of a port; else the same as ifindex
};
enum {
    SEND_BACK = 1,  // the driver reliably sends from the receiving interface (XDP_TX)
    STRICT = 2,     // the kernel may accept packets only by the interface of the route to their source (rp_filter=1)
};

struct settings {
    u16 service_port, lowest_port, highest_port;  // in host byte order
    u16 own_count;
    struct own own[OWN_ADDRESSES];
    u32 device_count;
    struct device devices[DEVICES];
};

struct usage {  // half a cache line
    u64 packets, bytes, last_used, unused;
};

struct totals {
    u64 packets[DIRECTIONS], bytes[DIRECTIONS];  // bytes of payload
    u64 sizes[DIRECTIONS][SIZES];
    u64 passed[REASONS];
    u64 frames[DEVICES];  // of all kinds, by place in the settings
};

// A test compares layout.py with these sizes.
_Static_assert(sizeof(struct end) == 20, "end");
_Static_assert(sizeof(struct channel) == 48, "channel");
_Static_assert(sizeof(struct next_hop) == 56, "next_hop");
_Static_assert(sizeof(struct settings) == 588, "settings");
_Static_assert(sizeof(struct usage) == 32, "usage");
_Static_assert(sizeof(struct totals) == 520, "totals");

// The relay replaces max_entries when it loads the program.
SECTION("maps") struct map clients = {HASH, sizeof(struct end), sizeof(struct channel), 1, 0};
SECTION("maps") struct map peers = {HASH, sizeof(struct end), sizeof(struct channel), 1, 0};
SECTION("maps") struct map next_hops = {HASH, sizeof(struct address), sizeof(struct next_hop), 1, 0};
SECTION("maps") struct map ways = {ARRAY, sizeof(u32), sizeof(u64), 1, 0};
SECTION("maps") struct map usage = {PERCPU_ARRAY, sizeof(u32), sizeof(struct usage), 1, 0};
SECTION("maps") struct map settings = {ARRAY, sizeof(u32), sizeof(struct settings), 1, 0};
SECTION("maps") struct map totals = {PERCPU_ARRAY, sizeof(u32), sizeof(struct totals), 1, 0};

// The kernel requires a license. All used functions are available to any license.
SECTION("license") char terms[] = "Dual MIT/GPL";

// --------------------------------------------------------------------------------------------------- packet headers

struct ethernet {
    struct mac to, from;
    u16 type;
} IN_PACKET(2);
enum { IPV4 = BE16(0x0800), IPV6 = BE16(0x86dd), VLAN = BE16(0x8100), VLAN_ID = BE16(0x0fff) };

struct vlan_tag {
    u16 tag, type;
} IN_PACKET(4);

struct ipv4 {
    union {
        struct {
            u8 version_and_length, traffic_class;
            u16 length, id, fragment;
            u8 hop_limit, protocol;
            u16 checksum;
            u32 source, destination;
        } IN_PACKET(4);
        u32 words[5];
    } IN_PACKET(4);
} IN_PACKET(4);
enum { DONT_FRAGMENT = BE16(0x4000), ANY_FRAGMENT = BE16(0x3fff) };

struct ipv6 {
    u32 version_class_label;
    u16 payload_length;
    u8 next_header, hop_limit;
    struct address source, destination;
} IN_PACKET(4);

struct udp {
    u16 source, destination, length, checksum;
} IN_PACKET(4);

struct channel_data {
    u16 number, length;
} IN_PACKET(4);

_Static_assert(sizeof(struct ethernet) == 14 && sizeof(struct vlan_tag) == 4, "Ethernet");
_Static_assert(sizeof(struct ipv4) == 20 && sizeof(struct ipv6) == 40 && sizeof(struct udp) == 8, "IP");

// The received packet.
struct packet {
    struct end from;  // with the tag for the lookup
    struct address destination;
    u16 destination_port;
    u16 udp_length, checksum;
    u16 headers;  // bytes before the UDP header
    u16 vlan;     // 0: none
    u8 traffic_class, hop_limit;
    u32 upper;    // of the receiving interface
    u64 addresses;  // sum of both addresses, for checksums
};

// The packet to send, and the data for building it.
struct plan {
    const struct settings *set;
    u64 now;
    struct end to;   // the destination; tag is the channel number of a client
    u32 slot;        // of the channel, for its flow label
    u32 place;       // of the sender's host
    u32 sent;        // index into usage + 1, if a client sent the packet
    u32 received;    // index into usage + 1, if a client receives the packet
    u32 payload;     // bytes
    u32 stripped;    // the removed ChannelData header, in network byte order
    u16 source_port;
    u16 strip;       // bytes of the removed ChannelData header
    u16 put;         // bytes of the added ChannelData header
    u16 is_ipv4;     // of the packet to send
};

// -------------------------------------------------------------------------------------------------------------- read

INLINE int same(const struct address *one, const struct address *other)
{
    return one->word[0] == other->word[0] && one->word[1] == other->word[1] && one->word[2] == other->word[2] &&
           one->word[3] == other->word[3];
}

INLINE struct address mapped(u32 ipv4)
{
    return (struct address){{0, 0, BE32(0xffff), ipv4}};
}

INLINE int is_ipv4(const struct address *address)
{
    return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == BE32(0xffff);
}

INLINE u16 folded(u64 sum)
{
    // The sum of a few dozen words has 33 bits after the first line, and 18 bits after the second line.
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    return (u16)((sum & 0xffff) + (sum >> 16));
}

INLINE int is_same_mac(const struct mac *one, const struct mac *other)
{
    return one->part[0] == other->part[0] && one->part[1] == other->part[1] && one->part[2] == other->part[2];
}

// Return the flags of the receiving interface, or -1 if the frame is not for this interface's MAC address (broadcast, or
// promiscuous mode). Returning the interface instead would multiply the paths that the kernel's verifier follows by eight.
INLINE int flags_of_device(const struct settings *set, u64 *frames, u32 ifindex, const struct ethernet *frame, u32 *upper)
{
    ROLLED for (u32 i = 0; i < DEVICES && i < set->device_count; i++)
        if (set->devices[i].ifindex == ifindex) {
            frames[i]++;
            *upper = set->devices[i].upper;
            return is_same_mac(&frame->to, &set->devices[i].mac) ? set->devices[i].flags : -1;
        }
    return -1;
}

// Return whether the packet is for this machine. With another tag on the same wire, another machine may have the address.
INLINE int is_own(const struct settings *set, const struct packet *packet)
{
    ROLLED for (u32 i = 0; i < OWN_ADDRESSES && i < set->own_count; i++)
        if (same(&set->own[i].address, &packet->destination))
            return set->own[i].vlan == packet->vlan;
    return 0;
}

// A multiple of 0xffff, which is 0 in ones' complement arithmetic. It is larger than every sum subtracted from it.
#define ZERO (0xffffULL << 21)

INLINE u64 sum_of(const struct address *address)
{
    return (u64)address->word[0] + address->word[1] + address->word[2] + address->word[3];
}

INLINE u64 ipv4_sum(const struct ipv4 *ip)
{
    return (u64)ip->words[0] + ip->words[1] + ip->words[2] + ip->words[3] + ip->words[4];
}

INLINE int read_ipv4(const struct ipv4 *ip, const u8 *end, struct packet *packet)
{
    if ((const u8 *)(ip + 1) > end || ip->version_and_length != 0x45 || ip->protocol != UDP || (ip->fragment & ANY_FRAGMENT))
        return 0;
    // Nothing has checked the packet yet, and a damaged packet must not match a channel by chance.
    if (folded(ipv4_sum(ip)) != 0xffff)
        return 0;
    packet->from.address = mapped(ip->source);
    packet->destination = mapped(ip->destination);
    packet->addresses = (u64)ip->source + ip->destination;
    packet->traffic_class = ip->traffic_class;
    packet->hop_limit = ip->hop_limit;
    packet->udp_length = (u16)(BE16(ip->length) - sizeof(*ip));
    packet->headers += sizeof(*ip);
    return 1;
}

INLINE int read_ipv6(const struct ipv6 *ip, const u8 *end, struct packet *packet)
{
    u32 first;

    // Extension headers are not supported.
    if ((const u8 *)(ip + 1) > end || ip->next_header != UDP)
        return 0;
    first = BE32(ip->version_class_label);
    if (first >> 28 != 6)
        return 0;
    packet->from.address = ip->source;
    packet->destination = ip->destination;
    // No host has a mapped address (RFC 4291 §2.5.5.2), and the tables would confuse it with an IPv4 address.
    if (is_ipv4(&packet->from.address) || is_ipv4(&packet->destination))
        return 0;
    packet->addresses = sum_of(&packet->from.address) + sum_of(&packet->destination);
    packet->traffic_class = (u8)(first >> 20);
    packet->hop_limit = ip->hop_limit;
    packet->udp_length = BE16(ip->payload_length);
    packet->headers += sizeof(*ip);
    return 1;
}

// Return the UDP header, or 0 if the packet is not a whole UDP datagram.
INLINE const struct udp *read(const u8 *data, const u8 *end, struct packet *packet)
{
    const struct ethernet *frame = (const void *)data;
    const struct vlan_tag *tag = (const void *)(frame + 1);
    const struct udp *udp;
    const void *ip = tag;
    u16 type;

    if ((const u8 *)(frame + 1) > end)
        return 0;
    type = frame->type;
    packet->headers = sizeof(*frame);
    if (type == VLAN) {
        if ((const u8 *)(tag + 1) > end)
            return 0;
        type = tag->type;
        packet->vlan = tag->tag & VLAN_ID;
        packet->headers += sizeof(*tag);
        ip = tag + 1;
    }
    if (type == IPV4) {
        if (!read_ipv4(ip, end, packet))
            return 0;
        udp = ip + sizeof(struct ipv4);
    } else if (type == IPV6) {
        if (!read_ipv6(ip, end, packet))
            return 0;
        udp = ip + sizeof(struct ipv6);
    } else {
        return 0;
    }
    if ((const u8 *)(udp + 1) > end || BE16(udp->length) != packet->udp_length || packet->udp_length < sizeof(*udp) ||
        packet->udp_length > end - (const u8 *)udp)
        return 0;
    // Data behind the packet is relayed with it. Only padding is allowed, because this data is not included in MTU checks.
    if (packet->udp_length < end - (const u8 *)udp && end - data > MAX_PADDED)
        return 0;
    packet->from.port = udp->source;
    packet->destination_port = udp->destination;
    packet->checksum = udp->checksum;
    return udp;
}

// -------------------------------------------------------------------------------------------------------------- find

// The kernel reuses the memory of a removed or replaced entry at once, even while this program reads it. An entry therefore
// has a sum of its words and its key, each times a weight, and only a copy with the right sum is used. So a copy that is half
// of another entry goes to the sockets, whatever the order in which this CPU sees stores. layout.py has the same sum.
#define MIX 0x9e3779b97f4a7c15ULL

INLINE u64 weighted(u64 sum, const void *words, u32 size, u64 *weight)
{
    UNROLLED for (u32 i = 0; i < size / sizeof(u32); i++) {
        sum += ((const u32 *)words)[i] * *weight;
        *weight *= MIX;
    }
    return sum;
}

// Copy the channel of an end. Return 0 without a channel, or during a change.
INLINE int find(struct map *table, const struct end *end, struct channel *found)
{
    const struct channel *entry = bpf_map_lookup_elem(table, end);
    u64 weight = MIX, sum;

    if (!entry)
        return 0;
    *found = *entry;
    IN_ORDER();
    sum = weighted(0, table == &clients ? end : &found->other, sizeof(*end), &weight);
    sum = weighted(sum, table == &clients ? &found->other : end, sizeof(*end), &weight);
    sum = weighted(sum, &found->expires, sizeof(found->expires), &weight);
    sum = weighted(sum, &found->slot, sizeof(found->slot), &weight);
    return weighted(sum, &found->place, sizeof(found->place), &weight) == found->check;
}

// Find the channel of a peer, and plan the packet to its client.
INLINE enum reason find_client(const struct end *end, struct plan *plan)
{
    struct channel channel;

    if (!find(&peers, end, &channel))
        return UNBOUND;
    if (plan->now >= channel.expires)
        return EXPIRED;
    plan->to = channel.other;
    plan->slot = channel.slot & ~HAIRPIN;
    plan->place = channel.place;
    plan->received = plan->slot * DIRECTIONS + TO_CLIENT + 1;
    plan->source_port = BE16(plan->set->service_port);
    plan->put = sizeof(struct channel_data);
    return REASONS;
}

INLINE enum reason find_for_client(struct packet *packet, struct plan *plan)
{
    packet->from.tag = packet->destination_port;
    plan->payload = packet->udp_length - sizeof(struct udp);
    return find_client(&packet->from, plan);
}

INLINE enum reason find_for_peer(struct packet *packet, const struct channel_data *header, const u8 *end, struct plan *plan)
{
    struct channel channel;

    // ChannelData has the numbers 0x4000 to 0x7fff. Other messages have other values of the first two bits (RFC 8656 §12).
    if ((const u8 *)(header + 1) > end || packet->udp_length < sizeof(struct udp) + sizeof(*header) ||
        (BE16(header->number) >> 14) != 1)
        return NO_CHANNEL_DATA;
    plan->payload = packet->udp_length - sizeof(struct udp) - sizeof(*header);
    if (BE16(header->length) != plan->payload)
        return ODD_LENGTH;
    packet->from.tag = header->number;
    if (!find(&clients, &packet->from, &channel))
        return UNBOUND;
    if (plan->now >= channel.expires)
        return EXPIRED;
    plan->to = channel.other;
    plan->slot = channel.slot & ~HAIRPIN;
    plan->sent = plan->slot * DIRECTIONS + TO_PEER + 1;
    plan->strip = sizeof(*header);
    __builtin_memcpy(&plan->stripped, header, sizeof(*header));
    plan->source_port = channel.other.tag;
    if (channel.slot & HAIRPIN) {
        // The other allocation gets the packet from this allocation's relayed address, which is on the same host.
        const struct end from = {plan->to.address, plan->to.tag, plan->to.port};
        enum reason against = find_client(&from, plan);
        if (against != REASONS)
            return against;
    }
    plan->place = channel.place;
    return REASONS;
}

// Check that the packet came from another machine, and with a strict rp_filter by the interface of the route to its source.
// The kernel drops most other packets, and decides about all of them.
INLINE int came_right(const struct packet *packet, const struct plan *plan, int flags)
{
    const u64 *way = bpf_map_lookup_elem(&ways, &plan->place);

    if (!way || !*way)
        return 0;
    return !(flags & STRICT) || !is_ipv4(&packet->from.address) || *way == ((u64)packet->upper << 16 | packet->vlan);
}

// ------------------------------------------------------------------------------------------------------------- route

// Copy the next hop of a plan.
INLINE enum reason route(const struct plan *plan, struct next_hop *hop)
{
    struct next_hop *entry = bpf_map_lookup_elem(&next_hops, &plan->to.address);
    u64 weight = MIX, sum;

    if (!entry)
        return NO_NEXT_HOP;
    *hop = *entry;
    IN_ORDER();
    sum = weighted(0, &plan->to.address, sizeof(struct address), &weight);
    if (weighted(sum, hop, __builtin_offsetof(struct next_hop, check), &weight) != hop->check)
        return NO_NEXT_HOP;
    if (hop->flags & STALE && plan->now - hop->nudged >= SECOND) {
        entry->nudged = plan->now;
        return STALE_NEIGHBOUR;
    }
    return REASONS;
}

// -------------------------------------------------------------------------------------------------------------- sum

INLINE u64 pseudo_header(u64 addresses, u16 length)
{
    return addresses + BE16(UDP) + BE16(length);
}

INLINE u16 without(u64 sum)
{
    return (u16)~folded(sum);
}

// Update the UDP checksum (RFC 1624). A wrong checksum stays wrong, so that the receiver detects it.
INLINE u16 new_checksum(const struct packet *packet, const struct plan *plan, u64 addresses, u16 length, u32 put)
{
    u64 old = pseudo_header(packet->addresses, packet->udp_length) + packet->from.port + packet->destination_port +
              BE16(packet->udp_length) + plan->stripped;
    u64 new = pseudo_header(addresses, length) + plan->source_port + plan->to.port + BE16(length) + put;
    u16 sum = without((u64)(u16)~packet->checksum + (ZERO - old) + new);

    // 0 would mean that there is no checksum (RFC 768).
    return sum ? sum : 0xffff;
}

// ----------------------------------------------------------------------------------------------------------- rewrite

// Write whole words, and compute the checksum from their values: reading back smaller fields would stall the CPU.
INLINE void write_ipv4(struct ipv4 *ip, const struct packet *packet, const struct next_hop *hop, u32 destination, u16 length)
{
    u32 first = 0x45 | (u32)packet->traffic_class << 8 | (u32)BE16((u16)(length + sizeof(*ip))) << 16;
    // Don't fragment, as for the relay's sockets, and therefore without an ID (RFC 6864 §4.1).
    u32 second = (u32)DONT_FRAGMENT << 16;
    u32 third = (u32)(packet->hop_limit - 1) | UDP << 8;
    u16 checksum = without((u64)first + second + third + hop->source.word[3] + destination);

    ip->words[0] = first;
    ip->words[1] = second;
    ip->words[2] = third | (u32)checksum << 16;
    ip->words[3] = hop->source.word[3];
    ip->words[4] = destination;
}

INLINE void write_ipv6(struct ipv6 *ip, const struct packet *packet, const struct next_hop *hop, const struct plan *plan,
                       u16 length)
{
    // Any number except 0 is a valid flow label if only one flow has it (RFC 6437 §3): the factor is odd, and spreads slots.
    u32 flow_label = (plan->slot + 1) * (u32)MIX & 0xfffff;

    ip->version_class_label = BE32(0x60000000 | (u32)packet->traffic_class << 20 | flow_label);
    ip->payload_length = BE16(length);
    ip->next_header = UDP;
    ip->hop_limit = (u8)(packet->hop_limit - 1);
    ip->source = hop->source;
    ip->destination = plan->to.address;
}

// Write the Ethernet header and an optional VLAN tag, and return the start of the next header. The packet has enough room,
// so the return value 0 exists only for the kernel's verifier.
INLINE void *write_link(u8 *data, const u8 *end, const struct next_hop *hop, u16 type)
{
    struct ethernet *frame = (void *)data;
    struct vlan_tag *tag = (void *)(frame + 1);

    if ((u8 *)(frame + 1) > end)
        return 0;
    *(struct macs *)frame = hop->macs;
    frame->type = hop->vlan ? VLAN : type;
    if (!hop->vlan)
        return tag;
    if ((u8 *)(tag + 1) > end)
        return 0;
    tag->tag = hop->vlan;
    tag->type = type;
    return tag + 1;
}

INLINE int rewrite(struct xdp_md *context, const struct packet *packet, const struct plan *plan, const struct next_hop *hop)
{
    u16 length = (u16)(sizeof(struct udp) + plan->put + plan->payload);
    // The added ChannelData header, or 0.
    u32 put = plan->put ? (u32)plan->to.tag | (u32)BE16((u16)plan->payload) << 16 : 0;
    u64 addresses;
    const u8 *end;
    struct udp *udp;
    void *next;

    end = (const u8 *)(uptr)context->data_end;
    if (plan->is_ipv4) {
        struct ipv4 *ip = next = write_link((u8 *)(uptr)context->data, end, hop, IPV4);
        if (!next || (u8 *)(ip + 1) > end)
            return 0;
        write_ipv4(ip, packet, hop, plan->to.address.word[3], length);
        addresses = (u64)hop->source.word[3] + plan->to.address.word[3];
        udp = (void *)(ip + 1);
    } else {
        struct ipv6 *ip = next = write_link((u8 *)(uptr)context->data, end, hop, IPV6);
        if (!next || (u8 *)(ip + 1) > end)
            return 0;
        write_ipv6(ip, packet, hop, plan, length);
        addresses = sum_of(&hop->source) + sum_of(&plan->to.address);
        udp = (void *)(ip + 1);
    }
    if ((u8 *)(udp + 1) > end)
        return 0;
    udp->source = plan->source_port;
    udp->destination = plan->to.port;
    udp->length = BE16(length);
    udp->checksum = new_checksum(packet, plan, addresses, length, put);
    if (plan->put) {
        if ((u8 *)(udp + 1) + sizeof(put) > end)
            return 0;
        __builtin_memcpy(udp + 1, &put, sizeof(put));
    }
    return 1;
}

// ------------------------------------------------------------------------------------------------------------- count

INLINE void count_one(struct totals *all, u32 index, enum direction direction, u32 payload, u64 now)
{
    struct usage *use = bpf_map_lookup_elem(&usage, &index);
    u32 size = payload >> SIZE_SHIFT;

    COMPARED(size);
    all->packets[direction]++;
    all->bytes[direction] += payload;
    all->sizes[direction][size < SIZES ? size : SIZES - 1]++;
    if (use) {
        use->packets++;
        use->bytes += payload;
        use->last_used = now;
    }
}

INLINE void count(struct totals *all, const struct plan *plan)
{
    if (plan->sent)
        count_one(all, plan->sent - 1, TO_PEER, plan->payload, plan->now);
    if (plan->received)
        count_one(all, plan->received - 1, TO_CLIENT, plan->payload, plan->now);
}

// ----------------------------------------------------------------------------------------------------- the whole program

// Plan the packet without changing it. Return REASONS if the packet can be relayed, else the reason against it.
INLINE enum reason decide(struct packet *packet, const struct udp *udp, const u8 *end, enum direction direction, int flags,
                          struct plan *plan, struct next_hop *hop)
{
    enum reason against =
        direction == TO_PEER ? find_for_peer(packet, (const void *)(udp + 1), end, plan) : find_for_client(packet, plan);
    u32 length;

    if (against != REASONS)
        return against;
    if (!came_right(packet, plan, flags))
        return WRONG_WAY;
    if (!packet->checksum)
        return NO_CHECKSUM;
    // This also detects a GSO or GRO batch in generic mode.
    if (packet->checksum == folded(pseudo_header(packet->addresses, packet->udp_length)))
        return PARTIAL_CHECKSUM;
    if (packet->hop_limit <= 1)
        return LAST_HOP;
    against = route(plan, hop);
    if (against != REASONS)
        return against;
    plan->is_ipv4 = is_ipv4(&plan->to.address);
    length = (plan->is_ipv4 ? sizeof(struct ipv4) : sizeof(struct ipv6)) + sizeof(struct udp) + plan->put + plan->payload;
    if (length > hop->mtu)
        return TOO_LONG;
    return length + sizeof(struct ethernet) < MIN_FRAME ? SHORT_FRAME : REASONS;
}

SECTION("xdp") int relay(struct xdp_md *context)
{
    const u32 zero = 0;
    const u8 *data = (const u8 *)(uptr)context->data, *end = (const u8 *)(uptr)context->data_end;
    const struct settings *set = bpf_map_lookup_elem(&settings, &zero);
    struct totals *all = bpf_map_lookup_elem(&totals, &zero);
    const struct udp *udp;
    struct packet packet = {};
    struct plan plan = {};
    struct next_hop hop;
    enum direction direction;
    u32 against;
    int headers, flags;
    u16 port;

    if (!set || !all || data + sizeof(struct ethernet) > end)
        return XDP_PASS;
    flags = flags_of_device(set, all->frames, context->ingress_ifindex, (const void *)data, &packet.upper);
    if (flags < 0)
        return XDP_PASS;
    udp = read(data, end, &packet);
    if (!udp)
        return XDP_PASS;
    port = BE16(packet.destination_port);
    if (port == set->service_port)
        direction = TO_PEER;
    else if (port >= set->lowest_port && port <= set->highest_port)
        direction = TO_CLIENT;
    else
        return XDP_PASS;
    if (!is_own(set, &packet))
        return XDP_PASS;

    plan.set = set;
    plan.now = bpf_ktime_get_coarse_ns();
    against = decide(&packet, udp, end, direction, flags, &plan, &hop);
    if (against == REASONS) {
        headers = sizeof(struct ethernet) + (hop.vlan ? sizeof(struct vlan_tag) : 0) +
                  (plan.is_ipv4 ? sizeof(struct ipv4) : sizeof(struct ipv6)) + plan.put;
        if (bpf_xdp_adjust_head(context, packet.headers + plan.strip - headers))
            against = NO_ROOM;
    }
    if (against != REASONS) {
        // The kernel's verifier needs this bound. An earlier comparison would prevent the compiler from jumping here
        // directly from each reason, and slow down every packet.
        COMPARED(against);
        if (against < REASONS)
            all->passed[against]++;
        return XDP_PASS;
    }
    if (!rewrite(context, &packet, &plan, &hop))
        return XDP_ABORTED;
    count(all, &plan);
    if (hop.ifindex == context->ingress_ifindex && flags & SEND_BACK)
        return XDP_TX;
    return (int)bpf_redirect(hop.ifindex, 0);
}
