/*-
 * SPDX-License-Identifier: BSD-2-Clause
 *
 * What the other drivers are measured by: TSC ticks of what they change, said
 * on the console when the kernel has come up.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/kernel.h>
#include <sys/module.h>
#include <sys/pcpu.h>
#include <sys/proc.h>
#include <sys/sched.h>
#include <sys/smp.h>
#include <sys/time.h>
#include <sys/timetc.h>

#include <vm/vm.h>
#include <vm/pmap.h>

#include <machine/cpufunc.h>
#include <machine/intr_machdep.h>
#include <machine/smp.h>
#include <x86/apicvar.h>

#define	ROUNDS	1000

static void
nothing(void *arg __unused)
{
}

static void
say(const char *what, uint64_t ticks)
{

	printf("pvbench: %s %ju\n", what, (uintmax_t)(ticks / ROUNDS));
}

static void
pvbench_run(void *arg __unused)
{
	struct timespec ts;
	uint64_t start;
	int i;

	printf("pvbench: %d CPUs, timecounter %s; ticks of one of each:\n",
	    mp_ncpus, timecounter->tc_name);
	start = rdtsc();
	for (i = 0; i < ROUNDS; i++)
		nanotime(&ts);
	say("nanotime", rdtsc() - start);
	start = rdtsc();
	for (i = 0; i < ROUNDS; i++)
		smp_rendezvous(smp_no_rendezvous_barrier, nothing,
		    smp_no_rendezvous_barrier, NULL);
	say("rendezvous", rdtsc() - start);
	start = rdtsc();
	for (i = 0; i < ROUNDS; i++)
		pmap_invalidate_all(kernel_pmap);
	say("tlb-shootdown", rdtsc() - start);
	/* Another CPU's clock interrupt, as the scheduler asks for it. */
#ifdef SMP
	if (mp_ncpus > 1) {
		sched_pin();
		start = rdtsc();
		for (i = 0; i < ROUNDS; i++)
			ipi_all_but_self(IPI_AST);
		say("ipi-send", rdtsc() - start);
		sched_unpin();
	}
#endif
}

static int
pvbench_modevent(module_t mod __unused, int what, void *arg __unused)
{

	switch (what) {
	case MOD_LOAD:
	case MOD_UNLOAD:
	case MOD_SHUTDOWN:
		return (0);
	default:
		return (EOPNOTSUPP);
	}
}

static moduledata_t pvbench_mod = {
	"pvbench",
	pvbench_modevent,
	NULL
};

DECLARE_MODULE(pvbench, pvbench_mod, SI_SUB_DRIVERS, SI_ORDER_ANY);
MODULE_VERSION(pvbench, 1);
/* Behind all others, loaded with the kernel or later. */
SYSINIT(pvbench, SI_SUB_LAST, SI_ORDER_ANY, pvbench_run, NULL);
