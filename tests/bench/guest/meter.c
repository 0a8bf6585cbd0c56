/*
 * Counts time-stamp ticks around work in a Linux guest (or on the bare
 * emulator). Prints "meter NAME TICKS COUNT".
 *
 *   meter tsc
 *   meter read|write FILE SIZE COUNT   one block over and over, around the cache
 *   meter ping A.B.C.D SIZE COUNT      echo requests, each with its answer
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

static void
result(const char *name, uint64_t ticks, long count)
{
	printf("meter %s %llu %ld\n", name, (unsigned long long)ticks, count);
}

static int
disk(const char *name, const char *file, long size, long count)
{
	int writes = strcmp(name, "write") == 0;
	int fd = open(file, (writes ? O_WRONLY : O_RDONLY) | O_DIRECT);
	void *buf;
	uint64_t start = 0;

	if (fd < 0 || posix_memalign(&buf, 4096, size) != 0)
		return (fail(file));
	memset(buf, 'm', size);
	/* The first ones find cold caches. */
	for (long i = -16; i < count; i++) {
		if (i == 0)
			start = rdtsc();
		ssize_t n = writes ? pwrite(fd, buf, size, 0) :
		    pread(fd, buf, size, 0);
		if (n != size)
			return (fail(file));
	}
	result(name, rdtsc() - start, count);
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
	uint64_t start = 0;

	if (s < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
	    size < (long)sizeof(*icmp) || size > (long)sizeof(out))
		return (fail(address));
	struct timeval patience = { .tv_sec = 5 };
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (long i = -16; i < count; i++) {
		if (i == 0)
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
	}
	result("ping", rdtsc() - start, count);
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
	result("run", rdtsc() - start, 1);
	return (WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

int
main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "tsc") == 0) {
		result("tsc", rdtsc(), 1);
		return (0);
	}
	if (argc == 5 && (strcmp(what, "read") == 0 || strcmp(what, "write") == 0))
		return (disk(what, argv[2], atol(argv[3]), atol(argv[4])));
	if (argc == 5 && strcmp(what, "ping") == 0)
		return (ping(argv[2], atol(argv[3]), atol(argv[4])));
	if (argc > 2 && strcmp(what, "run") == 0)
		return (run(argv + 2));
	fprintf(stderr, "meter: tsc, read, write, ping or run\n");
	return (2);
}
