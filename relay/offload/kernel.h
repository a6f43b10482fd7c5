// What the kernel gives an XDP program, as far as this one uses it: so that it is built without anybody's headers.
//
// The same program is also built by an ordinary compiler, for tests: then what the kernel would do is done by whoever links
// it, and a pointer has its full width.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long uptr;

#define INLINE static inline __attribute__((always_inline))
#define SECTION(name) __attribute__((section(name), used))

// What becomes of a packet. Dropping it (1) is not among what this program does; ABORTED can't be reached.
enum { XDP_ABORTED = 0, XDP_PASS = 2, XDP_TX = 3 };

enum map_type { ARRAY = 2, PERCPU_ARRAY = 6 };
enum { MMAPABLE = 1 << 10 };

// A table that the kernel keeps, and that the relay reads and writes. The loader takes max_entries for the least there are.
struct map {
    u32 type, key_size, value_size, max_entries, flags;
};

#ifdef __bpf__

// What packets have in them begins anywhere; to the machines that this runs on it makes no difference. Told so, the compiler
// reads whole words: a third fewer instructions.
#define IN_PACKET(alignment) __attribute__((packed, aligned(alignment)))

// A loop whose first round is its last, most often, is best left one.
#define ROLLED _Pragma("clang loop unroll(disable)")
#define UNROLLED _Pragma("clang loop unroll(full)")

struct xdp_md {
    u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*bpf_xdp_adjust_head)(struct xdp_md *context, int delta) = (void *)44;
static u64 (*bpf_jiffies64)(void) = (void *)118;

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
u64 bpf_jiffies64(void);

#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

#define BE16(value) ((u16)__builtin_bswap16(value))
#define BE32(value) ((u32)__builtin_bswap32(value))

// Keeps the compiler from moving reads of memory across it.
#define IN_ORDER() __asm__ volatile("" ::: "memory")

// Keeps the compiler from comparing something else than this number: the kernel, which reads the instructions, only learns
// the bounds of what is compared.
#define COMPARED(number) __asm__ volatile("" : "+r"(number))
