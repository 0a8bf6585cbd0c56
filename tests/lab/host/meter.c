/*
 * Counts time-stamp ticks around work in a Linux guest (or on the bare
 * emulator). Prints "meter NAME TICKS COUNT LEAST": all ticks, pieces of work,
 * and the fewest ticks of one.
 *
 *   meter tsc
 *   meter read|write FILE SIZE COUNT   one block over and over, around the cache
 *   meter ping A.B.C.D SIZE COUNT      echo requests, each with its answer
 *   meter send A.B.C.D SIZE COUNT      datagrams to the discard port
 *   meter run PROGRAM ARGUMENT...      a program, start to end
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t
rdtsc(void)
{
	uint32_t lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return ((uint64_t)hi << 32 | lo);
}

static int
fail(const char *what)
{
	fprintf(stderr, "meter: %s: %s\n", what, strerror(errno));
	return (1);
}

/* Of all pieces of work, and of the one that took the fewest ticks. */
static uint64_t total, least = UINT64_MAX;

static void
took(uint64_t ticks)
{
	total += ticks;
	if (ticks < least)
		least = ticks;
}

static void
result(const char *name, long count)
{
	printf("meter %s %llu %ld %llu\n", name, (unsigned long long)total,
	    count, (unsigned long long)least);
}

static int
disk(const char *name, const char *file, long size, long count)
{
	int writes = strcmp(name, "write") == 0;
	int fd = open(file, (writes ? O_WRONLY : O_RDONLY) | O_DIRECT);
	void *buf;
	uint64_t start;

	if (fd < 0 || posix_memalign(&buf, 4096, size) != 0)
		return (fail(file));
	memset(buf, 'm', size);
	/* The first ones find cold caches. */
	for (long i = -16; i < count; i++) {
		start = rdtsc();
		ssize_t n = writes ? pwrite(fd, buf, size, 0) :
		    pread(fd, buf, size, 0);
		if (n != size)
			return (fail(file));
		if (i >= 0)
			took(rdtsc() - start);
	}
	result(name, count);
	return (0);
}

static uint16_t
checksum(const void *data, size_t len)
{
	const uint16_t *p = data;
	uint32_t sum = 0;

	for (; len > 1; len -= 2)
		sum += *p++;
	sum = (sum >> 16) + (sum & 0xffff);
	return (~(sum + (sum >> 16)));
}

static int
ping(const char *address, long size, long count)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	unsigned char out[1500] = { 0 }, in[2000];
	struct icmphdr *icmp = (struct icmphdr *)out;
	int s = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	uint64_t start;

	if (s < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
	    size < (long)sizeof(*icmp) || size > (long)sizeof(out))
		return (fail(address));
	struct timeval patience = { .tv_sec = 5 };
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (long i = -16; i < count; i++) {
		start = rdtsc();
		icmp->type = ICMP_ECHO;
		icmp->un.echo.sequence = htons(i & 0x7fff);
		icmp->checksum = 0;
		icmp->checksum = checksum(out, size & ~1L);
		if (sendto(s, out, size & ~1L, 0, (void *)&to, sizeof(to)) < 0)
			return (fail("send"));
		for (;;) {
			ssize_t n = recv(s, in, sizeof(in), 0);
			struct icmphdr *got = (void *)(in + 20);

			if (n < 28)
				return (fail("no answer"));
			if (got->type == ICMP_ECHOREPLY &&
			    got->un.echo.sequence == icmp->un.echo.sequence)
				break;
		}
		if (i >= 0)
			took(rdtsc() - start);
	}
	result("ping", count);
	return (0);
}

/* Linux answers only a few a second with "nobody listens". */
static int
datagrams(const char *address, long size, long count)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(9) };
	static char data[65000];
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	uint64_t start;

	if (s < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
	    size < 1 || size > (long)sizeof(data))
		return (fail(address));
	for (long i = -16; i < count; i++) {
		start = rdtsc();
		/* Blocks while the queue is full. */
		if (sendto(s, data, size, 0, (void *)&to, sizeof(to)) < 0)
			return (fail("send"));
		if (i >= 0)
			took(rdtsc() - start);
	}
	result("send", count);
	return (0);
}

static int
run(char **argv)
{
	uint64_t start = rdtsc();
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		execv(argv[0], argv);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		return (fail(argv[0]));
	took(rdtsc() - start);
	result("run", 1);
	return (WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

int
main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "tsc") == 0) {
		took(rdtsc());
		result("tsc", 1);
		return (0);
	}
	if (argc == 5 && (strcmp(what, "read") == 0 || strcmp(what, "write") == 0))
		return (disk(what, argv[2], atol(argv[3]), atol(argv[4])));
	if (argc == 5 && strcmp(what, "ping") == 0)
		return (ping(argv[2], atol(argv[3]), atol(argv[4])));
	if (argc == 5 && strcmp(what, "send") == 0)
		return (datagrams(argv[2], atol(argv[3]), atol(argv[4])));
	if (argc > 2 && strcmp(what, "run") == 0)
		return (run(argv + 2));
	fprintf(stderr, "meter: tsc, read, write, ping, send or run\n");
	return (2);
}
