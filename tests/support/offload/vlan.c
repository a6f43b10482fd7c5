// Stands in for an interface in a VLAN, which not every kernel has: what leaves by CHILD gets a tag and goes out by TRUNK, and
// what comes by TRUNK with that tag loses it and comes by CHILD. CHILD is one end of a pair; the other runs `to_trunk`.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTION(name) __attribute__((section(name), used))

struct __sk_buff {
    u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto;
};

static long (*bpf_skb_vlan_push)(struct __sk_buff *packet, u16 protocol, u16 tag) = (void *)18;
static long (*bpf_skb_vlan_pop)(struct __sk_buff *packet) = (void *)19;
static long (*bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*bpf_skb_load_bytes)(const struct __sk_buff *packet, u32 offset, void *to, u32 length) = (void *)26;

enum { OK = 0, DROP = 2, RECEIVED = 1 };
enum { IPV4 = 0x0008, VLAN = 0x0081, PEER = 0x02024d0a };  // 10.77.2.2; in network byte order

SECTION("to_trunk") int send_by_trunk(struct __sk_buff *packet)
{
    bpf_skb_vlan_push(packet, VLAN, TAG);
    return (int)bpf_redirect(TRUNK, 0);
}

SECTION("from_trunk") int receive_from_trunk(struct __sk_buff *packet)
{
    if (!packet->vlan_present || (packet->vlan_tci & 0xfff) != TAG)
        return OK;
    bpf_skb_vlan_pop(packet);
    return (int)bpf_redirect(CHILD, RECEIVED);
}

SECTION("tag") int tag_all(struct __sk_buff *packet)
{
    bpf_skb_vlan_push(packet, VLAN, TAG);
    return OK;
}

SECTION("tag_peer") int tag_what_the_peer_sends(struct __sk_buff *packet)
{
    u32 source;
    u16 type;

    if (!bpf_skb_load_bytes(packet, 12, &type, sizeof(type)) && type == IPV4 &&
        !bpf_skb_load_bytes(packet, 26, &source, sizeof(source)) && source == PEER)
        bpf_skb_vlan_push(packet, VLAN, TAG);
    return OK;
}

SECTION("untag") int lose_tag(struct __sk_buff *packet)
{
    if (packet->vlan_present)
        bpf_skb_vlan_pop(packet);
    return OK;
}

SECTION("only_tagged") int take_only_what_is_tagged(struct __sk_buff *packet)
{
    if (!packet->vlan_present || (packet->vlan_tci & 0xfff) != TAG)
        return DROP;
    bpf_skb_vlan_pop(packet);
    return OK;
}

SECTION("only_untagged") int take_only_what_is_untagged(struct __sk_buff *packet)
{
    return packet->vlan_present ? DROP : OK;
}

SECTION("license") char terms[] = "GPL";
