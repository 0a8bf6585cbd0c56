/*
 * CPUs: cross calls, kicks, and the window in which a guest runs.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/cpuset.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/mutex.h>
#include <sys/pcpu.h>
#include <sys/proc.h>
#include <sys/smp.h>
#include <sys/sysctl.h>

#include <machine/cpufunc.h>
#include <machine/md_var.h>
#include <machine/pcb.h>
#include <machine/segments.h>
#include <machine/smp.h>
#include <machine/specialreg.h>
#include <x86/apicvar.h>

#include "shim.h"

SYSCTL_DECL(_hw_vmm);
static int ipinum = IPI_BITMAP_VECTOR;
SYSCTL_INT(_hw_vmm, OID_AUTO, ipinum, CTLFLAG_RD, &ipinum, 0,
    "vector of the IPI that makes a CPU leave its guest");

uint32_t
vmm_host_cpu(void)
{

	return (curcpu);
}

int
vmm_host_run_on_cpu(uint32_t cpu, void (*fn)(void *), void *arg)
{
	cpuset_t set;

	if (cpu > mp_maxid || CPU_ABSENT(cpu))
		return (0);
	CPU_SETOF(cpu, &set);
	smp_rendezvous_cpus(set, smp_no_rendezvous_barrier, fn,
	    smp_no_rendezvous_barrier, arg);
	return (1);
}

void
vmm_host_run_on_all(void (*fn)(void *), void *arg)
{

	smp_rendezvous(smp_no_rendezvous_barrier, fn,
	    smp_no_rendezvous_barrier, arg);
}

void
vmm_host_kick_cpu(uint32_t cpu)
{

	/* IPI_AST has no effect but the exit that it causes. */
	ipi_cpu(cpu, IPI_AST);
}

void
vmm_host_notify_cpu(uint32_t cpu)
{

	ipi_cpu(cpu, vmm_posted_vector);
}

int
vmm_host_guest_begin(void)
{
	struct thread *td = curthread;

	/* critical_enter() and _exit() without the calls that a module makes. */
	td->td_critnest++;
	__compiler_membar();
	/*
	 * PCB_FULL_IRET is not needed: the thread's segment registers and their
	 * bases are back before guest_end().
	 */
	/* Saves the thread's FPU state and sets CR0.TS. */
	if (PCPU_GET(fpcurthread) == td)
		fpuexit(td);
	disable_intr();
	clts();
	return (0);
}

void
vmm_host_guest_end(int fpu_live __unused)
{
	struct thread *td = curthread;

	/* What is in the FPU now is nobody's: the next use traps. */
	load_cr0(rcr0() | CR0_TS);
	/*
	 * VM exits leave TR with the limit of a TSS without I/O permissions
	 * (SDM Vol. 3C 27.5.2); this thread has some. LTR wants it not busy.
	 */
	if (__predict_false(td->td_pcb->pcb_tssp != NULL)) {
		PCPU_GET(tss)->sd_type = SDT_SYSTSS;
		ltr(GSEL(GPROC0_SEL, SEL_KPL));
	}
	enable_intr();
	__compiler_membar();
	td->td_critnest--;
	__compiler_membar();
	if (__predict_false(td->td_owepreempt))
		critical_exit_preempt();
}

int
vmm_host_irq_window(unsigned int vector)
{
	struct thread *td = curthread;

	if (vector != 0)
		vmm_rust_interrupt(vector);
	enable_intr();
	/* STI takes effect after the next instruction. */
	__asm __volatile("nop");
	disable_intr();
	/*
	 * A preemption by another CPU leaves only this behind; the inner loop
	 * looks at what VMM_AST_ANY names.
	 */
	if (__predict_false(td->td_owepreempt))
		VMM_AST_SET_SCHED(td);
	return (0);
}
