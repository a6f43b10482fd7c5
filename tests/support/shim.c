/* Loaded into a relay before libc (LD_PRELOAD): system calls that fail, and a wall clock that is wrong, when a test says so by way
 * of a file that both have mapped. For what no test can have the kernel do: run out of memory for one socket, say. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct fault {
    int error; /* what errno is then */
    int left;  /* how many calls are to fail; all if negative */
    int hits;  /* how many did */
    int unused;
};

static struct table {
    struct fault send, receive, bind;
    long ahead; /* seconds by which the wall clock is ahead */
} *table;

__attribute__((constructor)) static void map_table(void) {
    const char *path = getenv("FAULTS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED)
        table = mapped;
    if (file >= 0)
        close(file);
}

static int is_udp(int sock) {
    int kind = 0, family = 0;
    socklen_t size = sizeof(int);
    return !getsockopt(sock, SOL_SOCKET, SO_TYPE, &kind, &size) && kind == SOCK_DGRAM &&
           !getsockopt(sock, SOL_SOCKET, SO_DOMAIN, &family, &size) && (family == AF_INET || family == AF_INET6);
}

static int fails(struct fault *fault, int sock) {
    int left = __atomic_load_n(&fault->left, __ATOMIC_SEQ_CST);
    if (left == 0 || !is_udp(sock))
        return 0;
    while (left > 0 && !__atomic_compare_exchange_n(&fault->left, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
    if (left == 0)
        return 0;
    __atomic_add_fetch(&fault->hits, 1, __ATOMIC_SEQ_CST);
    errno = fault->error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t sendto(int sock, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length) {
    return table && fails(&table->send, sock) ? -1 : REAL(sendto)(sock, data, size, flags, to, length);
}

ssize_t sendmsg(int sock, const struct msghdr *message, int flags) {
    return table && fails(&table->send, sock) ? -1 : REAL(sendmsg)(sock, message, flags);
}

ssize_t recv(int sock, void *data, size_t size, int flags) {
    return table && fails(&table->receive, sock) ? -1 : REAL(recv)(sock, data, size, flags);
}

ssize_t recvmsg(int sock, struct msghdr *message, int flags) {
    return table && fails(&table->receive, sock) ? -1 : REAL(recvmsg)(sock, message, flags);
}

int bind(int sock, const struct sockaddr *at, socklen_t length) {
    return table && fails(&table->bind, sock) ? -1 : REAL(bind)(sock, at, length);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (table && clock == CLOCK_REALTIME)
        now->tv_sec += table->ahead;
    return result;
}
