// What the programs that send and count share, with each other and with frames.py and live.py.

#pragma once

#include "kernel.h"

enum { XDP_DROP = 1 };

enum {
    HEADERS = 46,         // Ethernet, IPv4, UDP, and of ChannelData: all that a relay changes
    PATIENCE = 20000000,  // nanoseconds
};

struct headers {  // in numbers, or the compiler copies byte after byte
    u64 words[5];
    u32 word;
    u16 rest, unused;
};

struct load {
    u32 ifindex, flows;
    u32 window;  // packets that may be under way
    u32 next;    // flow
    u32 length;  // of a frame that arrives
    u32 credit;  // packets that may be sent before the next look at what has arrived
    u64 sent, lost, waited;
    u64 seen, seen_at;  // what had arrived when something last had, and when that was
};

SECTION("maps") struct map loads = {ARRAY, sizeof(u32), sizeof(struct load), 1, MMAPABLE};
SECTION("maps") struct map flows = {ARRAY, sizeof(u32), sizeof(struct headers), 1, MMAPABLE};
SECTION("maps") struct map arrived = {ARRAY, sizeof(u32), sizeof(u64), 1, MMAPABLE};

SECTION("license") char terms[] = "Dual MIT/GPL";

static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
