// The kernel's interface for XDP programs, as far as program.c uses it, so that the build needs no kernel headers.
//
// Tests also build the program with an ordinary compiler. Then the test provides the kernel's functions, and pointers have
// their full width.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long uptr;

#define INLINE static inline __attribute__((always_inline))
#define SECTION(name) __attribute__((section(name), used))

// Verdicts. This program never drops a packet (1), and ABORTED is unreachable.
enum { XDP_ABORTED = 0, XDP_PASS = 2, XDP_TX = 3 };

enum map_type { HASH = 1, ARRAY = 2, PERCPU_ARRAY = 6 };

// A table in the kernel, shared with the relay. The loader replaces a max_entries of 1 in most tables.
struct map {
    u32 type, key_size, value_size, max_entries, flags;
};

#ifdef __bpf__

// Headers in packets may be unaligned, which does not matter on the supported machines. With this attribute the compiler
// reads whole words, and needs a third fewer instructions.
#define IN_PACKET(alignment) __attribute__((packed, aligned(alignment)))

// For loops that usually end in the first iteration.
#define ROLLED _Pragma("clang loop unroll(disable)")
#define UNROLLED _Pragma("clang loop unroll(full)")

struct xdp_md {
    u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*bpf_xdp_adjust_head)(struct xdp_md *context, int delta) = (void *)44;
static u64 (*bpf_ktime_get_coarse_ns)(void) = (void *)160;

#else

#define IN_PACKET(alignment) __attribute__((packed))
#define ROLLED
#define UNROLLED

struct xdp_md {
    uptr data, data_end;
    u32 ingress_ifindex;
};

void *bpf_map_lookup_elem(void *map, const void *key);
long bpf_redirect(u32 ifindex, u64 flags);
long bpf_xdp_adjust_head(struct xdp_md *context, int delta);
u64 bpf_ktime_get_coarse_ns(void);

#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

#define BE16(value) ((u16)__builtin_bswap16(value))
#define BE32(value) ((u32)__builtin_bswap32(value))

// Keeps the compiler from moving reads of memory across it.
#define IN_ORDER() __asm__ volatile("" ::: "memory")

// Prevents the compiler from comparing a different expression: the kernel's verifier learns only the bounds of the compared
// register.
#define COMPARED(number) __asm__ volatile("" : "+r"(number))
