/* Lanes: packets into one end of a flow, and what arrives at the other. */
#ifndef LANES_H
#define LANES_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

enum direction { UP = 1, DOWN = 2, BOTH = UP | DOWN, ECHO = 4 | UP };

#define LONGEST_DATAGRAM 65507
#define CHANNEL_HEADER 4
#define LEAST_PAYLOAD 24        /* our own header in it */

struct flow {
	int client;
	unsigned channel;               /* 0: payloads travel without a header */
	struct sockaddr_in relayed;
};

/* One direction of a flow. */
struct lane {
	size_t flow;
	int up;
	uint64_t sent;
	uint64_t seen;                  /* one above the highest number that has arrived */
	uint64_t given_up;              /* all below this number count as lost, unless they come late */
	uint64_t active_ns;             /* when something was last sent or arrived */
};

struct plan {
	enum direction direction;
	size_t size;                    /* of the payload */
	uint64_t segments;              /* packets in a message: above 1, a train that the kernel takes apart (UDP_SEGMENT) */
	int peer;
};

extern struct plan plan;
extern struct lane *lanes;
extern size_t lane_count;

struct tally {
	uint64_t sent;
	uint64_t arrived;               /* at the lane's end; in an echo, back at the client */
	uint64_t relayed;               /* packets that came out of the server: in an echo, twice as many */
	uint64_t refused;               /* messages that the kernel did not take, EAGAIN, ENOBUFS, ECONNREFUSED */
	uint64_t last_ns;               /* when the last one arrived */
	uint64_t usual_delay_ns;        /* a running mean */
};

extern struct tally tally;

void open_lanes(struct flow *flows, size_t count);
void put(struct lane *lane, uint64_t now);
void flush(void);
uint64_t take(void);
uint64_t clock_ns(void);
double delay_us(double quantile);
double longest_delay_us(void);

#endif
