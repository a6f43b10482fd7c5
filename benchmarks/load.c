/*
 * The load generator: packets through a server, on sockets opened by the parent process.
 *
 * It never sleeps, so servers do not pay for waking it and delays are exact. It needs a CPU of its own.
 *
 * Standard input has a line for each flow: the descriptor of the client's socket, connected to the server; the channel, or 0 for
 * payloads without a header; host and port of the relayed address. All peers share one socket, because each flow has its own
 * relayed address.
 *
 * Ways to send:
 *   --window N  each flow has N packets in flight: full speed with almost no loss.
 *   --rate N    N packets a second over all flows, with exponential gaps as from independent senders (the same in each run),
 *               regardless of losses.
 *   --once 1    one message in each flow, at full speed.
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

#include "flows.h"

#define GAPS 4096
#define MOST_DUE 256                    /* most messages between two reads */
#define LATE_NS 1000000u
#define LONGEST_DRAIN_NS 10000000000u
#define FIRST_TIMEOUT_NS 50000000u
#define LEAST_TIMEOUT_NS 5000000u

static uint64_t window, rate, duration_ns, quiet_ns = 100000000u;
static int once, yields;

static uint64_t began_ns, ended_ns, running_ns, in_time, late, idle_ns;
static size_t next_flow;

/* ---- full speed ---- */

/*
 * Return the packets in flight. Packets of a flow stay in order, so an arrival accounts for all earlier packets. If none arrives
 * for several round trips, all packets in flight count as lost, and free the window.
 */
static uint64_t in_flight(struct flow *flow, uint64_t now)
{
	uint64_t known = flow->seen > flow->given_up ? flow->seen : flow->given_up;
	uint64_t timeout = tally.usual_delay_ns ? 4 * tally.usual_delay_ns + LEAST_TIMEOUT_NS : FIRST_TIMEOUT_NS;

	if (flow->sent > known && now > flow->active_ns + timeout)
		flow->given_up = known = flow->sent;
	return flow->sent - known;
}

static void top_up(uint64_t now)
{
	for (size_t i = 0; i < flow_count; i++) {
		uint64_t after = in_flight(&flows[i], now) + plan.segments;

		for (; after <= window; after += plan.segments)
			put(&flows[i], now);
	}
	flush();
}

/* ---- at a rate ---- */

/* Return exponential gaps with a mean of exactly one, as between the packets of independent senders. */
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

/* Return the number of due messages. After a forced pause all are sent, and counted as late. */
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

/* Spread messages over the flows in turn; several in a row only if there are more messages than flows, as in an overload. */
static void put_in_turn(uint64_t messages, uint64_t now)
{
	uint64_t in_a_row = (messages + flow_count - 1) / flow_count;

	while (messages > 0) {
		for (uint64_t i = 0; i < in_a_row && messages > 0; i++, messages--)
			put(&flows[next_flow], now);
		next_flow = (next_flow + 1) % flow_count;
	}
	flush();
}

/* ---- the run ---- */

static void send_due(uint64_t now)
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

		send_due(now);
		now = clock_ns();
		if (taken == 0 && tally.sent == sent_before) {
			idle_ns += now - before;
			if (yields)
				sched_yield();
		}
	}
}

/* Wait for packets in flight, until none has arrived for a while. */
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
		put_in_turn(flow_count, began_ns);
	else
		send_and_take();
	ended_ns = clock_ns();
	running_ns = own_cpu_ns() - ran_before;
	in_time = tally.arrived;
	drain();
}

static void print_result(void)
{
	double sending_ns = (double)(ended_ns - began_ns);

	printf("{\"sent\": %lu, \"arrived\": %lu, \"in_time\": %lu, \"late\": %lu, \"seconds\": %.6f, \"idle\": %.4f, "
	       "\"running\": %.4f, \"last_ms\": %.3f, \"p50\": %.2f, \"p90\": %.2f, \"p99\": %.2f}\n",
	       tally.sent, tally.arrived, in_time, late, sending_ns / 1e9, (double)idle_ns / sending_ns,
	       (double)running_ns / sending_ns, tally.last_ns ? (double)(tally.last_ns - began_ns) / 1e6 : 0.0,
	       delay_us(0.5), delay_us(0.9), delay_us(0.99));
}

/* ---- arguments ---- */

static void fail(const char *what)
{
	fprintf(stderr, "load: %s\n", what);
	exit(2);
}

static struct flow *read_flows(size_t *count)
{
	size_t room = 32;
	struct flow *found = malloc(room * sizeof(*found)), flow = {.relayed = {.sin_family = AF_INET}};
	char host[64];
	uint16_t port;

	for (*count = 0; found && scanf("%d %u %63s %hu", &flow.client, &flow.channel, host, &port) == 4; (*count)++) {
		if (inet_pton(AF_INET, host, &flow.relayed.sin_addr) != 1)
			fail("a flow has no IPv4 address");
		flow.relayed.sin_port = htons(port);
		if (*count == room)
			found = realloc(found, (room *= 2) * sizeof(*found));
		if (found)
			found[*count] = flow;
	}
	if (!found || *count == 0)
		fail("no flows on standard input");
	return found;
}

static void set(int option, const char *value)
{
	uint64_t number = strtoull(value ? value : "0", NULL, 10);

	switch (option) {
	case 'd': plan.direction = strcmp(value, "down") ? UP : DOWN; break;
	case 'l': plan.size = number; break;
	case 'g': plan.segments = number; break;
	case 'p': plan.peer = (int)number; break;
	case 'w': window = number; break;
	case 'r': rate = number; break;
	case 's': duration_ns = number * 1000000u; break;
	case 'q': quiet_ns = number * 1000000u; break;
	case 'o': once = (int)number; break;
	case 'y': yields = (int)number; break;
	default: exit(2);
	}
}

int main(int count, char **arguments)
{
	static const struct option options[] = {
		{"direction", 1, NULL, 'd'}, {"size", 1, NULL, 'l'}, {"segments", 1, NULL, 'g'}, {"peer", 1, NULL, 'p'},
		{"window", 1, NULL, 'w'}, {"rate", 1, NULL, 'r'}, {"milliseconds", 1, NULL, 's'}, {"quiet", 1, NULL, 'q'},
		{"once", 1, NULL, 'o'}, {"yield", 1, NULL, 'y'}, {NULL, 0, NULL, 0},
	};
	struct flow *opened;
	size_t opened_count;

	/* The kernel ends this process if its parent dies. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	plan = (struct plan){UP, 172, 1, -1};
	for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;)
		set(option, optarg);
	if (plan.peer < 0 || !(window || rate || once) || !plan.segments || plan.size < LEAST_PAYLOAD ||
	    plan.segments * (plan.size + CHANNEL_HEADER) > LONGEST_DATAGRAM)
		fail("--peer, one of --window, --rate and --once, and messages that fit a datagram are needed");
	opened = read_flows(&opened_count);
	open_flows(opened, opened_count);
	run_load();
	print_result();
	return 0;
}
