/*-
 * SPDX-License-Identifier: BSD-2-Clause
 *
 * Ends of interrupts without an exit, and IPIs by one hypercall.
 *
 * The kernel reaches the local APIC through a table of functions.  This puts
 * two of its own there: EOI looks at a word that the hypervisor sets where an
 * interrupt's end is no business of its, and IPIs (TLB shootdowns among them) go
 * to all their receivers at once, with nothing emulated.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/bus.h>
#include <sys/kernel.h>
#include <sys/malloc.h>
#include <sys/module.h>
#include <sys/pcpu.h>
#include <sys/proc.h>
#include <sys/smp.h>

#include <vm/vm.h>
#include <vm/pmap.h>

#include <x86/apicreg.h>
#include <machine/intr_machdep.h>
#include <x86/apicvar.h>

#include "kvmpara.h"

/* A word of each CPU's own, a cache line each. */
struct eoi {
	volatile uint32_t	word;
	uint32_t		pad[15];
};
CTASSERT(sizeof(struct eoi) == 64);

static MALLOC_DEFINE(M_PVAPIC, "pvapic", "paravirtual end of interrupt");

/* Receivers that a hypercall can name: APIC ids from 0 on. */
#define	IDS	128

struct set {
	u_long	low;
	u_long	high;
};

static struct eoi *eois;
static struct set everyone;
static void (*native_eoi)(void);
#ifdef SMP
static void (*native_ipi_vectored)(u_int, int);
#endif

static void
set_add(struct set *s, u_int id)
{

	if (id < 64)
		s->low |= 1ul << id;
	else
		s->high |= 1ul << (id - 64);
}

static void
set_remove(struct set *s, u_int id)
{

	if (id < 64)
		s->low &= ~(1ul << id);
	else
		s->high &= ~(1ul << (id - 64));
}

/* Interrupts are off: it is called on the way in. */
static void
pvapic_eoi(void)
{
	volatile uint32_t *word;
	u_char was;

	word = &eois[curcpu].word;
	__asm __volatile("btrl $0,%1; setc %0" : "=q" (was), "+m" (*word) : :
	    "cc", "memory");
	if (!was)
		native_eoi();
}

#ifdef SMP
static void
pvapic_ipi_vectored(u_int vector, int dest)
{
	struct set to;
	u_long icr;

	switch (dest) {
	case APIC_IPI_DEST_SELF:
		to.low = to.high = 0;
		set_add(&to, PCPU_GET(apic_id));
		break;
	case APIC_IPI_DEST_ALL:
		to = everyone;
		break;
	case APIC_IPI_DEST_OTHERS:
		to = everyone;
		set_remove(&to, PCPU_GET(apic_id));
		break;
	default:
		if (dest < 0 || dest >= IDS) {
			native_ipi_vectored(vector, dest);
			return;
		}
		to.low = to.high = 0;
		set_add(&to, dest);
		break;
	}
	icr = vector >= IPI_NMI_FIRST ? APIC_DELMODE_NMI :
	    vector | APIC_DELMODE_FIXED;
	if (kvmpara_call(KVMPARA_HC_SEND_IPI, to.low, to.high, 0, icr) < 0)
		native_ipi_vectored(vector, dest);
}
#endif

static void
pvapic_enable(void *arg __unused)
{

	wrmsr(KVMPARA_MSR_EOI, vtophys(&eois[curcpu]) | KVMPARA_ENABLED);
}

static void
pvapic_disable(void *arg __unused)
{

	wrmsr(KVMPARA_MSR_EOI, 0);
}

static int
pvapic_load(void)
{
	uint32_t features;
	bool ipis;

	features = kvmpara_features();
	if ((features & (KVMPARA_EOI | KVMPARA_SEND_IPI)) == 0) {
		printf("pvapic: this machine has neither paravirtual end of "
		    "interrupt nor IPIs\n");
		return (ENXIO);
	}
	if ((features & KVMPARA_EOI) != 0) {
		eois = malloc(roundup2((mp_maxid + 1) * sizeof(*eois),
		    PAGE_SIZE), M_PVAPIC, M_WAITOK | M_ZERO);
		smp_rendezvous(smp_no_rendezvous_barrier, pvapic_enable,
		    smp_no_rendezvous_barrier, NULL);
		native_eoi = apic_ops.eoi;
		wmb();
		apic_ops.eoi = pvapic_eoi;
	}
	ipis = false;
#ifdef SMP
	if ((features & KVMPARA_SEND_IPI) != 0 && mp_ncpus > 1) {
		int cpu;

		ipis = true;
		CPU_FOREACH(cpu) {
			u_int id = pcpu_find(cpu)->pc_apic_id;

			if (id >= IDS)
				ipis = false;
			else
				set_add(&everyone, id);
		}
		if (ipis) {
			native_ipi_vectored = apic_ops.ipi_vectored;
			wmb();
			apic_ops.ipi_vectored = pvapic_ipi_vectored;
		}
	}
#endif
	printf("pvapic:%s%s\n", eois != NULL ? " end of interrupt" : "",
	    ipis ? " IPIs" : "");
	return (0);
}

static void
pvapic_unload(void)
{

#ifdef SMP
	if (native_ipi_vectored != NULL)
		apic_ops.ipi_vectored = native_ipi_vectored;
#endif
	if (eois == NULL) {
		/* Who is still in our code has interrupts off. */
		smp_rendezvous(smp_no_rendezvous_barrier, NULL,
		    smp_no_rendezvous_barrier, NULL);
		return;
	}
	apic_ops.eoi = native_eoi;
	smp_rendezvous(smp_no_rendezvous_barrier, pvapic_disable,
	    smp_no_rendezvous_barrier, NULL);
	free(eois, M_PVAPIC);
}

static int
pvapic_modevent(module_t mod __unused, int what, void *arg __unused)
{

	switch (what) {
	case MOD_LOAD:
		return (pvapic_load());
	case MOD_UNLOAD:
		pvapic_unload();
		return (0);
	case MOD_SHUTDOWN:
		return (0);
	default:
		return (EOPNOTSUPP);
	}
}

static moduledata_t pvapic_mod = {
	"pvapic",
	pvapic_modevent,
	NULL
};

/* Behind the start of the other CPUs, early or late. */
DECLARE_MODULE(pvapic, pvapic_mod, SI_SUB_SMP, SI_ORDER_ANY);
MODULE_VERSION(pvapic, 1);
