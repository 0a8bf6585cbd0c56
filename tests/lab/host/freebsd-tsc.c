/* Prints the time-stamp counter and the seconds that the CPUs were idle. */
#include <sys/param.h>
#include <sys/sysctl.h>
#include <sys/user.h>
#include <stdio.h>
#include <string.h>

/* The idle threads are those of one process, the one called "idle". */
static double
idle(void)
{
	static struct kinfo_proc all[512];
	int mib[3] = { CTL_KERN, KERN_PROC, KERN_PROC_PROC | KERN_PROC_INC_THREAD };
	size_t len = sizeof(all), i;
	double us = 0;

	if (sysctl(mib, 3, all, &len, NULL, 0) != 0)
		return (-1);
	for (i = 0; i < len / sizeof(all[0]); i++)
		if (strcmp(all[i].ki_comm, "idle") == 0)
			us += all[i].ki_runtime;
	return (us / 1000000);
}

int
main(void)
{
	double seconds = idle();

	printf("%lu\n%.6f\n", __builtin_ia32_rdtsc(), seconds);
	return (seconds < 0);
}
