/*
 * The boundary between the Rust of vmm-kmod and the C shim of a host kernel.
 *
 * A host implements every vmm_host_* function, other than those for which its
 * kernel has one that does the same (src/ffi.rs names it), and calls the
 * vmm_rust_* ones.
 * All types are plain; errors are positive errno values of the host. Unless
 * said otherwise a function may be called from process context only.
 */
#ifndef VMM_HOST_H
#define VMM_HOST_H

#ifdef __linux__
#include <linux/types.h>
#else
#include <sys/types.h>
#endif

/* What the host tells once, at load. */
struct vmm_host_info {
	uint64_t tsc_hz;          /* TSC frequency, Hz; 0 = unusable */
	uint64_t direct_map;      /* virtual address of physical address 0 */
	uint64_t thread_flags;    /* bits of *vmm_host_thread_flags() that end the inner loop */
	uint32_t max_cpus;        /* CPU slots */
	uint32_t tsc_invariant;   /* the TSC never stops nor changes its rate */
	uint32_t account;         /* count the TSC ticks that vCPUs spend in the guest */
	uint32_t use_apic_vid;    /* virtual-interrupt delivery, where the CPU has it */
	uint32_t xsave_forms;     /* bits of CPUID.0DH.1:EAX; guests see no other */
	uint32_t fill_rsb;        /* fill the return-stack buffer after VM exits */
	uint32_t thread_tss;      /* threads may have a TSS of their own */
	uint32_t events;          /* vmm_host_event_get() is of use */
	uint32_t run_by_seek;     /* lseek() of a VM's node calls vmm_rust_vm_run() */
	uint32_t no_halt_detection; /* all CPUs in HLT, interrupts off, is no end */
	uint32_t halt_poll_us;    /* microseconds for which HLT is waited out awake */
	uint32_t posted_vector;   /* of vmm_host_notify_cpu(); 0: there is none */
	uint32_t nx_huge_pages;   /* large EPT pages not executable: 0, 1, or 2: as the CPU needs */
	uint32_t use_avic;        /* AMD's AVIC, where the CPU has it: 0, 1, 2 = as the CPU is */
};

/* ---- memory --------------------------------------------------------- */
/* Zeroed, NULL when out of memory. May sleep when the context allows it, and
 * then does not fail for up to 1 KiB. */
void *vmm_host_alloc(size_t size, size_t align);
void vmm_host_free(void *p, size_t size, size_t align);
/* 1 << order zeroed contiguous pages; virtual address, physical in *pa. */
void *vmm_host_alloc_pages(unsigned int order, uint64_t *pa);
void vmm_host_free_pages(void *va, unsigned int order);

/*
 * FreeBSD's guest memory: a segment's pages are allocated at first use, in the largest
 * pieces the host gives. page() returns the physical address of the 4 KiB
 * page at off and, in *order, that of the naturally aligned run of contiguous
 * pages around it (segment offset and physical address equally aligned).
 */
struct vmm_memseg;
struct vmm_memseg *vmm_host_memseg_create(uint64_t len);
void vmm_host_memseg_destroy(struct vmm_memseg *seg);
int vmm_host_memseg_page(struct vmm_memseg *seg, uint64_t off, uint64_t *pa,
    unsigned int *order);
/* Bytes allocated so far. */
uint64_t vmm_host_memseg_resident(struct vmm_memseg *seg);
/*
 * Takes the memory in [off, off+len) (whole pages, inside) out of the segment and
 * of the calling process's page tables, puts it before *pages and adds it to *bytes;
 * free() gives all of them back, once no guest has them any more. EBUSY, and nothing
 * went: others may have it mapped, or it is wired there.
 */
struct vmm_pages;
int vmm_host_memseg_detach(struct vmm_memseg *seg, uint64_t off, uint64_t len,
    struct vmm_pages **pages, uint64_t *bytes);
void vmm_host_pages_free(struct vmm_pages *pages);

/* Linux: maps a page for userland, where fault (struct vm_fault) says. */
int vmm_host_map_page(void *fault, uint64_t pa);
/* Linux: takes a range of the VM's memory out of every process that has it mapped. */
void vmm_host_unmap(void *vm, int64_t from, int64_t len);

int vmm_host_copyin(uint64_t user, void *kernel, size_t len);
int vmm_host_copyout(const void *kernel, uint64_t user, size_t len);

/* ---- CPUs ------------------------------------------------------------ */
uint32_t vmm_host_cpu(void);
/* fn(arg) on that CPU, or on all, interrupts off; waits. False: offline. */
int vmm_host_run_on_cpu(uint32_t cpu, void (*fn)(void *), void *arg);
void vmm_host_run_on_all(void (*fn)(void *), void *arg);
/* Makes that CPU leave guest mode. Any context. */
void vmm_host_kick_cpu(uint32_t cpu);
/* Interrupts it by the vector of posted interrupts, whose handler does nothing. */
void vmm_host_notify_cpu(uint32_t cpu);
/* Sets or clears CR4.VMXE of this CPU, in the kernel's own books as well;
 * interrupts are off. */
void vmm_host_set_vmxe(int on);
/* Any context. */
unsigned long vmm_host_irq_save(void);
void vmm_host_irq_restore(unsigned long flags);

/*
 * guest_begin: interrupts off. 0: the host's FPU state is saved. Else the FPU
 * registers hold the calling thread's, and are to hold it again at guest_end, which
 * undoes guest_begin and is told what it said. irq_window: takes pending interrupts
 * between two VM entries, no preemption and no other use of the FPU; non-zero: the
 * host has more to do, after guest_end. With a vector it first calls
 * vmm_rust_interrupt() for that.
 */
int vmm_host_guest_begin(void);
void vmm_host_guest_end(int fpu_live);
int vmm_host_irq_window(unsigned int vector);

/* ---- threads, time ---------------------------------------------------- */
/* Flags of the calling thread, volatile; see vmm_host_info.thread_flags. */
const volatile unsigned long *vmm_host_thread_flags(void);
/* Gives way to other threads; non-zero when this one has to return to
 * userland: a signal waits, or other work that is done there. */
int vmm_host_yield(void);
/* Lets another thread that wants this CPU have it, though nobody asks for it. */
void vmm_host_give_way(void);
/* Whether no other thread wants this CPU. */
bool vmm_host_alone(void);
struct vmm_mutex;
struct vmm_mutex *vmm_host_mutex_create(void);
void vmm_host_mutex_destroy(struct vmm_mutex *m);
void vmm_host_mutex_lock(struct vmm_mutex *m);
/* These two also with interrupts off; never in an interrupt itself. */
int vmm_host_mutex_trylock(struct vmm_mutex *m);
void vmm_host_mutex_unlock(struct vmm_mutex *m);

/* A place for one thread to sleep; wake() works from any context. */
struct vmm_sleeper;
struct vmm_sleeper *vmm_host_sleeper_create(void);
void vmm_host_sleeper_destroy(struct vmm_sleeper *s);
/* Call before looking for a reason not to sleep. */
void vmm_host_sleep_prepare(struct vmm_sleeper *s);
/* Until woken since prepare(), ns have passed (UINT64_MAX: never), or a
 * signal; non-zero for a signal. */
int vmm_host_sleep(struct vmm_sleeper *s, uint64_t ns);
void vmm_host_wake(struct vmm_sleeper *s);

/* An event that userland waits for by a descriptor. Linux: an eventfd; get() says
 * NULL if fd is none, signal() works from any context. FreeBSD: a kqueue's event
 * EVFILT_USER 0; there is nothing to put, and signal() may sleep and fail. */
struct vmm_event;
struct vmm_event *vmm_host_event_get(int fd);
#ifdef __linux__
void vmm_host_event_put(struct vmm_event *e);
void vmm_host_event_signal(struct vmm_event *e);
#else
int vmm_host_event_signal(struct vmm_event *e);
#endif

/* A one-shot timer that calls vmm_rust_timer(arg) in interrupt context. */
struct vmm_timer;
struct vmm_timer *vmm_host_timer_create(void *arg);
/* Cancels and waits for a running callback. */
void vmm_host_timer_destroy(struct vmm_timer *t);
/* (Re)arms; any context. */
void vmm_host_timer_arm(struct vmm_timer *t, uint64_t ns);
void vmm_host_timer_disarm(struct vmm_timer *t);

/* Seconds since 1970-01-01 UTC. */
int64_t vmm_host_wallclock(void);

/* ---- device nodes and log --------------------------------------------- */
/* /dev/vmm/NAME for a VM; /dev/vmm.io/NAME.SEG with segid >= 0. */
struct vmm_node;
int vmm_host_node_create(const char *name, void *vm, int segid,
    struct vmm_node **node);
/* No open() that starts later finds the VM. */
void vmm_host_node_destroy(struct vmm_node *node);
/* level: 0 error, 1 warning, 2 info. Any context. */
void vmm_host_log(int level, const char *msg, size_t len);

/* ---- what the Rust side offers ---------------------------------------- */
int vmm_rust_init(const struct vmm_host_info *info);
void vmm_rust_exit(void);
/* On the CPU itself. */
int vmm_rust_cpu_online(void);
void vmm_rust_cpu_offline(void);
/* Linux: the host is about to sleep; and it has slept. On one CPU, interrupts off,
 * the others halted. */
void vmm_rust_suspend(void);
void vmm_rust_resume(void);
void vmm_rust_timer(void *arg);
/* Has the host's handler of an acknowledged interrupt run; interrupts off. */
void vmm_rust_interrupt(unsigned int vector);
/* A reference for an open file. */
void vmm_rust_vm_get(void *vm);
void vmm_rust_vm_put(void *vm);
/* data: the request's structure, copied in; copied out again if the request
 * says so and the result is 0. */
int vmm_rust_ctl_ioctl(uint32_t cmd, void *data, size_t len);
int vmm_rust_vm_ioctl(void *vm, uint32_t cmd, void *data, size_t len);
/* Linux: both, vm NULL for the first; the structure is at user. */
int vmm_rust_ioctl(void *vm, uint32_t cmd, uint64_t user);
/* The request that has to be fast, as a call of its own: runs a vCPU. Its
 * argument is passed by value; vmm_rust_vm_ioctl() takes it as well. */
#define VMM_REQ_RUN 0x200476c3u
int vmm_rust_vm_run(void *vm, uint32_t arg);
/* The guest page at gpa (segid < 0) or at an offset of a segment. */
int vmm_rust_vm_page(void *vm, int segid, uint64_t off, uint64_t *pa);
/* Linux: has it mapped by vmm_host_map_page(). */
int vmm_rust_vm_fault(void *vm, int segid, uint64_t off, void *fault);
/* Whether [off, off+len) can be mapped. */
int vmm_rust_vm_mmap_ok(void *vm, int segid, uint64_t off, uint64_t len);

/* The host has put a PCI function into ppt's hands: its device, as the host's
 * bus knows it (device) and as its driver model does (generic), its BARs
 * (resources, each stride bytes) and its requester ID. Or takes it back. */
int vmm_rust_ppt_add(void *device, void *generic, const void *resources,
    size_t stride, unsigned int rid);
void vmm_rust_ppt_remove(void *device);
/* Whether a tunable names the function, and whether a VM has it. */
int vmm_rust_ppt_wanted(unsigned int rid);
int vmm_rust_ppt_busy(void *device);
/* Linux: the host is about to sleep; the function does no DMA from here on. 0. */
int vmm_rust_ppt_suspend(void *device);
/* The host has slept; the function and the ports above have their configuration
 * again, as far as the host knows it. 0. */
int vmm_rust_ppt_resume(void *device);
/* FreeBSD: what VT-x has, 0 or 1, as src/capabilities.rs numbers it. */
extern int vmm_rust_capabilities[8];

/* From this offset on a VM's node has pages that are no guest memory; they are
 * mapped by vmm_rust_vm_mmap_ok and vmm_rust_vm_page. */
#define VMM_EXT_PAGES	(1ULL << 52)
/* Offsets from there that tell a run page and flags, and what vmm_rust_vm_run()
 * takes for them. */
#define VMM_RUN_OFFSETS	0xffffff0ffULL
#define VMM_RUN_ARG(at)	((uint32_t)((at) >> 12 | (at) << 24))
/* The one segment behind [off, off+len), and where in it that starts; it lives
 * as long as the VM. For a host that maps segments as a whole. */
int vmm_rust_vm_segment(void *vm, int segid, uint64_t off, uint64_t len,
    struct vmm_memseg **seg, uint64_t *seg_off);

#endif
