#define _GNU_SOURCE
#include "lanes.h"

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
#define SLICE 128               /* sockets looked at in one go, so that sending is not kept waiting by a thousand of them */
#define MOST_READS 8            /* of one socket in one go */
#define STEPS 32                /* of the histogram for each power of two: it is exact to 3 % */

/* At the beginning of each payload. One machine, so neither byte order nor clocks matter. */
struct stamp {
	uint32_t run;                   /* what is left over from an earlier run is not counted */
	uint32_t lane;
	uint64_t number;
	uint64_t sent_ns;
};

/* Messages that leave, or arrive, in one system call. */
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
struct lane *lanes;
size_t lane_count;
struct tally tally;

static struct flow *flows;
static size_t flow_count, next_sink;
static uint32_t run;
static struct batch out, in, back;
static uint64_t delays[64 * STEPS], longest_delay;

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

/* What a server sends as a train is to arrive as one, as it would leave for a network card that takes trains apart. */
static void accept_trains(int descriptor)
{
	int on = 1;

	setsockopt(descriptor, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
}

void open_lanes(struct flow *opened, size_t count)
{
	flows = opened;
	flow_count = count;
	lane_count = plan.direction == BOTH ? 2 * count : count;
	lanes = calloc(lane_count, sizeof(*lanes));
	if (lanes == NULL)
		abort();
	for (size_t i = 0; i < lane_count; i++) {
		lanes[i].flow = i % count;
		lanes[i].up = (plan.direction & UP) != 0 && i < count;
	}
	for (size_t i = 0; i < count; i++)
		accept_trains(flows[i].client);
	accept_trains(plan.peer);
	prepare(&out);
	prepare(&in);
	prepare(&back);
	run = (uint32_t)clock_ns();
}

/* ---- sending ---- */

/* Send all of a batch. A message that the kernel refuses is lost, as it would be anywhere else on its way. */
static void send_all(struct batch *batch)
{
	unsigned done = 0;

	while (done < batch->count) {
		int sent = sendmmsg(batch->descriptor, batch->messages + done, batch->count - done, MSG_DONTWAIT);

		tally.refused += sent <= 0;
		done += sent > 0 ? (unsigned)sent : 1;
	}
	batch->count = 0;
}

static size_t frame_size(const struct flow *flow, int up)
{
	return plan.size + (up && flow->channel ? CHANNEL_HEADER : 0);
}

/* Time is stamped at the last moment: what waits in a batch of ours is no delay of the server's. */
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

/* Queue one message in a lane. */
void put(struct lane *lane, uint64_t now)
{
	struct flow *flow = &flows[lane->flow];
	int descriptor = lane->up ? flow->client : plan.peer;
	size_t frame = frame_size(flow, lane->up);
	char *data;

	if (out.count == BATCH || (out.count && out.descriptor != descriptor))
		flush();
	data = place_in(&out, descriptor, lane->up ? NULL : &flow->relayed, frame * plan.segments,
			plan.segments > 1 ? frame : 0);
	for (uint64_t i = 0; i < plan.segments; i++, data += frame) {
		struct stamp stamp = {run, (uint32_t)(lane - lanes), lane->sent++, 0};

		if (frame != plan.size) {
			uint16_t header[2] = {htons((uint16_t)flow->channel), htons((uint16_t)plan.size)};
			memcpy(data, header, sizeof(header));
		}
		memcpy(data + frame - plan.size, &stamp, sizeof(stamp));
	}
	tally.sent += plan.segments;
	lane->active_ns = now;
}

/* Have the peer answer with the same payload. */
static void send_back(const struct flow *flow, const char *payload, size_t length)
{
	if (back.count == BATCH)
		send_all(&back);
	memcpy(place_in(&back, plan.peer, &flow->relayed, length, 0), payload, length);
}

/* ---- receiving ---- */

static void note_delay(uint64_t ns)
{
	unsigned power = 63 - (unsigned)__builtin_clzll(ns | STEPS);
	unsigned shift = power - 5;

	delays[shift * STEPS + (ns >> shift)]++;
	if (ns > longest_delay)
		longest_delay = ns;
	tally.usual_delay_ns = tally.usual_delay_ns ? (63 * tally.usual_delay_ns + ns) / 64 : ns;
}

static void arrive(struct lane *lane, const struct stamp *stamp, uint64_t now)
{
	tally.arrived++;
	tally.last_ns = now;
	lane->active_ns = now;
	if (stamp->number >= lane->seen)
		lane->seen = stamp->number + 1;
	note_delay(now > stamp->sent_ns ? now - stamp->sent_ns : 1);
}

static void take_packet(const char *payload, size_t length, int at_peer, uint64_t now)
{
	struct stamp stamp;
	struct lane *lane;

	if (length != plan.size)
		return;
	memcpy(&stamp, payload, sizeof(stamp));
	if (stamp.run != run || stamp.lane >= lane_count)
		return;
	lane = &lanes[stamp.lane];
	tally.relayed++;
	if (at_peer && plan.direction == ECHO)
		send_back(&flows[lane->flow], payload, length);
	else if (at_peer == lane->up || plan.direction == ECHO)
		arrive(lane, &stamp, now);
}

/* Take apart what arrived as a train; a packet that arrived alone is a train of one. */
static void take_message(struct msghdr *header, size_t length, size_t skipped, int at_peer, uint64_t now)
{
	struct cmsghdr *control = CMSG_FIRSTHDR(header);
	const char *data = header->msg_iov->iov_base;
	size_t segment = length;

	if (control && control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO)
		segment = (size_t) * (int *)(void *)CMSG_DATA(control);
	for (size_t at = 0; at < length; at += segment) {
		size_t here = length - at < segment ? length - at : segment;

		if (here > skipped)
			take_packet(data + at + skipped, here - skipped, at_peer, now);
	}
}

/* Read from one socket; say how many messages there were. */
static unsigned read_some(int descriptor, size_t skipped, int at_peer)
{
	uint64_t now;
	int count;

	count = recvmmsg(descriptor, in.messages, BATCH, MSG_DONTWAIT, NULL);
	if (count <= 0)
		return 0;
	now = clock_ns();
	for (int i = 0; i < count; i++) {
		take_message(&in.messages[i].msg_hdr, in.messages[i].msg_len, skipped, at_peer, now);
		in.messages[i].msg_hdr.msg_controllen = sizeof(in.control[i]);
	}
	send_all(&back);
	return (unsigned)count;
}

/* A socket that is full again and again must not keep the others waiting. */
static uint64_t read_out(int descriptor, size_t skipped, int at_peer)
{
	uint64_t taken = 0;

	for (unsigned reads = 0; reads < MOST_READS; reads++) {
		unsigned count = read_some(descriptor, skipped, at_peer);

		taken += count;
		if (count < BATCH)
			break;
	}
	return taken;
}

/* Read what has arrived; of the clients, those whose turn it is. Say how many messages there were. */
uint64_t take(void)
{
	uint64_t taken = plan.direction & UP ? read_out(plan.peer, 0, 1) : 0;
	size_t looked_at = flow_count < SLICE ? flow_count : SLICE;

	for (; plan.direction != UP && looked_at > 0; looked_at--) {
		const struct flow *flow = &flows[next_sink];

		taken += read_out(flow->client, flow->channel ? CHANNEL_HEADER : 0, 0);
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
	return (double)longest_delay / 1000;
}

double longest_delay_us(void)
{
	return (double)longest_delay / 1000;
}
