/*
 * sock unix|listen PATH, sock vsock CID PORT, sock vlisten PORT: standard input
 * to a stream socket, the socket to standard output, each until its end.
 */
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

/* One program of the other side's, or -1. */
static int open_socket(int argc, char **argv)
{
	struct sockaddr_un path = { .sun_family = AF_UNIX };
	struct sockaddr_vm port = { .svm_family = AF_VSOCK };
	struct sockaddr *at = (struct sockaddr *)&port;
	socklen_t len = sizeof(port);
	int listens, s;

	if (argc < 3)
		return -1;
	listens = strstr(argv[1], "listen") != NULL;
	if (argv[1][0] == 'v') {
		port.svm_cid = listens ? VMADDR_CID_ANY : atoi(argv[2]);
		port.svm_port = atoi(argv[argc - 1]);
	} else {
		strncpy(path.sun_path, argv[2], sizeof(path.sun_path) - 1);
		at = (struct sockaddr *)&path;
		len = sizeof(path);
	}
	s = socket(at->sa_family, SOCK_STREAM, 0);
	if (!listens)
		return connect(s, at, len) == 0 ? s : -1;
	if (bind(s, at, len) != 0 || listen(s, 1) != 0)
		return -1;
	return accept(s, NULL, NULL);
}

/* Carries a part; 0 at the end. */
static int carry(int from, int to)
{
	static char buffer[65536];
	ssize_t n = read(from, buffer, sizeof(buffer)), done = 0, m;

	while (done < n) {
		m = write(to, buffer + done, n - done);
		if (m <= 0)
			exit(1);
		done += m;
	}
	return n > 0;
}

int main(int argc, char **argv)
{
	int s = open_socket(argc, argv);
	struct pollfd in[2] = {
		{ .fd = 0, .events = POLLIN }, { .fd = s, .events = POLLIN }
	};

	if (s < 0)
		return 1;
	while ((in[0].fd >= 0 || in[1].fd >= 0) && poll(in, 2, -1) > 0) {
		if (in[0].revents != 0 && !carry(0, s)) {
			shutdown(s, SHUT_WR);
			in[0].fd = -1;
		}
		if (in[1].revents != 0 && !carry(s, 1))
			in[1].fd = -1;
	}
	return 0;
}
