// The XDP program as an ordinary one, for tests: an ordinary compiler's sanitizers watch it, and nobody needs privileges.
//
// What the kernel would do, this file does: tables, clock, packets. Each packet, each value of a table lies in memory of its
// own and of exactly its size, so that AddressSanitizer sees every byte too far; and when the start of a packet moves, the
// packet moves to other memory, so that it sees pointers that were kept. Whatever the kernel's verifier would refuse, or
// would be a surprise at run time, ends the process.
//
// It reads commands from standard input and answers on standard output; runners.py has the other end.

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "program.c"

// Packets begin anywhere, and here a sanitizer looks at where what is read begins.
_Static_assert(_Alignof(struct ethernet) == 1 && _Alignof(struct vlan_tag) == 1, "Ethernet");
_Static_assert(_Alignof(struct ipv4) == 1 && _Alignof(struct ipv6) == 1, "IP");
_Static_assert(_Alignof(struct udp) == 1 && _Alignof(struct channel_data) == 1 && sizeof(struct channel_data) == 4, "UDP");

enum { INDEXED = 64, FILL = 0xa5 };  // entries; what memory holds that nobody has written

static void refuse(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("host.c: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

// ------------------------------------------------------------------------------------------------------------- memory

static void *copy_of(const void *bytes, size_t size)
{
    // At least a byte: for none, malloc may give what is nobody's.
    void *copy = malloc(size ? size : 1);

    if (!copy)
        refuse("no memory");
    if (bytes)
        memcpy(copy, bytes, size);
    else
        memset(copy, 0, size);
    return copy;
}

// ------------------------------------------------------------------------------------------------------------- tables

struct table {
    struct map *map;
    int is_programs;      // the program may write to it
    u32 count;
    u8 *keys[INDEXED];    // of a hash map
    u8 *values[INDEXED];  // by index, or in the order of keys
    u8 *before[INDEXED];  // what they were before the packet
};

static struct table tables[] = {
    {.map = &clients}, {.map = &peers}, {.map = &next_hops}, {.map = &ways},
    {.map = &usage, .is_programs = 1}, {.map = &settings}, {.map = &totals, .is_programs = 1},
};
enum { TABLES = sizeof(tables) / sizeof(tables[0]) };

static u32 entries(const struct table *table)
{
    if (table->map->type == HASH)
        return 0;
    return table->map == &settings || table->map == &totals ? 1 : INDEXED;
}

static void empty(struct table *table)
{
    for (u32 i = 0; i < table->count; i++) {
        free(table->keys[i]);
        free(table->values[i]);
        free(table->before[i]);
        table->keys[i] = table->values[i] = table->before[i] = NULL;
    }
    for (table->count = 0; table->count < entries(table); table->count++) {
        table->values[table->count] = copy_of(NULL, table->map->value_size);
        table->before[table->count] = copy_of(NULL, table->map->value_size);
    }
}

static struct table *table_of(const void *map)
{
    for (u32 i = 0; i < TABLES; i++)
        if (tables[i].map == map)
            return &tables[i];
    refuse("no such map");
    return NULL;
}

static void *find_in(struct table *table, const void *key)
{
    u32 index;

    if (table->map->type == HASH) {
        for (index = 0; index < table->count; index++)
            if (!memcmp(table->keys[index], key, table->map->key_size))
                return table->values[index];
        return NULL;
    }
    memcpy(&index, key, sizeof(index));
    return index < table->count ? table->values[index] : NULL;
}

static void store(struct table *table, const u8 *key, const u8 *value)
{
    void *there = find_in(table, key);

    if (!there && table->map->type == HASH && table->count < INDEXED) {
        table->keys[table->count] = copy_of(key, table->map->key_size);
        table->before[table->count] = copy_of(NULL, table->map->value_size);
        there = table->values[table->count++] = copy_of(NULL, table->map->value_size);
    }
    if (!there)
        refuse("no place for this key");
    memcpy(there, value, table->map->value_size);
}

static void remember(struct table *table)
{
    for (u32 i = 0; i < table->count; i++)
        memcpy(table->before[i], table->values[i], table->map->value_size);
}

static void compare(struct table *table)
{
    size_t size = table->map == &next_hops ? offsetof(struct next_hop, nudged) : table->map->value_size;

    if (table->is_programs)
        return;
    for (u32 i = 0; i < table->count; i++)
        if (memcmp(table->before[i], table->values[i], size))
            refuse("the program has written to the relay's table %d", (int)(table - tables));
}

// ------------------------------------------------------------------------------------------------ the kernel's functions

static struct {
    struct xdp_md context;
    u8 *memory;
    int headroom, times_moved, times_redirected;
    u32 redirected_to;
    u64 now;
} kernel;

void *bpf_map_lookup_elem(void *map, const void *key)
{
    return find_in(table_of(map), key);
}

long bpf_redirect(u32 ifindex, u64 flags)
{
    if (flags || kernel.times_redirected++)
        refuse("redirected with flags %llu, %d times", flags, kernel.times_redirected);
    kernel.redirected_to = ifindex;
    return 4;
}

long bpf_xdp_adjust_head(struct xdp_md *context, int delta)
{
    size_t before = context->data_end - context->data, after = before - delta;
    u8 *memory;

    if (context != &kernel.context || kernel.times_moved++)
        refuse("moved %d times", kernel.times_moved);
    // An Ethernet header is always left.
    if (-delta > kernel.headroom || delta + 14 > (int)before)
        return -22;
    memory = copy_of(NULL, after);
    memset(memory, FILL, after);
    if (delta <= 0)
        memcpy(memory - delta, kernel.memory, before);
    else
        memcpy(memory, kernel.memory + delta, after);
    free(kernel.memory);
    kernel.memory = memory;
    context->data = (uptr)memory;
    context->data_end = (uptr)memory + after;
    return 0;
}

u64 bpf_ktime_get_coarse_ns(void)
{
    return kernel.now;
}

// ------------------------------------------------------------------------------------------------------------ commands

struct command {
    u8 what, table;
    u16 unused;
    u32 length;  // of what follows
};
struct answer {
    u32 verdict, redirected_to, length;
};

static void say(const void *bytes, size_t size)
{
    if (size && fwrite(bytes, size, 1, stdout) != 1)
        refuse("nobody listens");
}

static void run(u32 ifindex, const u8 *frame, u32 length)
{
    struct answer answer;

    kernel.memory = copy_of(frame, length);
    kernel.times_moved = kernel.times_redirected = 0;
    kernel.redirected_to = 0;
    kernel.context = (struct xdp_md){(uptr)kernel.memory, (uptr)kernel.memory + length, ifindex};
    for (u32 i = 0; i < TABLES; i++)
        remember(&tables[i]);
    answer.verdict = (u32)relay(&kernel.context);
    for (u32 i = 0; i < TABLES; i++)
        compare(&tables[i]);
    if ((answer.verdict == 4) != kernel.times_redirected)
        refuse("verdict %u, redirected %d times", answer.verdict, kernel.times_redirected);
    answer.redirected_to = kernel.redirected_to;
    answer.length = (u32)(kernel.context.data_end - kernel.context.data);
    say(&answer, sizeof(answer));
    say(kernel.memory, answer.length);
    free(kernel.memory);
}

#define SIZE(type) printf(#type " %zu\n", sizeof(struct type))
#define FIELD(type, field) printf(#type "." #field " %zu\n", offsetof(struct type, field))
#define NUMBER(name) printf("= " #name " %lld\n", (long long)name)

static void tell_layout(void)
{
    SIZE(end), FIELD(end, address), FIELD(end, port), FIELD(end, tag);
    SIZE(channel), FIELD(channel, expires), FIELD(channel, check), FIELD(channel, other), FIELD(channel, slot), FIELD(channel, place);
    SIZE(next_hop), FIELD(next_hop, ifindex), FIELD(next_hop, source), FIELD(next_hop, macs.to), FIELD(next_hop, macs.from);
    FIELD(next_hop, vlan), FIELD(next_hop, mtu), FIELD(next_hop, flags), FIELD(next_hop, check), FIELD(next_hop, nudged);
    SIZE(own), FIELD(own, address), FIELD(own, vlan);
    SIZE(device), FIELD(device, ifindex), FIELD(device, mac), FIELD(device, flags), FIELD(device, upper);
    SIZE(settings), FIELD(settings, service_port), FIELD(settings, lowest_port), FIELD(settings, highest_port);
    FIELD(settings, own_count), FIELD(settings, own), FIELD(settings, device_count), FIELD(settings, devices);
    SIZE(usage), FIELD(usage, packets), FIELD(usage, bytes), FIELD(usage, last_used);
    SIZE(totals), FIELD(totals, packets), FIELD(totals, bytes), FIELD(totals, sizes), FIELD(totals, passed);
    NUMBER(OWN_ADDRESSES), NUMBER(DEVICES), NUMBER(SIZES), NUMBER(SIZE_SHIFT), NUMBER(TO_PEER), NUMBER(TO_CLIENT);
    NUMBER(DIRECTIONS), NUMBER(HAIRPIN), NUMBER(STALE), NUMBER(SEND_BACK), NUMBER(STRICT);
    NUMBER(NO_CHANNEL_DATA), NUMBER(ODD_LENGTH), NUMBER(UNBOUND), NUMBER(EXPIRED), NUMBER(NO_NEXT_HOP);
    NUMBER(STALE_NEIGHBOUR), NUMBER(TOO_LONG), NUMBER(NO_CHECKSUM), NUMBER(PARTIAL_CHECKSUM), NUMBER(SHORT_FRAME);
    NUMBER(LAST_HOP), NUMBER(NO_ROOM), NUMBER(WRONG_WAY), NUMBER(REASONS);
    putchar('\n');
}

static void obey(const struct command *command, const u8 *body)
{
    struct table *table = &tables[command->table < TABLES ? command->table : 0];
    const void *value;

    switch (command->what) {
    case 'e':
        for (u32 i = 0; i < TABLES; i++)
            empty(&tables[i]);
        break;
    case 's':
        if (command->length != table->map->key_size + table->map->value_size)
            refuse("%u bytes for table %d", command->length, command->table);
        store(table, body, body + table->map->key_size);
        break;
    case 'g':
        if (!(value = find_in(table, body)))
            refuse("nothing there");
        say(value, table->map->value_size);
        break;
    case 't':
        memcpy(&kernel.now, body, sizeof(kernel.now));
        break;
    case 'h':
        memcpy(&kernel.headroom, body, sizeof(kernel.headroom));
        break;
    case 'r':
        run(*(const u32 *)(const void *)body, body + sizeof(u32), command->length - sizeof(u32));
        break;
    case 'l':
        tell_layout();
        break;
    default:
        refuse("no such command: %d", command->what);
    }
}

int main(void)
{
    struct command command;

    for (u32 i = 0; i < TABLES; i++)
        empty(&tables[i]);
    while (fread(&command, sizeof(command), 1, stdin) == 1) {
        // Eight bytes that are read as a number, whatever was sent.
        u8 *body = copy_of(NULL, command.length + 8);
        if (command.length && fread(body, command.length, 1, stdin) != 1)
            refuse("a command that ends early");
        obey(&command, body);
        free(body);
        // What is said is read before more is asked, but for 's', 't' and such, which come in any number.
        if (strchr("grl", command.what))
            fflush(stdout);
    }
    for (u32 i = 0; i < TABLES; i++)
        for (u32 j = 0; j < tables[i].count; j++)
            free(tables[i].keys[j]), free(tables[i].values[j]), free(tables[i].before[j]);
    return 0;
}
