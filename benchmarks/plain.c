/*
 * The plain relay: a minimal relay of ChannelData, that makes only the necessary system calls.
 *
 * plain HOST PORT FIRST_PORT FLOWS PEER_HOST PEER_PORT
 *
 * Clients send to HOST:PORT. Channel 0x4000 + n is flow n, and belongs to its last sender. The relayed address of flow n is
 * HOST:FIRST_PORT+n: packets from there go to the one peer, and packets to there go to the client of the flow. One thread, one
 * epoll, one recvfrom and one sendto for each packet; no handshake, no authentication, no checks of addresses. Other messages are
 * sent back, as a sign of life.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#define FIRST_CHANNEL 0x4000
#define HEADER 4
#define READ_IN_A_ROW 32        /* most packets of one socket before the next socket */
#define RECEIVE_BUFFER (4 * 1024 * 1024)
#define EVENTS 64

struct flow {
	int socket;
	struct sockaddr_in client;      /* port 0: unknown */
};

static struct flow *flows;
static unsigned flow_count;
static int listener;
static struct sockaddr_in peer;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_in address_of(const char *host, unsigned port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

	if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
		fail(host);
	return address;
}

static int bound_socket(const char *host, unsigned port)
{
	struct sockaddr_in address = address_of(host, port);
	int opened = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), size = RECEIVE_BUFFER;

	if (opened < 0 || bind(opened, (struct sockaddr *)&address, sizeof(address)) < 0)
		fail("bind");
	setsockopt(opened, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	return opened;
}

/* Send a packet; an error loses the packet. */
static void send_to(int from, const char *data, size_t length, const struct sockaddr_in *to)
{
	if (sendto(from, data, length, 0, (const struct sockaddr *)to, sizeof(*to)) < 0)
		return;
}

static int relay_from_client(void)
{
	static char data[65536];
	struct sockaddr_in client;
	socklen_t client_length = sizeof(client);
	ssize_t length = recvfrom(listener, data, sizeof(data), 0, (struct sockaddr *)&client, &client_length);
	uint16_t channel, stated;

	if (length < HEADER)
		return length >= 0;
	memcpy(&channel, data, 2);
	memcpy(&stated, data + 2, 2);
	channel = (uint16_t)(ntohs(channel) - FIRST_CHANNEL);
	if (channel >= flow_count || ntohs(stated) > length - HEADER) {
		send_to(listener, data, (size_t)length, &client);
		return 1;
	}
	flows[channel].client = client;
	send_to(flows[channel].socket, data + HEADER, ntohs(stated), &peer);
	return 1;
}

static int relay_from_peer(unsigned number)
{
	static char data[HEADER + 65536];
	struct sockaddr_in sender;
	socklen_t sender_length = sizeof(sender);
	struct flow *flow = &flows[number];
	ssize_t length = recvfrom(flow->socket, data + HEADER, 65536, 0, (struct sockaddr *)&sender, &sender_length);
	uint16_t header[2] = {htons((uint16_t)(FIRST_CHANNEL + number)), htons((uint16_t)length)};

	if (length < 0)
		return 0;
	memcpy(data, header, HEADER);
	if (flow->client.sin_port)
		send_to(listener, data, HEADER + (size_t)length, &flow->client);
	return 1;
}

static void watch(int epoll, int socket, uint32_t number)
{
	struct epoll_event event = {.events = EPOLLIN, .data = {.u32 = number}};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, socket, &event) < 0)
		fail("epoll_ctl");
}

static void serve(int epoll)
{
	struct epoll_event events[EVENTS];

	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, -1);

		for (int i = 0; i < count; i++)
			for (int reads = 0; reads < READ_IN_A_ROW; reads++)
				if (!(events[i].data.u32 == flow_count ? relay_from_client() : relay_from_peer(events[i].data.u32)))
					break;
	}
}

int main(int count, char **arguments)
{
	int epoll = epoll_create1(0);

	/* The kernel ends this process if its parent dies. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (count != 7 || epoll < 0)
		fail("plain HOST PORT FIRST_PORT FLOWS PEER_HOST PEER_PORT");
	flow_count = (unsigned)atoi(arguments[4]);
	peer = address_of(arguments[5], (unsigned)atoi(arguments[6]));
	flows = calloc(flow_count, sizeof(*flows));
	if (flows == NULL)
		fail("calloc");
	listener = bound_socket(arguments[1], (unsigned)atoi(arguments[2]));
	watch(epoll, listener, flow_count);
	for (unsigned i = 0; i < flow_count; i++) {
		flows[i].socket = bound_socket(arguments[1], (unsigned)atoi(arguments[3]) + i);
		watch(epoll, flows[i].socket, i);
	}
	serve(epoll);
}
