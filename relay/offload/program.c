// Relays packets of bound channels in the kernel, before they become anybody's.
//
// The kernel runs `relay` (at the end) for each packet that an interface receives. In an order that a reader can follow:
//
//   read    take the packet apart: Ethernet, perhaps one VLAN tag, IPv4 or IPv6, UDP
//   find    look up the channel: by (client, channel number) for what clients send, by (peer, relayed port) for what peers
//           send; and a second one if the two ends of a conversation are clients of this relay (a hairpin)
//   route   take the next hop that the relay has found for the destination: interface, MAC addresses, source address
//   sum     work out the new UDP checksum from the old one
//   rewrite move the start of the packet, and write its new headers in front of the payload, which stays where it is
//   count   add it to what the relay reads now and then
//
// Whatever it is not sure of goes to the relay's sockets as if there were no program (XDP_PASS), and it makes up its mind
// before it changes a byte. It drops nothing. It decides nothing either: which channels there are, until when, and who is
// behind which MAC address, the relay writes into the tables below (relay/offload/layout.py has the same layout).
//
// Time is counted in the kernel's ticks, of which there are 100 to 1,000 a second: to read them costs next to nothing, and a
// clock costs a third of all that is done here. The relay knows when they began and how long they are.
//
// Addresses are IPv6 addresses, IPv4 ones as ::ffff:a.b.c.d, so that one pair of tables serves all. Fields that the
// packet has too (addresses, ports, channel numbers) stand in tables as they do in packets, in network byte order.

#include "kernel.h"

enum {
    OWN_ADDRESSES = 16,
    DEVICES = 8,
    SIZES = 16,      // of a histogram, in steps of 128 bytes
    SIZE_SHIFT = 7,
    UDP = 17,
    MIN_FRAME = 60,  // bytes; whether a driver pads shorter frames, nobody knows
    MAX_PADDED = 64,  // bytes; a frame with something behind its packet is never longer: with a tag, the tag may come on top
};

enum direction { TO_PEER, TO_CLIENT, DIRECTIONS };

// Why a datagram for the relay was left to its sockets: in the order of layout.py's PassReason.
enum reason {
    NO_CHANNEL_DATA,   // from a client: a request, or nothing the relay knows
    ODD_LENGTH,        // ChannelData with padding behind it, or cut off
    UNBOUND,           // no such channel, or none of that peer
    EXPIRED,           // the channel's time is over, or its allocation's
    NO_NEXT_HOP,       // where it has to go is not known, or not through one of our interfaces
    STALE_NEIGHBOUR,   // has the kernel ask whether the next hop is still where it was
    TOO_LONG,          // for the path's MTU, once its headers are on
    NO_CHECKSUM,       // UDP over IPv4 may leave it out; then there is none to work from
    PARTIAL_CHECKSUM,  // to be completed by an interface that it never went through
    SHORT_FRAME,
    LAST_HOP,          // its hop limit is used up
    NO_ROOM,           // the driver leaves no space for longer headers
    REASONS,
};

// ------------------------------------------------------------------------------------------------------- the tables

struct address {
    u32 word[4];
};

struct end {  // of a channel: where its packets come from, or go to
    struct address address;
    u16 port;
    u16 tag;  // of a client: the channel number; of a peer: the relayed port
};

struct __attribute__((aligned(8))) channel {  // as large as a line of the cache, since with many flows it is waited for
    struct end client, peer;
    u32 client_hop, peer_hop;  // indices into next_hops
    u32 expires;               // tick, its lower half; the allocation lasts no less
    u32 flow_label;            // of IPv6, 20 bits
    u32 flags;
    u32 version;  // odd while there is a channel here, and another one for each that comes
};
enum { HAIRPIN = 1 };  // its peer is a relayed address of this relay

// Of a hash table: where channels are. Most places are empty (0); the others have the index of a channel, + 1, in their lower
// half, and the upper half of the hash of its end.
enum { PLACES = 8 };
struct bucket {
    u64 place[PLACES];
};

struct mac {
    u16 part[3];
} IN_PACKET(2);

struct macs {  // as a frame begins
    struct mac to, from;
} IN_PACKET(4);

struct __attribute__((aligned(8))) next_hop {  // a line of the cache, likewise
    u32 version;   // odd while it is being written
    u32 ifindex;   // 0: not known
    struct address destination;  // whom it is for: an index may have been given to another since
    struct address source;
    struct macs macs;
    u16 vlan;      // 0: none
    u16 mtu;
    u16 flags;
    u16 unused;
    u32 nudged;    // tick at which a packet was last left to the sockets for a stale neighbour; written here only
};
enum { STALE = 1 };

struct own {
    struct address address;
    u16 vlan;  // by which packets for it come; 0: none
    u16 unused;
};

struct device {
    u32 ifindex;
    struct mac mac;
    u16 flags;
};
enum { SEND_BACK = 1 };  // the driver is known to send from where it receives (XDP_TX) without losing packets

enum { HASH_KEYS = 6 };
#define MIX 0x9e3779b97f4a7c15ULL

struct settings {
    u16 service_port, lowest_port, highest_port;  // in this machine's byte order
    u16 own_count;
    u64 hash_keys[HASH_KEYS];
    u32 bucket_mask;  // buckets of each hash table, which are a power of two, less one
    u32 second;       // ticks
    struct own own[OWN_ADDRESSES];
    u32 unused;
    u32 device_count;
    struct device devices[DEVICES];
};

struct usage {  // two to a line of the cache
    u64 packets, bytes, last_used, unused;
};

struct totals {
    u64 packets[DIRECTIONS], bytes[DIRECTIONS];  // payload, without any header
    u64 sizes[DIRECTIONS][SIZES];
    u64 passed[REASONS];
};

// The sizes are Python's too: layout.py is checked against these by a test.
_Static_assert(sizeof(struct end) == 20, "end");
_Static_assert(sizeof(struct channel) == 64, "channel");
_Static_assert(sizeof(struct next_hop) == 64, "next_hop");
_Static_assert(sizeof(struct settings) == 488, "settings");
_Static_assert(sizeof(struct usage) == 32, "usage");
_Static_assert(sizeof(struct totals) == 384, "totals");

// How many entries those have that are here with one, the relay says when it loads the program.
SECTION("maps") struct map channels = {ARRAY, sizeof(u32), sizeof(struct channel), 1, MMAPABLE};
// Hash tables of channels, by their two ends. The kernel's own take twice as long to be looked up in, and a system call to be
// written to.
SECTION("maps") struct map clients = {ARRAY, sizeof(u32), sizeof(struct bucket), 1, MMAPABLE};
SECTION("maps") struct map peers = {ARRAY, sizeof(u32), sizeof(struct bucket), 1, MMAPABLE};
SECTION("maps") struct map next_hops = {ARRAY, sizeof(u32), sizeof(struct next_hop), 1, MMAPABLE};
SECTION("maps") struct map usage = {PERCPU_ARRAY, sizeof(u32), sizeof(struct usage), 1, 0};
SECTION("maps") struct map settings = {ARRAY, sizeof(u32), sizeof(struct settings), 1, MMAPABLE};
SECTION("maps") struct map totals = {PERCPU_ARRAY, sizeof(u32), sizeof(struct totals), 1, 0};

// bpf_jiffies64 is free to all; the license is the kernel's question about the program itself.
SECTION("license") char terms[] = "Dual MIT/GPL";

// ------------------------------------------------------------------------------------------------- what packets have

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

// A packet, as it was read.
struct packet {
    struct end from;  // its tag is the one that it is looked up by
    struct address destination;
    u16 destination_port;
    u16 udp_length, checksum;
    u16 headers;  // bytes in front of the UDP header
    u16 vlan;     // 0: none
    u8 traffic_class, hop_limit;
    u64 addresses;  // the sum of both, for checksums
};

// A packet, as it shall be, and what that rests on.
struct plan {
    const struct settings *set;
    u64 now;         // tick
    struct end to;   // of a channel; its tag is the channel number if a client is there
    u32 next_hop;    // index into next_hops
    u32 flow_label;
    u32 sent;        // index into usage, + 1, if a client sent it
    u32 received;    // likewise, if a client gets it
    u32 payload;     // bytes
    u32 stripped;    // a ChannelData header to be taken off, as it stood
    u16 source_port;
    u16 strip;       // its bytes
    u16 put;         // bytes of a ChannelData header to be put in front
    u16 is_ipv4;     // of what is sent
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
    // Of a few dozen words: 33 bits are left after the first line, 18 after the second.
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    return (u16)((sum & 0xffff) + (sum >> 16));
}

INLINE int is_same_mac(const struct mac *one, const struct mac *other)
{
    return one->part[0] == other->part[0] && one->part[1] == other->part[1] && one->part[2] == other->part[2];
}

// Give the flags of the interface that a frame came by, or -1. Frames for all, and frames for other machines that an
// interface shows us nonetheless, are not ours to relay. (Flags, not the interface: for the kernel, which follows all paths,
// to know which of them it is makes eight times as many.)
INLINE int flags_of_device(const struct settings *set, u32 ifindex, const struct ethernet *frame)
{
    ROLLED for (u32 i = 0; i < DEVICES && i < set->device_count; i++)
        if (set->devices[i].ifindex == ifindex)
            return is_same_mac(&frame->to, &set->devices[i].mac) ? set->devices[i].flags : -1;
    return -1;
}

// On the same wire with another tag there may be another machine with the same address.
INLINE int is_own(const struct settings *set, const struct packet *packet)
{
    ROLLED for (u32 i = 0; i < OWN_ADDRESSES && i < set->own_count; i++)
        if (same(&set->own[i].address, &packet->destination))
            return set->own[i].vlan == packet->vlan;
    return 0;
}

// In this arithmetic 0xffff is 0, and so is this: to take a sum away from, which is always less.
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
    // Nobody else has looked at it yet. What fits by chance must not go anywhere.
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

    // A header of extensions between this one and UDP's is not for us to understand.
    if ((const u8 *)(ip + 1) > end || ip->next_header != UDP)
        return 0;
    first = BE32(ip->version_class_label);
    if (first >> 28 != 6)
        return 0;
    packet->from.address = ip->source;
    packet->destination = ip->destination;
    // No host has such an address (RFC 4291 §2.5.5.2); here it would be taken for an IPv4 client's.
    if (is_ipv4(&packet->from.address) || is_ipv4(&packet->destination))
        return 0;
    packet->addresses = sum_of(&packet->from.address) + sum_of(&packet->destination);
    packet->traffic_class = (u8)(first >> 20);
    packet->hop_limit = ip->hop_limit;
    packet->udp_length = BE16(ip->payload_length);
    packet->headers += sizeof(*ip);
    return 1;
}

// Give the UDP header; 0 if this is not a whole datagram for this machine.
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
    // What is behind the packet goes along. That may be padding, and no more: it would count for no MTU.
    if (packet->udp_length < end - (const u8 *)udp && end - data > MAX_PADDED)
        return 0;
    packet->from.port = udp->source;
    packet->destination_port = udp->destination;
    packet->checksum = udp->checksum;
    return udp;
}

// -------------------------------------------------------------------------------------------------------------- find

// Whoever doesn't know the keys can't choose addresses and ports that meet in one bucket; channel_tables.py has the same.
INLINE u64 hash_of(const u64 *keys, const struct end *end)
{
    const u32 *words = (const void *)end;
    u64 sum = keys[0];

    for (u32 i = 0; i < sizeof(*end) / sizeof(*words); i++)
        sum += keys[i + 1] * words[i];
    return (sum >> 32 ^ sum) * MIX;
}

INLINE int is_same_end(const struct end *one, const struct end *other)
{
    return one->port == other->port && one->tag == other->tag && same(&one->address, &other->address);
}

// Find a channel by an end, and give its index. One that is replaced while it is read is none: see `is_still`.
INLINE const struct channel *find(struct map *table, const struct settings *set, const struct end *end, u32 *found, u32 *version)
{
    u64 hash = hash_of(set->hash_keys, end), place = 0;
    u32 at = (u32)(hash >> 16) & set->bucket_mask, index;
    const struct bucket *bucket = bpf_map_lookup_elem(table, &at);
    const struct channel *channel;

    if (!bucket)
        return 0;
    UNROLLED for (u32 i = 0; i < PLACES; i++) {
        place = *(volatile const u64 *)&bucket->place[i];
        if (place >> 32 == hash >> 32)
            break;
    }
    // An empty one may seem to be it; its index is none.
    if (place >> 32 != hash >> 32)
        return 0;
    index = (u32)place - 1;
    channel = bpf_map_lookup_elem(&channels, &index);
    if (!channel)
        return 0;
    *found = index;
    *version = *(volatile const u32 *)&channel->version;
    IN_ORDER();
    return *version & 1 && is_same_end(table == &peers ? &channel->peer : &channel->client, end) ? channel : 0;
}

INLINE int is_still(const struct channel *channel, u32 version)
{
    IN_ORDER();
    return *(volatile const u32 *)&channel->version == version;
}

INLINE int is_over(const struct channel *channel, u64 now)
{
    return (int)((u32)now - channel->expires) >= 0;
}

// By the channel of a peer's end, to its client.
INLINE enum reason find_client(const struct end *end, struct plan *plan)
{
    u32 index, version;
    const struct channel *channel = find(&peers, plan->set, end, &index, &version);

    if (!channel)
        return UNBOUND;
    if (is_over(channel, plan->now))
        return EXPIRED;
    plan->to = channel->client;
    plan->next_hop = channel->client_hop;
    plan->flow_label = channel->flow_label;
    plan->received = index * DIRECTIONS + TO_CLIENT + 1;
    plan->source_port = BE16(plan->set->service_port);
    plan->put = sizeof(struct channel_data);
    return is_still(channel, version) ? REASONS : UNBOUND;
}

INLINE enum reason find_for_client(struct packet *packet, struct plan *plan)
{
    packet->from.tag = packet->destination_port;
    plan->payload = packet->udp_length - sizeof(struct udp);
    return find_client(&packet->from, plan);
}

INLINE enum reason find_for_peer(struct packet *packet, const struct channel_data *header, const u8 *end, struct plan *plan)
{
    const struct channel *channel;
    u32 index, version, flags;

    // 0x4000 to 0x7fff: the first two bits of what is no ChannelData differ (RFC 8656 §12).
    if ((const u8 *)(header + 1) > end || packet->udp_length < sizeof(struct udp) + sizeof(*header) ||
        (BE16(header->number) >> 14) != 1)
        return NO_CHANNEL_DATA;
    plan->payload = packet->udp_length - sizeof(struct udp) - sizeof(*header);
    if (BE16(header->length) != plan->payload)
        return ODD_LENGTH;
    packet->from.tag = header->number;
    channel = find(&clients, plan->set, &packet->from, &index, &version);
    if (!channel)
        return UNBOUND;
    if (is_over(channel, plan->now))
        return EXPIRED;
    plan->sent = index * DIRECTIONS + TO_PEER + 1;
    plan->strip = sizeof(*header);
    __builtin_memcpy(&plan->stripped, header, sizeof(*header));
    plan->to = channel->peer;
    plan->next_hop = channel->peer_hop;
    plan->flow_label = channel->flow_label;
    plan->source_port = channel->peer.tag;
    flags = channel->flags;
    if (!is_still(channel, version))
        return UNBOUND;
    if (flags & HAIRPIN) {
        // To the other allocation it comes from the relayed address of this one, which has the same host.
        const struct end from = {plan->to.address, plan->to.tag, plan->to.port};
        return find_client(&from, plan);
    }
    return REASONS;
}

// ------------------------------------------------------------------------------------------------------------- route

// Take the next hop of a plan. An entry that is being written, or was written for another destination, is none.
INLINE enum reason route(const struct plan *plan, struct next_hop *hop)
{
    struct next_hop *entry = bpf_map_lookup_elem(&next_hops, &plan->next_hop);
    u32 version;

    if (!entry)
        return NO_NEXT_HOP;
    version = *(volatile u32 *)&entry->version;
    IN_ORDER();
    *hop = *entry;
    IN_ORDER();
    if (version & 1 || *(volatile u32 *)&entry->version != version || !hop->ifindex ||
        !same(&hop->destination, &plan->to.address))
        return NO_NEXT_HOP;
    if (hop->flags & STALE && (u32)plan->now - hop->nudged >= plan->set->second) {
        entry->nudged = (u32)plan->now;
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

// Work out the UDP checksum from the old one by what changes (RFC 1624): a wrong one stays wrong, for the receiver to see.
INLINE u16 new_checksum(const struct packet *packet, const struct plan *plan, u64 addresses, u16 length, u32 put)
{
    u64 old = pseudo_header(packet->addresses, packet->udp_length) + packet->from.port + packet->destination_port +
              BE16(packet->udp_length) + plan->stripped;
    u64 new = pseudo_header(addresses, length) + plan->source_port + plan->to.port + BE16(length) + put;
    u16 sum = without((u64)(u16)~packet->checksum + (ZERO - old) + new);

    // 0 would say that there is none (RFC 768).
    return sum ? sum : 0xffff;
}

// ----------------------------------------------------------------------------------------------------------- rewrite

// In whole words, and the checksum of their values: to read back what was just written in smaller pieces would stall.
INLINE void write_ipv4(struct ipv4 *ip, const struct packet *packet, const struct next_hop *hop, u32 destination, u16 length)
{
    u32 first = 0x45 | (u32)packet->traffic_class << 8 | (u32)BE16((u16)(length + sizeof(*ip))) << 16;
    // As the relay's sockets send: not to be fragmented, and so without a number for its fragments (RFC 6864 §4.1).
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
    ip->version_class_label = BE32(0x60000000 | (u32)packet->traffic_class << 20) | plan->flow_label;
    ip->payload_length = BE16(length);
    ip->next_header = UDP;
    ip->hop_limit = (u8)(packet->hop_limit - 1);
    ip->source = hop->source;
    ip->destination = plan->to.address;
}

// Write all headers in front of the payload. There is room: the start of the packet was moved to fit. Give where the next
// header would begin, or 0 if the kernel's proof of that can't be had, which does not happen.
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
    // The new ChannelData header, or 0.
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

// --------------------------------------------------------------------------------------------------- all of it, in order

// Decide on all there is to decide on, without touching the packet. REASONS says that nothing stands against it.
INLINE enum reason decide(struct packet *packet, const struct udp *udp, const u8 *end, enum direction direction,
                          struct plan *plan, struct next_hop *hop)
{
    enum reason against =
        direction == TO_PEER ? find_for_peer(packet, (const void *)(udp + 1), end, plan) : find_for_client(packet, plan);
    u32 length;

    if (against != REASONS)
        return against;
    if (!packet->checksum)
        return NO_CHECKSUM;
    // Also what tells a train of datagrams, which generic mode is given in one piece, from a single one.
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
    flags = flags_of_device(set, context->ingress_ifindex, (const void *)data);
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
    plan.now = bpf_jiffies64();
    against = decide(&packet, udp, end, direction, &plan, &hop);
    if (against == REASONS) {
        headers = sizeof(struct ethernet) + (hop.vlan ? sizeof(struct vlan_tag) : 0) +
                  (plan.is_ipv4 ? sizeof(struct ipv4) : sizeof(struct ipv6)) + plan.put;
        if (bpf_xdp_adjust_head(context, packet.headers + plan.strip - headers))
            against = NO_ROOM;
    }
    if (against != REASONS) {
        // The bound is for the kernel, which does not know that all reasons are below it. Not compared sooner: then the
        // compiler could not lead here straight from where a reason is found, and every packet would pay for that.
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
