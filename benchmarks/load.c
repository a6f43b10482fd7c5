/*
 * The load: flows through a server, on sockets that were opened, and allocated with, by who starts this program.
 *
 * It never waits in a system call. A server would pay for waking it up, though in earnest it sends to a network card, which
 * needs no waking; and what arrives is seen at once, so that delays are exact. It takes a CPU of its own for that.
 *
 * Standard input has a line for each flow: the descriptor of the client's socket, which is connected to the server; the
 * channel, 0 for payloads without a header; host and port of the relayed address, or wherever else the peer is to send to.
 * All peers are one socket, since it makes no difference to a server who they are: each flow has its own relayed address.
 *
 * How packets are sent:
 *   --window N  each lane (one direction of a flow) has N packets under way at any time: as fast as the server takes them,
 *               and hardly any are lost, so that what the server spends is spent on packets that arrive.
 *   --rate N    N packets a second over all lanes, with gaps as between independent senders (exponential; the same ones in
 *               each run), whether the server keeps up or not.
 *   --once      one message in each lane, as fast as can be.
 *
 * The result is a line of JSON on standard output.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <getopt.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "lanes.h"

#define GAPS 4096
#define MOST_DUE 256                    /* messages in one go; between two, what has arrived is read */
#define LATE_NS 1000000u
#define LONGEST_DRAIN_NS 10000000000u
#define FIRST_PATIENCE_NS 50000000u
#define LEAST_PATIENCE_NS 5000000u

static uint64_t window, rate, duration_ns, quiet_ns = 100000000u;
static int once, yields;

static uint64_t began_ns, ended_ns, running_ns, in_time, late, stalls, idle_ns;
static size_t next_lane;

/* ---- as fast as the server takes them ---- */

/*
 * What was lost must not hold its place in the window for ever. Packets of a lane stay in order, so one that arrives tells
 * of all before it; if none does for several round trips, all that are under way are given up.
 */
static uint64_t under_way(struct lane *lane, uint64_t now)
{
	uint64_t known = lane->seen > lane->given_up ? lane->seen : lane->given_up;
	uint64_t patience = tally.usual_delay_ns ? 4 * tally.usual_delay_ns + LEAST_PATIENCE_NS : FIRST_PATIENCE_NS;

	if (lane->sent > known && now > lane->active_ns + patience) {
		lane->given_up = known = lane->sent;
		stalls++;
	}
	return lane->sent - known;
}

static void top_up(uint64_t now)
{
	for (size_t i = 0; i < lane_count; i++) {
		uint64_t after = under_way(&lanes[i], now) + plan.segments;

		for (; after <= window; after += plan.segments)
			put(&lanes[i], now);
	}
	flush();
}

/* ---- at a rate ---- */

/* Exponential gaps with a mean of exactly one: what independent senders give together. */
static const double *exponential_gaps(void)
{
	static double gaps[GAPS];
	double sum = 0;
	uint64_t state = 0x9e3779b97f4a7c15u;

	for (size_t i = 0; i < GAPS; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		gaps[i] = -log(((double)(state >> 11) + 1) / 9007199254740993.0);
		sum += gaps[i];
	}
	for (size_t i = 0; i < GAPS; i++)
		gaps[i] *= GAPS / sum;
	return gaps;
}

/* Say how many messages are due. After a pause that was forced upon us they are sent all the same, and counted as late. */
static uint64_t due_by(uint64_t now)
{
	static const double *gaps;
	static double next_ns;
	static size_t gap;
	double mean = 1e9 * (double)plan.segments / (double)rate;
	uint64_t due = 0;

	if (gaps == NULL)
		gaps = exponential_gaps();
	for (; next_ns <= (double)(now - began_ns) && due < MOST_DUE; due++) {
		late += (double)(now - began_ns) - next_ns > LATE_NS;
		next_ns += gaps[gap++ % GAPS] * mean;
	}
	return due;
}

/* Put messages into the lanes in turn; several in a row only if there are more than lanes, as in an overload. */
static void put_in_turn(uint64_t messages, uint64_t now)
{
	uint64_t in_a_row = (messages + lane_count - 1) / lane_count;

	while (messages > 0) {
		for (uint64_t i = 0; i < in_a_row && messages > 0; i++, messages--)
			put(&lanes[next_lane], now);
		next_lane = (next_lane + 1) % lane_count;
	}
	flush();
}

/* ---- the run ---- */

static void send_what_may_be_sent(uint64_t now)
{
	if (window)
		top_up(now);
	else if (rate)
		put_in_turn(due_by(now), now);
}

static void send_and_take(void)
{
	uint64_t now = began_ns;

	while (now < began_ns + duration_ns) {
		uint64_t sent_before = tally.sent, before = now;
		uint64_t taken = take();

		send_what_may_be_sent(now);
		now = clock_ns();
		if (taken == 0 && tally.sent == sent_before) {
			idle_ns += now - before;
			if (yields)
				sched_yield();
		}
	}
}

/* What is still under way counts too, until nothing more comes for a while. */
static void drain(void)
{
	uint64_t now = clock_ns(), quiet_since = now, end = now + LONGEST_DRAIN_NS;

	while (tally.arrived < tally.sent && now < quiet_since + quiet_ns && now < end) {
		if (take() > 0)
			quiet_since = now;
		else if (yields)
			sched_yield();
		now = clock_ns();
	}
}

static uint64_t own_cpu_ns(void)
{
	struct timespec used;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
	return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

static void run_load(void)
{
	uint64_t ran_before = own_cpu_ns();

	began_ns = clock_ns();
	if (once)
		put_in_turn(lane_count, began_ns);
	else
		send_and_take();
	ended_ns = clock_ns();
	running_ns = own_cpu_ns() - ran_before;
	in_time = tally.arrived;
	drain();
}

static void print_result(void)
{
	printf("{\"sent\": %lu, \"arrived\": %lu, \"in_time\": %lu, \"relayed\": %lu, \"refused\": %lu, \"late\": %lu, "
	       "\"stalls\": %lu, \"seconds\": %.6f, \"idle\": %.4f, \"running\": %.4f, \"last_ms\": %.3f, "
	       "\"p50\": %.2f, \"p99\": %.2f, \"p999\": %.2f, \"longest\": %.2f}\n",
	       tally.sent, tally.arrived, in_time, tally.relayed, tally.refused, late, stalls,
	       (double)(ended_ns - began_ns) / 1e9, (double)idle_ns / (double)(ended_ns - began_ns),
	       (double)running_ns / (double)(ended_ns - began_ns),
	       tally.last_ns ? (double)(tally.last_ns - began_ns) / 1e6 : 0.0,
	       delay_us(0.5), delay_us(0.99), delay_us(0.999), longest_delay_us());
}

/* ---- what to do ---- */

static void fail(const char *what)
{
	fprintf(stderr, "load: %s\n", what);
	exit(2);
}

static struct flow *read_flows(size_t *count)
{
	size_t room = 32;
	struct flow *flows = malloc(room * sizeof(*flows)), flow = {.relayed = {.sin_family = AF_INET}};
	char host[64];
	uint16_t port;

	for (*count = 0; flows && scanf("%d %u %63s %hu", &flow.client, &flow.channel, host, &port) == 4; (*count)++) {
		if (inet_pton(AF_INET, host, &flow.relayed.sin_addr) != 1)
			fail("a flow has no IPv4 address");
		flow.relayed.sin_port = htons(port);
		if (*count == room)
			flows = realloc(flows, (room *= 2) * sizeof(*flows));
		if (flows)
			flows[*count] = flow;
	}
	if (!flows || *count == 0)
		fail("no flows on standard input");
	return flows;
}

static enum direction direction_of(const char *name)
{
	static const struct {
		const char *name;
		enum direction direction;
	} known[] = {{"up", UP}, {"down", DOWN}, {"both", BOTH}, {"echo", ECHO}};

	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (strcmp(name, known[i].name) == 0)
			return known[i].direction;
	fail("--direction is up, down, both or echo");
	return UP;
}

static void set(int option, const char *value)
{
	uint64_t number = strtoull(value ? value : "0", NULL, 10);

	switch (option) {
	case 'd': plan.direction = direction_of(value); break;
	case 'l': plan.size = number; break;
	case 'g': plan.segments = number; break;
	case 'p': plan.peer = (int)number; break;
	case 'w': window = number; break;
	case 'r': rate = number; break;
	case 's': duration_ns = number * 1000000u; break;
	case 'q': quiet_ns = number * 1000000u; break;
	case 'o': once = 1; break;
	case 'y': yields = 1; break;
	default: exit(2);
	}
}

int main(int count, char **arguments)
{
	static const struct option options[] = {
		{"direction", 1, NULL, 'd'}, {"size", 1, NULL, 'l'}, {"segments", 1, NULL, 'g'}, {"peer", 1, NULL, 'p'},
		{"window", 1, NULL, 'w'}, {"rate", 1, NULL, 'r'}, {"milliseconds", 1, NULL, 's'}, {"quiet", 1, NULL, 'q'},
		{"once", 0, NULL, 'o'}, {"yield", 0, NULL, 'y'}, {NULL, 0, NULL, 0},
	};
	struct flow *flows;
	size_t flow_count;

	/* Nothing is left running if who started this dies. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	plan = (struct plan){UP, 172, 1, -1};
	for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;)
		set(option, optarg);
	if (plan.peer < 0 || !(window || rate || once) || !plan.segments || plan.size < LEAST_PAYLOAD ||
	    plan.segments * (plan.size + CHANNEL_HEADER) > LONGEST_DATAGRAM)
		fail("--peer, one of --window, --rate and --once, and messages that fit a datagram are needed");
	flows = read_flows(&flow_count);
	open_lanes(flows, flow_count);
	run_load();
	print_result();
	return 0;
}
