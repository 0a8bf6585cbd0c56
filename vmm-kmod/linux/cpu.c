/* CPUs: cross calls, kicks, and the window in which a guest runs. */
#include <linux/irqflags.h>
#include <linux/preempt.h>
#include <linux/smp.h>
#include <linux/sched.h>
#include <asm/desc.h>
#include <asm/fpu/api.h>
#include <asm/tlbflush.h>

#include "shim.h"

uint32_t vmm_host_cpu(void)
{
	return raw_smp_processor_id();
}

int vmm_host_run_on_cpu(uint32_t cpu, void (*fn)(void *), void *arg)
{
	return smp_call_function_single(cpu, fn, arg, 1) == 0;
}

void vmm_host_run_on_all(void (*fn)(void *), void *arg)
{
	on_each_cpu(fn, arg, 1);
}

void vmm_host_kick_cpu(uint32_t cpu)
{
	/* A reschedule interrupt has no effect but the exit that it causes. */
	smp_send_reschedule(cpu);
}

unsigned long vmm_host_irq_save(void)
{
	unsigned long flags;

	local_irq_save(flags);
	return flags;
}

void vmm_host_irq_restore(unsigned long flags)
{
	local_irq_restore(flags);
}

void vmm_host_set_vmxe(int on)
{
	if (on)
		cr4_set_bits_irqsoff(X86_CR4_VMXE);
	else
		cr4_clear_bits_irqsoff(X86_CR4_VMXE);
}

void vmm_host_guest_begin(void)
{
	/* Disables preemption as well. The registers get the guest's values
	 * next: no part of them needs to be put in order. */
	kernel_fpu_begin_mask(0);
	local_irq_disable();
}

void vmm_host_guest_end(void)
{
	/* A VM exit leaves TR's limit at 67H, short of the I/O bitmap
	 * (SDM Vol. 3C 27.5.2). */
	invalidate_tss_limit();
	local_irq_enable();
	kernel_fpu_end();
}

void vmm_host_irq_window(void)
{
	local_irq_enable();
	/* STI takes effect after the next instruction. */
	asm volatile("nop");
	local_irq_disable();
}
