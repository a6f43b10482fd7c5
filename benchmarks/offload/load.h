// Maps and constants of sender.c, sink.c, frames.py and live.py.

#pragma once

#include "kernel.h"

enum { XDP_DROP = 1 };

enum {
    HEADERS = 46,         // Ethernet, IPv4, UDP and ChannelData: the most that a relay changes
    TIMEOUT = 20000000,  // nanoseconds
};

struct headers {  // as integers, or the compiler copies single bytes
    u64 words[5];
    u32 word;
    u16 rest, unused;
};

struct load {
    u32 ifindex, flows;
    u32 window;  // most packets in flight
    u32 next;    // flow
    u32 length;  // of a frame at the far end
    u32 credit;  // packets to send before the next read of `arrived`
    u64 sent, lost, waited;
    u64 seen, seen_at;  // last change of `arrived`, and its time
};

enum { MMAPABLE = 1 << 10 };
SECTION("maps") struct map loads = {ARRAY, sizeof(u32), sizeof(struct load), 1, MMAPABLE};
SECTION("maps") struct map flows = {ARRAY, sizeof(u32), sizeof(struct headers), 1, MMAPABLE};
SECTION("maps") struct map arrived = {ARRAY, sizeof(u32), sizeof(u64), 1, MMAPABLE};

SECTION("license") char terms[] = "Dual MIT/GPL";

static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
