/* Flows: packets in at one end, and out at the other. */
#ifndef FLOWS_H
#define FLOWS_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

enum direction { UP, DOWN };

#define LONGEST_DATAGRAM 65507
#define CHANNEL_HEADER 4
#define LEAST_PAYLOAD 24        /* holds struct stamp */

struct flow {
	int client;
	unsigned channel;               /* 0: payloads have no header */
	struct sockaddr_in relayed;
	uint64_t sent;
	uint64_t seen;                  /* one above the highest received number */
	uint64_t given_up;              /* lower numbers count as lost, unless they arrive late */
	uint64_t active_ns;             /* time of the last packet, sent or received */
};

struct plan {
	enum direction direction;
	size_t size;                    /* of the payload */
	uint64_t segments;              /* packets in a message: more than 1 for a GSO batch (UDP_SEGMENT) */
	int peer;
};

extern struct plan plan;
extern struct flow *flows;
extern size_t flow_count;

struct tally {
	uint64_t sent;
	uint64_t arrived;
	uint64_t last_ns;               /* time of the last packet received */
	uint64_t usual_delay_ns;        /* running mean */
};

extern struct tally tally;

void open_flows(struct flow *opened, size_t count);
void put(struct flow *flow, uint64_t now);
void flush(void);
uint64_t take(void);
uint64_t clock_ns(void);
double delay_us(double quantile);

#endif
