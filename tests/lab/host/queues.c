/*
 * queues tap NAME: makes a tap that several queues can be attached to, as
 * `ip tuntap add NAME mode tap multi_queue` does, queues tap NAME 0 removes it;
 * queues set NAME N: as `ethtool -L NAME combined N`. Busybox has neither.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/ethtool.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>

int main(int argc, char **argv)
{
	struct ethtool_channels channels = { .cmd = ETHTOOL_GCHANNELS };
	struct ifreq r = { 0 };
	int f;

	if (argc < 3)
		return 2;
	strncpy(r.ifr_name, argv[2], IFNAMSIZ - 1);
	if (!strcmp(argv[1], "tap")) {
		r.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE;
		f = open("/dev/net/tun", O_RDWR);
		if (f < 0 || ioctl(f, TUNSETIFF, &r) || ioctl(f, TUNSETPERSIST, argc < 4)) {
			perror("tap");
			return 1;
		}
		return 0;
	}
	if (argc < 4)
		return 2;
	f = socket(AF_INET, SOCK_DGRAM, 0);
	r.ifr_data = (void *)&channels;
	if (f < 0 || ioctl(f, SIOCETHTOOL, &r)) {
		perror("channels");
		return 1;
	}
	channels.cmd = ETHTOOL_SCHANNELS;
	channels.combined_count = atoi(argv[3]);
	if (ioctl(f, SIOCETHTOOL, &r)) {
		perror("channels");
		return 1;
	}
	printf("channels %u of %u\n", channels.combined_count, channels.max_combined);
	return 0;
}
