/*-
 * SPDX-License-Identifier: BSD-2-Clause
 *
 * The paravirtual interface that bhyve offers a guest beside its own CPUID
 * leaves: KVM's, as Linux' Documentation/virt/kvm/x86 describes it.
 */
#ifndef KVMPARA_H
#define	KVMPARA_H

#include <machine/cpufunc.h>
#include <machine/md_var.h>
#include <machine/cputypes.h>
#include <machine/specialreg.h>

#define	KVMPARA_CLOCK		(1u << 3)
#define	KVMPARA_EOI		(1u << 6)
#define	KVMPARA_SEND_IPI	(1u << 11)
#define	KVMPARA_CLOCK_STABLE	(1u << 24)

#define	KVMPARA_MSR_SYSTEM_TIME	0x4b564d01
#define	KVMPARA_MSR_EOI		0x4b564d04
#define	KVMPARA_ENABLED		1

#define	KVMPARA_HC_SEND_IPI	10

/* What is offered; 0 if there is no such interface. */
static inline uint32_t
kvmpara_features(void)
{
	uint32_t base, regs[4];

	if ((cpu_feature2 & CPUID2_HV) == 0)
		return (0);
	/* Each hypervisor interface has 0x100 leaves; bhyve's own is first. */
	for (base = 0x40000000; base < 0x40010000; base += 0x100) {
		do_cpuid(base, regs);
		if (regs[1] == 0x4b4d564b && regs[2] == 0x564b4d56 &&
		    regs[3] == 0x4d) {
			do_cpuid(base + 1, regs);
			return (regs[0]);
		}
	}
	return (0);
}

/* A hypercall; negative: it failed. */
static inline long
kvmpara_call(u_long nr, u_long a0, u_long a1, u_long a2, u_long a3)
{
	long ret;

	if (cpu_vendor_id == CPU_VENDOR_AMD)
		__asm __volatile(".byte 0x0f,0x01,0xd9" : "=a" (ret) :
		    "a" (nr), "b" (a0), "c" (a1), "d" (a2), "S" (a3) :
		    "memory");
	else
		__asm __volatile(".byte 0x0f,0x01,0xc1" : "=a" (ret) :
		    "a" (nr), "b" (a0), "c" (a1), "d" (a2), "S" (a3) :
		    "memory");
	return (ret);
}

#endif
