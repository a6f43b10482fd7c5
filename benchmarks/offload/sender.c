// Sends packets of many flows from where it is run as a test with live frames, one flow after another, and no more of them at
// once than a relay is to have on its hands.

#include "load.h"

// A frame was used before, and has the headers that the relay wrote: so all of them are written each time.
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

// Nothing arrived for a while: what is under way was lost.
INLINE void look_for_losses(struct load *load, u64 arrived, long long under_way)
{
    u64 now = bpf_ktime_get_ns();

    if (arrived != load->seen) {
        load->seen = arrived;
        load->seen_at = now;
    } else if (now - load->seen_at > PATIENCE) {
        load->lost += under_way;
        load->seen_at = now;
    }
}

// Whoever looks at a counter that another CPU writes slows it down: so it is looked at once for many packets.
INLINE int may_send(struct load *load, const u64 *arrived_so_far)
{
    u64 arrived = *(volatile const u64 *)arrived_so_far;
    long long under_way = load->sent - load->lost - arrived;

    if (load->credit)
        return 1;
    if (under_way < 0) {
        // What was given up has come after all.
        load->lost += under_way;
        under_way = 0;
    }
    if (under_way >= load->window - load->window / 4) {
        look_for_losses(load, arrived, under_way);
        load->waited++;
        return 0;
    }
    load->credit = load->window - under_way;
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
