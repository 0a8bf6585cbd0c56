/*
 * edu-dma DEVICE ADDRESS: has QEMU's edu, driven from here, write to that address.
 * edu-dma DEVICE: has it read and write a page of ours by its physical address. Says
 * "reaches" if the page has what it should then, "blocked" if it is as it was.
 * DEVICE is its folder in sysfs, or, of one that the kernel has been told to forget
 * and that was made bus master before, the physical address of its registers.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define LENGTH 64
/* Where DMA sees the device's own memory. */
#define BUFFER 0x40000
#define START 1
#define TO_MEMORY 2
/* PCI's command register: memory, bus master. */
#define COMMAND 4
#define ON 6

static volatile uint8_t *registers;

static void fail(const char *what)
{
	perror(what);
	exit(2);
}

static int opened(const char *folder, const char *name)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_RDWR | O_SYNC);
	if (fd < 0)
		fail(path);
	return fd;
}

static void finish(void)
{
	int i;

	/* A transfer takes 100 ms. */
	for (i = 0; i < 600; i++) {
		if (!(*(volatile uint32_t *)(registers + 0x98) & START))
			return;
		usleep(100000);
	}
	fprintf(stderr, "a transfer does not end\n");
	exit(2);
}

static void transfer(uint64_t from, uint64_t to, uint32_t command)
{
	*(volatile uint64_t *)(registers + 0x80) = from;
	*(volatile uint64_t *)(registers + 0x88) = to;
	*(volatile uint64_t *)(registers + 0x90) = LENGTH;
	*(volatile uint32_t *)(registers + 0x98) = START | command;
	finish();
}

static uint64_t physical(const void *at)
{
	uint64_t entry;
	int fd = open("/proc/self/pagemap", O_RDONLY);

	if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)at / PAGE * 8) != 8)
		fail("/proc/self/pagemap");
	close(fd);
	return (entry & ((1ULL << 55) - 1)) * PAGE;
}

static int all(const uint8_t *page, int value)
{
	int i;

	for (i = 0; i < LENGTH; i++)
		if (page[i] != value)
			return 0;
	return 1;
}

static void set_command(int config, uint16_t value)
{
	if (config >= 0 && pwrite(config, &value, 2, COMMAND) != 2)
		fail("config");
}

int main(int argc, char **argv)
{
	uint16_t was = 0;
	uint64_t at, here;
	uint8_t *page;
	char *end;
	int config = -1, memory;

	if (argc != 2 && argc != 3)
		return 2;
	at = strtoull(argv[1], &end, 0);
	if (*end == '\0') {
		memory = opened("/dev", "mem");
	} else {
		at = 0;
		memory = opened(argv[1], "resource0");
		config = opened(argv[1], "config");
		if (pread(config, &was, 2, COMMAND) != 2)
			fail("config");
	}
	registers = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
	    memory, at);
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
	    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
	if (registers == MAP_FAILED || page == MAP_FAILED)
		fail("mmap");
	memset(page, 0x5a, PAGE);
	here = physical(page);
	/* Decoding first: what a guest began has to end without being let through. */
	set_command(config, (was | ON) & ~4);
	finish();
	set_command(config, was | ON);
	if (argc == 3) {
		transfer(BUFFER, strtoull(argv[2], NULL, 0), TO_MEMORY);
	} else {
		transfer(here, BUFFER, 0);
		memset(page, 0xa5, PAGE);
		transfer(BUFFER, here, TO_MEMORY);
	}
	set_command(config, was);
	if (argc == 3)
		return 0;
	if (all(page, 0x5a))
		puts("reaches");
	else if (all(page, 0xa5))
		puts("blocked");
	else
		printf("neither: %#x\n", page[0]);
	return 0;
}
