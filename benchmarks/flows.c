#define _GNU_SOURCE
#include "flows.h"

#include <errno.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define BATCH 32                /* messages in one system call */
#define LONGEST 65536
#define SLICE 128               /* sockets read in one go: a thousand would delay sending */
#define MOST_READS 8            /* of one socket in one go */
#define STEPS 32                /* of the histogram for each power of two: it is exact to 3 % */

/* Start of each payload, in host byte order: sender and receiver are one process. */
struct stamp {
	uint32_t run;                   /* excludes packets of an earlier run */
	uint32_t flow;
	uint64_t number;
	uint64_t sent_ns;
};

/* Messages of one system call. */
struct batch {
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control[BATCH];
	char *data[BATCH];
	unsigned count;
	int descriptor;
};

struct plan plan;
struct flow *flows;
size_t flow_count;
struct tally tally;

static size_t next_sink;
static uint32_t run;
static struct batch out, in;
static uint64_t delays[64 * STEPS];

uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void prepare(struct batch *batch)
{
	for (unsigned i = 0; i < BATCH; i++) {
		struct msghdr *header = &batch->messages[i].msg_hdr;

		batch->data[i] = calloc(1, LONGEST);
		if (batch->data[i] == NULL)
			abort();
		batch->parts[i].iov_base = batch->data[i];
		batch->parts[i].iov_len = LONGEST;
		header->msg_iov = &batch->parts[i];
		header->msg_iovlen = 1;
		header->msg_control = &batch->control[i];
		header->msg_controllen = sizeof(batch->control[i]);
	}
	batch->descriptor = -1;
}

/* A GSO batch of a server arrives as a batch, as with a network card that does the segmentation. */
static void accept_batches(int descriptor)
{
	int on = 1;

	setsockopt(descriptor, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
}

void open_flows(struct flow *opened, size_t count)
{
	flows = opened;
	flow_count = count;
	for (size_t i = 0; i < count; i++)
		accept_batches(flows[i].client);
	accept_batches(plan.peer);
	prepare(&out);
	prepare(&in);
	run = (uint32_t)clock_ns();
}

/* ---- sending ---- */

/* Send all of a batch. A message that the kernel rejects counts as lost. */
static void send_all(struct batch *batch)
{
	unsigned done = 0;

	while (done < batch->count) {
		int sent = sendmmsg(batch->descriptor, batch->messages + done, batch->count - done, MSG_DONTWAIT);

		done += sent > 0 ? (unsigned)sent : 1;
	}
	batch->count = 0;
}

static size_t frame_size(const struct flow *flow)
{
	return plan.size + (plan.direction == UP && flow->channel ? CHANNEL_HEADER : 0);
}

/* Set the time stamps at the last moment: the delay must not include waiting in our own batch. */
void flush(void)
{
	uint64_t now = clock_ns();

	for (unsigned i = 0; i < out.count; i++) {
		struct iovec *part = &out.parts[i];
		size_t frame = part->iov_len / plan.segments;

		for (size_t at = frame - plan.size; at < part->iov_len; at += frame)
			memcpy(out.data[i] + at + offsetof(struct stamp, sent_ns), &now, sizeof(now));
	}
	send_all(&out);
}

static void *place_in(struct batch *batch, int descriptor, const struct sockaddr_in *to, size_t length, size_t segment)
{
	struct msghdr *header = &batch->messages[batch->count].msg_hdr;
	struct cmsghdr *control = &batch->control[batch->count].header;

	batch->descriptor = descriptor;
	batch->parts[batch->count].iov_len = length;
	header->msg_name = (void *)to;
	header->msg_namelen = to ? sizeof(*to) : 0;
	header->msg_control = segment ? control : NULL;
	header->msg_controllen = segment ? CMSG_SPACE(sizeof(uint16_t)) : 0;
	if (segment) {
		control->cmsg_level = IPPROTO_UDP;
		control->cmsg_type = UDP_SEGMENT;
		control->cmsg_len = CMSG_LEN(sizeof(uint16_t));
		*(uint16_t *)(void *)CMSG_DATA(control) = (uint16_t)segment;
	}
	return batch->data[batch->count++];
}

/* Queue one message of a flow. */
void put(struct flow *flow, uint64_t now)
{
	int up = plan.direction == UP, descriptor = up ? flow->client : plan.peer;
	size_t frame = frame_size(flow);
	char *data;

	if (out.count == BATCH || (out.count && out.descriptor != descriptor))
		flush();
	data = place_in(&out, descriptor, up ? NULL : &flow->relayed, frame * plan.segments,
			plan.segments > 1 ? frame : 0);
	for (uint64_t i = 0; i < plan.segments; i++, data += frame) {
		struct stamp stamp = {run, (uint32_t)(flow - flows), flow->sent++, 0};

		if (frame != plan.size) {
			uint16_t header[2] = {htons((uint16_t)flow->channel), htons((uint16_t)plan.size)};
			memcpy(data, header, sizeof(header));
		}
		memcpy(data + frame - plan.size, &stamp, sizeof(stamp));
	}
	tally.sent += plan.segments;
	flow->active_ns = now;
}

/* ---- receiving ---- */

static void note_delay(uint64_t ns)
{
	unsigned power = 63 - (unsigned)__builtin_clzll(ns | STEPS);
	unsigned shift = power - 5;

	delays[shift * STEPS + (ns >> shift)]++;
	tally.usual_delay_ns = tally.usual_delay_ns ? (63 * tally.usual_delay_ns + ns) / 64 : ns;
}

static void take_packet(const char *payload, size_t length, uint64_t now)
{
	struct stamp stamp;
	struct flow *flow;

	if (length != plan.size)
		return;
	memcpy(&stamp, payload, sizeof(stamp));
	if (stamp.run != run || stamp.flow >= flow_count)
		return;
	flow = &flows[stamp.flow];
	tally.arrived++;
	tally.last_ns = now;
	flow->active_ns = now;
	if (stamp.number >= flow->seen)
		flow->seen = stamp.number + 1;
	note_delay(now > stamp.sent_ns ? now - stamp.sent_ns : 1);
}

/* Split a received batch into packets. */
static void take_message(struct msghdr *header, size_t length, size_t skipped, uint64_t now)
{
	struct cmsghdr *control = CMSG_FIRSTHDR(header);
	const char *data = header->msg_iov->iov_base;
	size_t segment = length;

	if (control && control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO)
		segment = (size_t) * (int *)(void *)CMSG_DATA(control);
	for (size_t at = 0; at < length; at += segment) {
		size_t here = length - at < segment ? length - at : segment;

		if (here > skipped)
			take_packet(data + at + skipped, here - skipped, now);
	}
}

/* Read from one socket, and return the number of messages. */
static unsigned read_some(int descriptor, size_t skipped)
{
	uint64_t now;
	int count;

	count = recvmmsg(descriptor, in.messages, BATCH, MSG_DONTWAIT, NULL);
	if (count <= 0)
		return 0;
	now = clock_ns();
	for (int i = 0; i < count; i++) {
		take_message(&in.messages[i].msg_hdr, in.messages[i].msg_len, skipped, now);
		in.messages[i].msg_hdr.msg_controllen = sizeof(in.control[i]);
	}
	return (unsigned)count;
}

/* Read until a socket is empty, or other sockets have waited long enough. */
static uint64_t read_out(int descriptor, size_t skipped)
{
	uint64_t taken = 0;

	for (unsigned reads = 0; reads < MOST_READS; reads++) {
		unsigned count = read_some(descriptor, skipped);

		taken += count;
		if (count < BATCH)
			break;
	}
	return taken;
}

/* Read the peer's socket, or the next SLICE sockets of clients, and return the number of messages. */
uint64_t take(void)
{
	size_t sockets = flow_count < SLICE ? flow_count : SLICE;
	uint64_t taken = 0;

	if (plan.direction == UP)
		return read_out(plan.peer, 0);
	for (; sockets > 0; sockets--) {
		const struct flow *flow = &flows[next_sink];

		taken += read_out(flow->client, flow->channel ? CHANNEL_HEADER : 0);
		next_sink = (next_sink + 1) % flow_count;
	}
	return taken;
}

/* ---- delays ---- */

double delay_us(double quantile)
{
	uint64_t below = 0, wanted = (uint64_t)((double)tally.arrived * quantile);

	for (unsigned i = 0; i < sizeof(delays) / sizeof(*delays); i++) {
		below += delays[i];
		if (below > wanted) {
			unsigned shift = i < STEPS ? 0 : i / STEPS - 1;
			return (double)((uint64_t)(i - shift * STEPS) << shift) / 1000;
		}
	}
	return 0;
}
