/*
 * traffic SECONDS ADDRESS PORT DISK: for so long, at the same time, a stream to a
 * server that sends back what it gets, and two programs that each write and read
 * half of a disk. All that comes is compared with what went. A line from each, and
 * status 0 if nothing is wrong. PORT 0: the disk alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

#define PIECE 65536
/* Most bytes on their way. */
#define WINDOW (1 << 20)

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

/* What is at byte 8 * n of stream or block number `of`. */
static uint64_t word(uint64_t of, uint64_t n)
{
	return (n + 1) * 0x9e3779b97f4a7c15 ^ of << 40;
}

static void fill(uint64_t *piece, uint64_t of, uint64_t first)
{
	for (int i = 0; i < PIECE / 8; i++)
		piece[i] = word(of, first + i);
}

static int net(uint64_t end, const char *address, int port)
{
	static uint64_t out[PIECE / 8], in[PIECE / 8], expected[PIECE / 8];
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	uint64_t sent = 0, received = 0, wrong = 0, last = now();
	int s = socket(AF_INET, SOCK_STREAM, 0);

	inet_pton(AF_INET, address, &to.sin_addr);
	if (connect(s, (struct sockaddr *)&to, sizeof(to)) != 0) {
		perror("traffic: net");
		return 1;
	}
	fcntl(s, F_SETFL, O_NONBLOCK);
	/* On a slow machine the time may be over before it began. */
	while (sent == 0 || now() < end || received < sent) {
		int more = (sent == 0 || now() < end) && sent - received < WINDOW;
		struct pollfd p = { .fd = s, .events = POLLIN | (more ? POLLOUT : 0) };

		poll(&p, 1, 1000);
		if (p.revents & POLLOUT) {
			size_t at = sent % PIECE;
			ssize_t n;

			fill(out, 0, (sent - at) / 8);
			n = send(s, (char *)out + at, PIECE - at, MSG_NOSIGNAL);
			if (n > 0)
				sent += n;
		}
		if (p.revents & (POLLIN | POLLERR | POLLHUP)) {
			size_t at = received % PIECE;
			ssize_t n = recv(s, (char *)in + at, PIECE - at, 0);

			if (n == 0 || (n < 0 && errno != EAGAIN)) {
				perror("traffic: net");
				break;
			}
			if (n > 0) {
				fill(expected, 0, (received - at) / 8);
				wrong += memcmp((char *)in + at, (char *)expected + at, n) != 0;
				received += n;
				last = now();
			}
		}
		if (now() - last > 60000) {
			puts("traffic: net: nothing comes any more");
			break;
		}
	}
	printf("traffic: net sent=%llu received=%llu wrong=%llu\n", (unsigned long long)sent,
	       (unsigned long long)received, (unsigned long long)wrong);
	return sent == 0 || sent != received || wrong != 0;
}

static int disk(uint64_t end, const char *path, int half)
{
	uint64_t *out, *in, size, pieces, n, wrong = 0;
	int d = open(path, O_RDWR | O_DIRECT);

	if (d < 0 || ioctl(d, BLKGETSIZE64, &size) != 0 ||
	    posix_memalign((void **)&out, 4096, PIECE) || posix_memalign((void **)&in, 4096, PIECE)) {
		perror("traffic: disk");
		return 1;
	}
	pieces = size / 2 / PIECE;
	for (n = 0; n == 0 || now() < end; n++) {
		/* Writes one, reads the one of a while ago. */
		uint64_t old = n < 8 ? n : n - 8;
		uint64_t at = (half * pieces + n % pieces) * PIECE;
		uint64_t from = (half * pieces + old % pieces) * PIECE;

		fill(out, half + 1, n * (PIECE / 8));
		if (pwrite(d, out, PIECE, at) != PIECE || pread(d, in, PIECE, from) != PIECE ||
		    (n % 64 == 0 && fsync(d) != 0)) {
			perror("traffic: disk");
			return 1;
		}
		fill(out, half + 1, old * (PIECE / 8));
		wrong += memcmp(in, out, PIECE) != 0;
	}
	printf("traffic: disk written=%llu read=%llu wrong=%llu\n", (unsigned long long)n * PIECE,
	       (unsigned long long)n * PIECE, (unsigned long long)wrong);
	return n == 0 || wrong != 0;
}

int main(int argc, char **argv)
{
	uint64_t end;
	int failed = 0, programs;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 5)
		return 2;
	programs = atoi(argv[3]) == 0 ? 2 : 3;
	end = now() + atoi(argv[1]) * 1000ull;
	for (int i = 0; i < programs; i++) {
		pid_t p = fork();

		if (p < 0)
			return 2;
		if (p == 0)
			exit(i == 2 ? net(end, argv[2], atoi(argv[3])) : disk(end, argv[4], i));
	}
	for (int i = 0; i < programs; i++) {
		int status;

		failed |= wait(&status) < 0 || status != 0;
	}
	return failed;
}
