/* Module load and unload, CPU hotplug, log. */
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/printk.h>
#include <linux/ratelimit.h>
#include <linux/slab.h>
#include <linux/syscore_ops.h>
#include <linux/thread_info.h>
#include <asm/cpufeature.h>
#include <asm/tsc.h>

#include "shim.h"

#ifdef CONFIG_X86_KERNEL_IBT
/*
 * objtool takes an ENDBR that no relocation leads to for one that nobody needs, and
 * has the kernel erase it when the module is loaded. The Rust half's own addresses
 * are relative, without relocations. Where such marks are already, objtool makes none:
 * this is one, for a function that nobody calls.
 */
asm(".pushsection .text\n"
    ".type vmm_nobody, @function\n"
    "vmm_nobody:\n"
    "\tendbr64\n"
    "1:\tjmp 1b\n"
    ".size vmm_nobody, . - vmm_nobody\n"
    ".popsection\n"
    ".pushsection .ibt_endbr_seal, \"a\"\n"
    "\t.long vmm_nobody - .\n"
    ".popsection");
#endif

static int hotplug_state = -1;

/* FreeBSD: hw.vmm.vmx.use_apic_vid. */
static bool use_apic_vid = true;
module_param(use_apic_vid, bool, 0444);
MODULE_PARM_DESC(use_apic_vid,
    "use virtual-interrupt delivery where the CPU has it (Bochs 2.7 interrupts guests with IF=0 when it is used)");

/* FreeBSD: hw.vmm.vmx.use_apic_pir. */
static bool use_apic_pir = true;
module_param(use_apic_pir, bool, 0444);
MODULE_PARM_DESC(use_apic_pir,
    "post interrupts to running vCPUs, with use_apic_vid");

/* KVM's name. FreeBSD: vm.pmap.allow_2m_x_ept=0. */
static int nx_huge_pages = -1;
module_param(nx_huge_pages, int, 0444);
MODULE_PARM_DESC(nx_huge_pages,
    "no executable large EPT pages: 1, 0; -1: where the CPU has the iTLB multihit erratum");

/* As KVM's avic: -1 is on from Zen 4 on. */
static int use_avic;
module_param(use_avic, int, 0444);
MODULE_PARM_DESC(use_avic,
    "use AMD's AVIC where the CPU has it: 0, 1, or -1 for Zen 4 and later");

static bool account;
module_param(account, bool, 0444);
MODULE_PARM_DESC(account,
    "count the time spent in guests (statistic \"vcpu total runtime\", TSC ticks)");

/* As long as KVM's halt_poll_ns. */
static uint halt_poll_us = 200;
module_param(halt_poll_us, uint, 0444);
MODULE_PARM_DESC(halt_poll_us,
    "microseconds for which a vCPU in HLT stays awake when its waits are short and its CPU has no other work; 0: none");

static int cpu_up(unsigned int cpu)
{
	return -vmm_rust_cpu_online();
}

static int cpu_down(unsigned int cpu)
{
	vmm_rust_cpu_offline();
	return 0;
}

/*
 * Sleep (S3, S4) takes all CPUs but one down, then calls these on that one,
 * interrupts off, all of userland frozen.
 */
static int vmm_suspend(void)
{
	vmm_rust_suspend();
	vmm_rust_cpu_offline();
	return 0;
}

static void vmm_resume(void)
{
	vmm_rust_resume();
	/* It worked before; if it does not now, no vCPU runs here. */
	(void)vmm_rust_cpu_online();
}

static struct syscore_ops sleep_ops = {
	.suspend = vmm_suspend,
	.resume = vmm_resume,
};

static int __init vmm_init(void)
{
	struct vmm_host_info info = {
		.tsc_hz = (uint64_t)tsc_khz * 1000,
		.direct_map = PAGE_OFFSET,
		.thread_flags = _TIF_NEED_RESCHED | _TIF_SIGPENDING |
		    _TIF_NOTIFY_SIGNAL | _TIF_NOTIFY_RESUME,
		.max_cpus = nr_cpu_ids,
		.tsc_invariant = boot_cpu_has(X86_FEATURE_CONSTANT_TSC) &&
		    boot_cpu_has(X86_FEATURE_NONSTOP_TSC),
		.account = account,
		.use_apic_vid = use_apic_vid,
		.use_avic = use_avic < 0 ? 2 : use_avic != 0,
		.halt_poll_us = halt_poll_us,
#ifdef VMM_POSTED_VECTOR
		.posted_vector = use_apic_pir ? VMM_POSTED_VECTOR : 0,
#endif
		.nx_huge_pages = nx_huge_pages >= 0 ? nx_huge_pages != 0 :
		    cpu_mitigations_off() ? 0 : 2,
		.events = 1,
		.run_by_seek = 1,
		.fill_rsb = boot_cpu_has(X86_FEATURE_RSB_VMEXIT) ||
		    boot_cpu_has(X86_FEATURE_RSB_VMEXIT_LITE),
		/* What this kernel does not trust, guests should not either. */
		.xsave_forms = (boot_cpu_has(X86_FEATURE_XSAVEOPT) ? 1 : 0) |
		    (boot_cpu_has(X86_FEATURE_XSAVEC) ? 2 : 0) |
		    (boot_cpu_has(X86_FEATURE_XGETBV1) ? 4 : 0) |
		    (boot_cpu_has(X86_FEATURE_XSAVES) ? 8 : 0),
	};
	int error;

	error = vmm_rust_init(&info);
	if (error != 0)
		return -error;
	error = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "x86/vmm:online",
	    cpu_up, cpu_down);
	if (error < 0)
		goto fail;
	hotplug_state = error;
	register_syscore_ops(&sleep_ops);
	error = pci_register_driver(&vmm_ppt_driver);
	if (error == 0) {
		error = vmm_device_init();
		if (error == 0)
			return 0;
		pci_unregister_driver(&vmm_ppt_driver);
	}
	unregister_syscore_ops(&sleep_ops);
	cpuhp_remove_state(hotplug_state);
fail:
	vmm_rust_exit();
	return error;
}

static void __exit vmm_exit(void)
{
	pci_unregister_driver(&vmm_ppt_driver);
	vmm_device_exit();
	unregister_syscore_ops(&sleep_ops);
	cpuhp_remove_state(hotplug_state);
	vmm_rust_exit();
}

#define VMM_LOG_LIMIT \
	RATELIMIT_STATE_INIT(vmm_log_limit, DEFAULT_RATELIMIT_INTERVAL, \
			     DEFAULT_RATELIMIT_BURST)

/* Each severity has a limit of its own: what repeats hides nothing worse. */
void vmm_host_log(int level, const char *msg, size_t len)
{
	static struct ratelimit_state limits[] = {
		VMM_LOG_LIMIT, VMM_LOG_LIMIT, VMM_LOG_LIMIT,
	};
	static const char severities[][sizeof(KERN_ERR)] = {
		KERN_ERR, KERN_WARNING, KERN_INFO,
	};

	if (level < 0 || level >= ARRAY_SIZE(limits))
		level = ARRAY_SIZE(limits) - 1;
	if (__ratelimit(&limits[level]))
		printk("%svmm: %.*s\n", severities[level], (int)len, msg);
}

module_init(vmm_init);
module_exit(vmm_exit);
MODULE_DESCRIPTION("FreeBSD's vmm interface on Linux, in Rust");
MODULE_AUTHOR("the bhyve-rs authors");
MODULE_LICENSE("Dual BSD/GPL");
