// Count and drop the packets of the load.

#include "load.h"

SECTION("xdp") int sink(struct xdp_md *context)
{
    const u32 zero = 0;
    struct load *load = bpf_map_lookup_elem(&loads, &zero);
    u64 *arrived_so_far = bpf_map_lookup_elem(&arrived, &zero);

    if (!load || !arrived_so_far || context->data_end - context->data != load->length)
        return XDP_PASS;
    // The interface has one queue, so one CPU at a time runs this.
    ++*arrived_so_far;
    return XDP_DROP;
}
