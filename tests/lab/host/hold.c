/*
 * hold FILE MIB: has so many MiB of a VM's memory mapped, and a page of every
 * two of them there, until it is killed.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	size_t at, len = argc == 3 ? strtoul(argv[2], NULL, 10) << 20 : 0;
	int f = len != 0 ? open(argv[1], O_RDWR) : -1;
	volatile char *memory = mmap(NULL, len, PROT_READ, MAP_SHARED, f, 0);

	if (memory == MAP_FAILED) {
		perror("hold");
		return 1;
	}
	for (at = 0; at < len; at += 2 << 20)
		(void)memory[at];
	puts("held");
	fflush(stdout);
	for (;;)
		pause();
}
