/*-
 * SPDX-License-Identifier: BSD-2-Clause
 *
 * A timecounter for guests with more than one CPU.
 *
 * FreeBSD does not trust the TSC of a virtual machine with several CPUs, as it
 * cannot know whether they agree, and takes the HPET, of which every read is an
 * exit.  bhyve knows, and says so by the paravirtual clock's flag: then the TSC
 * is the clock, at a rate that the clock's structure tells and nobody needs to
 * measure, for the kernel and, by the shared page, for programs.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/kernel.h>
#include <sys/limits.h>
#include <sys/malloc.h>
#include <sys/module.h>
#include <sys/proc.h>
#include <sys/smp.h>
#include <sys/timetc.h>
#include <sys/vdso.h>

#include <vm/vm.h>
#include <vm/pmap.h>

#include "kvmpara.h"

/* struct pvclock_vcpu_time_info. */
struct pvclock {
	volatile uint32_t	version;
	uint32_t		pad0;
	uint64_t		tsc_timestamp;
	uint64_t		system_time;
	uint32_t		mul;
	int8_t			shift;
	uint8_t			flags;
	uint8_t			pad1[2];
};
CTASSERT(sizeof(struct pvclock) == 32);

#define	TSC_STABLE	1

/* Above the HPET's 950 and a trusted TSC's 1000. */
#define	QUALITY		1100

static MALLOC_DEFINE(M_PVCLOCK, "pvclock", "paravirtual clock");

static struct pvclock *clocks;
static bool active;

static u_int
pvclock_timecount_intel(struct timecounter *tc)
{

	lfence();
	return (rdtsc() >> (int)(intptr_t)tc->tc_priv);
}

static u_int
pvclock_timecount_amd(struct timecounter *tc)
{

	mfence();
	return (rdtsc() >> (int)(intptr_t)tc->tc_priv);
}

static uint32_t
pvclock_vdso(struct vdso_timehands *th, struct timecounter *tc)
{

	th->th_algo = VDSO_TH_ALGO_X86_TSC;
	th->th_x86_shift = (int)(intptr_t)tc->tc_priv;
	th->th_x86_hpet_idx = 0xffffffff;
	bzero(th->th_res, sizeof(th->th_res));
	return (1);
}

static struct timecounter pvclock_tc = {
	.tc_counter_mask = ~0u,
	.tc_name = "pvclock",
	.tc_quality = QUALITY,
	.tc_fill_vdso_timehands = pvclock_vdso,
};

static void
pvclock_enable(void *arg __unused)
{

	wrmsr(KVMPARA_MSR_SYSTEM_TIME,
	    vtophys(&clocks[curcpu]) | KVMPARA_ENABLED);
}

static void
pvclock_disable(void *arg __unused)
{

	wrmsr(KVMPARA_MSR_SYSTEM_TIME, 0);
}

/* Whether all CPUs' clocks are the same function of the same TSC. */
static bool
pvclock_agree(void)
{
	struct pvclock *c, *first;
	int cpu;

	first = &clocks[curcpu];
	CPU_FOREACH(cpu) {
		c = &clocks[cpu];
		if ((c->flags & TSC_STABLE) == 0 || (c->version & 1) != 0 ||
		    c->mul == 0 || c->mul != first->mul ||
		    c->shift != first->shift ||
		    c->tsc_timestamp != first->tsc_timestamp ||
		    c->system_time != first->system_time)
			return (false);
	}
	return (true);
}

/* ns = ((ticks << shift) * mul) >> 32, solved for ticks in 10^9 ns. */
static uint64_t
pvclock_frequency(const struct pvclock *c)
{
	uint64_t freq;

	freq = (1000000000ull << 32) / c->mul;
	return (c->shift < 0 ? freq << -c->shift : freq >> c->shift);
}

static int
pvclock_load(void)
{
	const uint32_t need = KVMPARA_CLOCK | KVMPARA_CLOCK_STABLE;
	uint64_t freq;
	int shift;

	if ((kvmpara_features() & need) != need) {
		printf("pvclock: this machine has no stable paravirtual "
		    "clock\n");
		return (ENXIO);
	}
	/* Aligned to its size, so that none lies across pages. */
	clocks = malloc(roundup2((mp_maxid + 1) * sizeof(*clocks), PAGE_SIZE),
	    M_PVCLOCK, M_WAITOK | M_ZERO);
	smp_rendezvous(smp_no_rendezvous_barrier, pvclock_enable,
	    smp_no_rendezvous_barrier, NULL);
	if (!pvclock_agree()) {
		smp_rendezvous(smp_no_rendezvous_barrier, pvclock_disable,
		    smp_no_rendezvous_barrier, NULL);
		free(clocks, M_PVCLOCK);
		printf("pvclock: the CPUs' clocks do not agree\n");
		return (ENXIO);
	}
	freq = pvclock_frequency(&clocks[curcpu]);
	/* The counter has 32 bits and must not go round too soon. */
	for (shift = 1; (freq >> shift) > UINT_MAX / 2; shift++)
		;
	pvclock_tc.tc_priv = (void *)(intptr_t)shift;
	pvclock_tc.tc_frequency = freq >> shift;
	pvclock_tc.tc_get_timecount = cpu_vendor_id == CPU_VENDOR_AMD ?
	    pvclock_timecount_amd : pvclock_timecount_intel;
	active = true;
	tc_init(&pvclock_tc);
	printf("pvclock: TSC at %ju Hz, by the paravirtual clock\n",
	    (uintmax_t)freq);
	return (0);
}

static int
pvclock_modevent(module_t mod __unused, int what, void *arg __unused)
{

	switch (what) {
	case MOD_LOAD:
		return (pvclock_load());
	case MOD_UNLOAD:
		/* A timecounter stays for good. */
		return (active ? EBUSY : 0);
	case MOD_SHUTDOWN:
		return (0);
	default:
		return (EOPNOTSUPP);
	}
}

static moduledata_t pvclock_mod = {
	"pvclock",
	pvclock_modevent,
	NULL
};

/* Behind the start of the other CPUs, early or late. */
DECLARE_MODULE(pvclock, pvclock_mod, SI_SUB_SMP, SI_ORDER_ANY);
MODULE_VERSION(pvclock, 1);
