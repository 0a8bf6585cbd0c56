/*
 * What the CPU has, and what of it is used, under the names of FreeBSD's own
 * vmm.ko: scripts look at these.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/sysctl.h>

#include <machine/cpufunc.h>
#include <machine/cputypes.h>
#include <machine/md_var.h>
#include <machine/specialreg.h>

#include "shim.h"

/* VMX capability MSRs and their bits, SDM Vol. 3D appendix A.3. */
#define	MSR_PROCBASED		0x482
#define	MSR_PROCBASED2		0x48b
#define	 PROCBASED_HLT		(1u << 7)
#define	 PROCBASED_MTF		(1u << 27)
#define	 PROCBASED_PAUSE	(1u << 30)
#define	 PROCBASED2_UNRESTRICTED (1u << 7)
#define	 PROCBASED2_VID		(1u << 9)
#define	 PROCBASED2_INVPCID	(1u << 12)

SYSCTL_DECL(_hw_vmm);
SYSCTL_DECL(_hw_vmm_vmx);
SYSCTL_NODE(_hw_vmm_vmx, OID_AUTO, cap, CTLFLAG_RW, NULL, "what VT-x has");

static int initialized;
static int cap_halt_exit, cap_pause_exit, cap_unrestricted_guest;
static int cap_monitor_trap, cap_invpcid, cap_interrupt_delivery;
static int cap_posted_interrupts;
SYSCTL_INT(_hw_vmm_vmx, OID_AUTO, initialized, CTLFLAG_RD, &initialized, 0,
    "VT-x is in use");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, halt_exit, CTLFLAG_RD, &cap_halt_exit, 0,
    "HLT causes a VM exit");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, pause_exit, CTLFLAG_RD, &cap_pause_exit, 0,
    "PAUSE causes a VM exit");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, unrestricted_guest, CTLFLAG_RD,
    &cap_unrestricted_guest, 0, "guests may be in real mode");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, monitor_trap, CTLFLAG_RD, &cap_monitor_trap,
    0, "monitor trap flag");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, invpcid, CTLFLAG_RD, &cap_invpcid, 0,
    "guests may execute INVPCID");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, virtual_interrupt_delivery, CTLFLAG_RD,
    &cap_interrupt_delivery, 0, "virtual-interrupt delivery is used");
SYSCTL_INT(_hw_vmm_vmx_cap, OID_AUTO, posted_interrupts, CTLFLAG_RD,
    &cap_posted_interrupts, 0, "posted interrupts are used");

/* A control can be set: its bit is in the upper half. */
static bool
allowed(u_int msr, uint32_t bit)
{

	return ((rdmsr(msr) >> 32 & bit) != 0);
}

void
vmm_sysctl_init(bool use_apic_vid)
{

	if (cpu_vendor_id != CPU_VENDOR_INTEL)
		return;
	initialized = 1;
	cap_halt_exit = allowed(MSR_PROCBASED, PROCBASED_HLT);
	cap_pause_exit = allowed(MSR_PROCBASED, PROCBASED_PAUSE);
	cap_monitor_trap = allowed(MSR_PROCBASED, PROCBASED_MTF);
	cap_unrestricted_guest = allowed(MSR_PROCBASED2, PROCBASED2_UNRESTRICTED);
	cap_invpcid = allowed(MSR_PROCBASED2, PROCBASED2_INVPCID);
	cap_interrupt_delivery = use_apic_vid &&
	    allowed(MSR_PROCBASED2, PROCBASED2_VID);
}
