/* CPUs: cross calls, kicks, and the window in which a guest runs. */
#include <linux/irqflags.h>
#include <linux/preempt.h>
#include <linux/bottom_half.h>
#include <linux/interrupt.h>
#include <linux/smp.h>
#include <linux/sched.h>
#include <linux/version.h>
#include <asm/apic.h>
#include <asm/desc.h>
#include <asm/fpu/api.h>
#include <asm/tlbflush.h>

#include "shim.h"

/*
 * The thunks through which the Rust half returns and calls by pointer, if it was built
 * for kernels that have them, on one that does not. Such a kernel's own code is no better.
 */
#if !defined(CONFIG_RETHUNK) && !defined(CONFIG_MITIGATION_RETHUNK)
asm(".pushsection .text\n"
    ".globl __x86_return_thunk\n"
    ".type __x86_return_thunk, @function\n"
    "__x86_return_thunk: ret\n"
    "int3\n"
    ".size __x86_return_thunk, . - __x86_return_thunk\n"
    ".popsection");
#endif
#if !defined(CONFIG_RETPOLINE) && !defined(CONFIG_MITIGATION_RETPOLINE)
asm(".pushsection .text\n"
    ".globl __x86_indirect_thunk_r11\n"
    ".type __x86_indirect_thunk_r11, @function\n"
    "__x86_indirect_thunk_r11: jmp *%r11\n"
    "int3\n"
    ".size __x86_indirect_thunk_r11, . - __x86_indirect_thunk_r11\n"
    ".popsection");
#endif

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
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	/* Without the tracepoint that smp_send_reschedule() has since. */
	arch_smp_send_reschedule(cpu);
#else
	smp_send_reschedule(cpu);
#endif
}

void vmm_host_notify_cpu(uint32_t cpu)
{
#ifdef VMM_POSTED_VECTOR
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
	apic->send_IPI_mask(cpumask_of(cpu), VMM_POSTED_VECTOR);
#else
	__apic_send_IPI_mask(cpumask_of(cpu), VMM_POSTED_VECTOR);
#endif
#endif
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

/*
 * Nobody but this thread uses the FPU between two stays with interrupts off if
 * softirqs are off as well: that is fpregs_lock(), which irq_fpu_usable() respects
 * in hard interrupts from 5.19 on, but with PREEMPT_RT.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 19, 0) && !defined(CONFIG_PREEMPT_RT)
#define FPU_BY_CALLER 1
#else
#define FPU_BY_CALLER 0
#endif

int vmm_host_guest_begin(void)
{
	local_irq_disable();
	/* The registers are this thread's own: the caller switches them. */
	if (FPU_BY_CALLER && likely(!test_thread_flag(TIF_NEED_FPU_LOAD)))
		return 1;
	/* They are nobody's, but the kernel may believe that they still hold what
	 * some thread saved: it has to be told. Disables preemption as well. No
	 * part of them needs to be put in order. */
	local_irq_enable();
	kernel_fpu_begin_mask(0);
	local_irq_disable();
	return 0;
}

/* Out of the way of guest_end, which every exit to userland goes through. */
static noinline void reload_tss(void)
{
	invalidate_tss_limit();
}

static noinline void run_softirqs(void)
{
	local_bh_disable();
	local_bh_enable();
}

void vmm_host_guest_end(int fpu_live)
{
	bool softirqs;

	/* A VM exit leaves TR's limit at 67H, short of the I/O bitmap
	 * (SDM Vol. 3C 27.5.2). */
	this_cpu_write(__tss_limit_invalid, true);
	if (unlikely(test_thread_flag(TIF_IO_BITMAP)))
		reload_tss();
	/* Those that irq_window left; what comes later is run by who brings it. */
	softirqs = FPU_BY_CALLER && local_softirq_pending() != 0;
	local_irq_enable();
	if (unlikely(!fpu_live))
		kernel_fpu_end();
	if (unlikely(softirqs))
		run_softirqs();
}

int vmm_host_irq_window(unsigned int vector)
{
#if FPU_BY_CALLER
	/* No preemption, and no softirqs, which may use the FPU. */
	local_bh_disable();
#endif
	if (vector != 0)
		vmm_rust_interrupt(vector);
	local_irq_enable();
	/* STI takes effect after the next instruction. */
	asm volatile("nop");
	local_irq_disable();
#if FPU_BY_CALLER
	/* Does not run them. */
	_local_bh_enable();
	return local_softirq_pending() != 0;
#else
	return 0;
#endif
}
