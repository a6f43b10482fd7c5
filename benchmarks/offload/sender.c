// Send packets of many flows in turn, with a limit of packets in flight. Runs as a test with live frames.

#include "load.h"

// Write all headers: the kernel reuses frames, with the headers of the relay.
INLINE int write_headers(struct xdp_md *context, const struct headers *headers)
{
    struct headers *frame = (void *)(uptr)context->data;

    if ((u8 *)frame + HEADERS > (u8 *)(uptr)context->data_end)
        return 0;
    for (int i = 0; i < 5; i++)
        frame->words[i] = headers->words[i];
    frame->word = headers->word;
    frame->rest = headers->rest;
    return 1;
}

// Count the packets in flight as lost if nothing has arrived for a while.
INLINE void count_losses(struct load *load, u64 arrived, long long in_flight)
{
    u64 now = bpf_ktime_get_ns();

    if (arrived != load->seen) {
        load->seen = arrived;
        load->seen_at = now;
    } else if (now - load->seen_at > TIMEOUT) {
        load->lost += in_flight;
        load->seen_at = now;
    }
}

// Read `arrived` once for many packets: each read slows down the CPU that writes the counter.
INLINE int may_send(struct load *load, const u64 *arrived_so_far)
{
    u64 arrived = *(volatile const u64 *)arrived_so_far;
    long long in_flight = load->sent - load->lost - arrived;

    if (load->credit)
        return 1;
    if (in_flight < 0) {
        // Lost packets have arrived late.
        load->lost += in_flight;
        in_flight = 0;
    }
    if (in_flight >= load->window - load->window / 4) {
        count_losses(load, arrived, in_flight);
        load->waited++;
        return 0;
    }
    load->credit = load->window - in_flight;
    return 1;
}

SECTION("xdp") int sender(struct xdp_md *context)
{
    const u32 zero = 0;
    struct load *load = bpf_map_lookup_elem(&loads, &zero);
    u64 *arrived_so_far = bpf_map_lookup_elem(&arrived, &zero);
    struct headers *headers;

    if (!load || !arrived_so_far)
        return XDP_ABORTED;
    if (!load->credit && !may_send(load, arrived_so_far))
        return XDP_DROP;
    headers = bpf_map_lookup_elem(&flows, &load->next);
    if (!headers || !write_headers(context, headers))
        return XDP_ABORTED;
    load->next = load->next + 1 < load->flows ? load->next + 1 : 0;
    load->credit--;
    load->sent++;
    return (int)bpf_redirect(load->ifindex, 0);
}
