/*
 * Module load and unload, tunables, the host's suspend and resume, log.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/eventhandler.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/module.h>
#include <sys/proc.h>
#include <sys/smp.h>
#include <sys/sysctl.h>

#include <vm/vm.h>
#include <vm/pmap.h>

#include <machine/atomic.h>
#include <machine/clock.h>
#include <machine/cpu.h>
#include <machine/cpufunc.h>
#include <machine/md_var.h>
#include <machine/segments.h>
#include <machine/smp.h>
#include <machine/specialreg.h>
#include <machine/vmparam.h>
#include <x86/apicvar.h>

#include "shim.h"

/* Tenths of a second for which unloading waits for destroyed VMs. */
#define	UNLOAD_PATIENCE	50

SYSCTL_DECL(_hw_vmm);
SYSCTL_NODE(_hw_vmm, OID_AUTO, vmx, CTLFLAG_RW, NULL, "Intel VT-x");

static int use_apic_vid = 1;
SYSCTL_INT(_hw_vmm_vmx, OID_AUTO, use_apic_vid, CTLFLAG_RDTUN, &use_apic_vid,
    0, "use virtual-interrupt delivery where the CPU has it");

static int use_apic_pir = 1;
SYSCTL_INT(_hw_vmm_vmx, OID_AUTO, use_apic_pir, CTLFLAG_RDTUN, &use_apic_pir,
    0, "with use_apic_vid: post interrupts to running vCPUs without an exit");
int vmm_posted_vector = -1;

SYSCTL_NODE(_hw_vmm, OID_AUTO, svm, CTLFLAG_RW, NULL, "AMD-V");

static int use_avic;
SYSCTL_INT(_hw_vmm_svm, OID_AUTO, use_avic, CTLFLAG_RDTUN, &use_avic, 0,
    "use AVIC where the CPU has it: 0, 1, or -1 for Zen 4 and later");

static int no_flush_rsb;
SYSCTL_INT(_hw_vmm_vmx, OID_AUTO, no_flush_rsb, CTLFLAG_RDTUN, &no_flush_rsb,
    0, "do not fill the return-stack buffer after VM exits");

/*
 * What VT-x has, and what of it is used, under the names of FreeBSD's own
 * vmm.ko: scripts look at these.
 */
SYSCTL_NODE(_hw_vmm_vmx, OID_AUTO, cap, CTLFLAG_RW, NULL, "what VT-x has");
#define	CAPABILITY(parent, name, n, text)				\
	SYSCTL_INT(parent, OID_AUTO, name, CTLFLAG_RD,			\
	    &vmm_rust_capabilities[n], 0, text)
CAPABILITY(_hw_vmm_vmx, initialized, 0, "VT-x is in use");
CAPABILITY(_hw_vmm_vmx_cap, halt_exit, 1, "HLT causes a VM exit");
CAPABILITY(_hw_vmm_vmx_cap, pause_exit, 2, "PAUSE causes a VM exit");
CAPABILITY(_hw_vmm_vmx_cap, monitor_trap, 3, "monitor trap flag");
CAPABILITY(_hw_vmm_vmx_cap, unrestricted_guest, 4, "guests may be in real mode");
CAPABILITY(_hw_vmm_vmx_cap, invpcid, 5, "guests may execute INVPCID");
CAPABILITY(_hw_vmm_vmx_cap, virtual_interrupt_delivery, 6,
    "virtual-interrupt delivery is used");
CAPABILITY(_hw_vmm_vmx_cap, posted_interrupts, 7, "posted interrupts are used");

static int halt_detection = 1;
SYSCTL_INT(_hw_vmm, OID_AUTO, halt_detection, CTLFLAG_RDTUN, &halt_detection,
    0, "a guest that is in HLT with interrupts off on all CPUs has halted");

static u_int halt_poll_us = 200;
SYSCTL_UINT(_hw_vmm, OID_AUTO, halt_poll_us, CTLFLAG_RDTUN, &halt_poll_us, 0,
    "microseconds for which a vCPU in HLT stays awake when its waits are short");

static int account;
SYSCTL_INT(_hw_vmm, OID_AUTO, account, CTLFLAG_RDTUN, &account, 0,
    "count the time spent in guests (\"vcpu total runtime\", TSC ticks)");

static volatile u_int online_error;

static void
cpu_online(void *arg __unused)
{
	int error;

	error = vmm_rust_cpu_online();
	if (error != 0)
		atomic_store_int(&online_error, error);
}

static void
cpu_offline(void *arg __unused)
{

	vmm_rust_cpu_offline();
}

/*
 * The host goes to sleep: what the CPUs keep of VMCSs is written back, VT-x goes
 * off. No vCPU runs any more, as all processes have been stopped. A CPU that
 * wakes up calls vmm_resume_p; power_resume is for when sleep has failed.
 */
static eventhandler_tag suspend_tag, resume_tag;

static void
host_suspend(void *arg __unused)
{

	vmm_host_run_on_all(cpu_offline, NULL);
}

static void
host_resume(void *arg __unused)
{

	/* Does nothing where it is on. */
	vmm_host_run_on_all(cpu_online, NULL);
}

/* On every CPU, interrupts off. */
static void
cpu_resume(void)
{

	/* The first. No other uses an IOMMU before it is through. */
	if (PCPU_GET(cpuid) == 0)
		vmm_rust_resume();
	cpu_online(NULL);
}

static void
free_posted_vector(void)
{

	if (vmm_posted_vector >= 0)
		lapic_ipi_free(vmm_posted_vector);
}

static int
vmm_load(void)
{
	struct vmm_host_info info = {
		.tsc_hz = tsc_freq,
		.direct_map = PHYS_TO_DMAP(0),
		/* As vmm_host_thread_flags() aligns it. */
		.thread_flags = (uint64_t)VMM_AST_ANY <<
		    (VMM_AST_OFFSET % 8 * 8),
		.max_cpus = mp_maxid + 1,
		.tsc_invariant = tsc_is_invariant,
		.account = account != 0,
		.use_apic_vid = use_apic_vid != 0,
		.use_avic = use_avic < 0 ? 2 : use_avic != 0,
		.fill_rsb = no_flush_rsb == 0,
		.no_halt_detection = halt_detection == 0,
		.halt_poll_us = halt_poll_us,
		.thread_tss = 1,
		.events = 1,
		.run_by_seek = 1,
		/* The only form that this kernel uses, and trusts. */
		.xsave_forms = CPUID_EXTSTATE_XSAVEOPT,
	};
	int allow_2m_x_ept = -1;
	int error;

	/* The kernel's own tunable, where it has it too. */
	TUNABLE_INT_FETCH("vm.pmap.allow_2m_x_ept", &allow_2m_x_ept);
	info.nx_huge_pages = allow_2m_x_ept < 0 ? 2 : allow_2m_x_ept == 0;
	if (use_apic_pir != 0)
		vmm_posted_vector = lapic_ipi_alloc(pti ?
		    &IDTVEC(justreturn1_pti) : &IDTVEC(justreturn));
	info.posted_vector = MAX(vmm_posted_vector, 0);
	error = vmm_rust_init(&info);
	if (error != 0) {
		free_posted_vector();
		return (error);
	}
	vmm_host_run_on_all(cpu_online, NULL);
	error = atomic_load_int(&online_error);
	if (error == 0)
		error = vmm_device_init();
	if (error != 0) {
		vmm_host_run_on_all(cpu_offline, NULL);
		vmm_rust_exit();
		free_posted_vector();
		return (error);
	}
	vmm_resume_p = cpu_resume;
	suspend_tag = EVENTHANDLER_REGISTER(power_suspend, host_suspend, NULL,
	    EVENTHANDLER_PRI_LAST);
	resume_tag = EVENTHANDLER_REGISTER(power_resume, host_resume, NULL,
	    EVENTHANDLER_PRI_FIRST);
	return (0);
}

/*
 * What is left of destroyed VMs is waited for: the kernel takes nodes away when it
 * gets to it, and a process that was killed goes on until its memory is gone.
 */
static int
quiesce(void)
{
	int patience = UNLOAD_PATIENCE;

	while (atomic_load_int(&vmm_users) != 0) {
		if (vmm_device_busy() || patience-- == 0)
			return (EBUSY);
		pause("vmmend", hz / 10);
	}
	return (0);
}

static int
vmm_unload(void)
{

	atomic_store_rel_int(&vmm_unloading, 1);
	atomic_thread_fence_seq_cst();
	if (quiesce() != 0) {
		atomic_store_rel_int(&vmm_unloading, 0);
		return (EBUSY);
	}
	/* Whoever was the last may have yet to return from code of ours. */
	pause("vmmend", hz / 10);
	EVENTHANDLER_DEREGISTER(power_suspend, suspend_tag);
	EVENTHANDLER_DEREGISTER(power_resume, resume_tag);
	vmm_resume_p = NULL;
	vmm_device_exit();
	vmm_host_run_on_all(cpu_offline, NULL);
	vmm_rust_exit();
	free_posted_vector();
	return (0);
}

static int
vmm_event(module_t mod __unused, int what, void *arg __unused)
{

	switch (what) {
	case MOD_LOAD:
		return (vmm_load());
	case MOD_QUIESCE:
		return (quiesce());
	case MOD_UNLOAD:
		return (vmm_unload());
	default:
		return (0);
	}
}

static moduledata_t vmm_module = { "vmm", vmm_event, NULL };

/*
 * After the CPUs have been started, as VMX is switched on on all of them, and
 * devfs; which of the two is later depends on EARLY_AP_STARTUP.
 */
DECLARE_MODULE(vmm, vmm_module, MAX(SI_SUB_SMP + 1, SI_SUB_DRIVERS),
    SI_ORDER_ANY);
MODULE_VERSION(vmm, 1);
