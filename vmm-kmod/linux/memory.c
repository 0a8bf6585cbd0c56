/* Kernel memory, copies from and to userland. */
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/preempt.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/cpufeature.h>
#include <asm/fpu/api.h>

#include "shim.h"

/* Allocations up to this size never fail where the caller may sleep. */
#define SURE_SIZE 1024

/* Guest memory comes in chunks of the size of a second-level page. */
#define CHUNK_ORDER 9
#define CHUNK_SIZE (PAGE_SIZE << CHUNK_ORDER)
/* Zeroed at a time. */
#define ZERO_PIECE (256u << 10)

static gfp_t context_flags(void)
{
	return irqs_disabled() || in_atomic() ? GFP_ATOMIC : GFP_KERNEL_ACCOUNT;
}

/*
 * Pages that were allocated with these flags, unless init_on_alloc has them zeroed,
 * or other memory that was not to be zeroed by who gave it. By words:
 * where strings are fast they are as fast as the kernel's bytes, elsewhere an eighth
 * of the steps.
 */
static void zero(void *p, size_t size, gfp_t gfp)
{
	size_t words = size / 8;

	if (p == NULL || want_init_on_alloc(gfp))
		return;
	asm volatile("rep stosq" : "+D" (p), "+c" (words) : "a" (0UL) : "memory");
	memset(p, 0, size % 8);
}

void *vmm_host_alloc(size_t size, size_t align)
{
	gfp_t gfp = context_flags() | __GFP_NOWARN;
	void *p;

	if (align > PAGE_SIZE)
		return NULL;
	/* A slab that is poisoned has nothing zeroed by init_on_alloc, only by this. */
	if (want_init_on_alloc(gfp))
		gfp |= __GFP_ZERO;
	/* kmalloc aligns a power of two to its size. */
	if (align > ARCH_KMALLOC_MINALIGN)
		size = roundup_pow_of_two(max(size, align));
	if (!(gfp & __GFP_DIRECT_RECLAIM))
		p = kmalloc(size, gfp);
	/* A memory control group's limit would make it NULL. */
	else if (size <= SURE_SIZE)
		p = kmalloc(size, gfp | __GFP_NOFAIL);
	else
		p = kvmalloc(size, gfp);
	zero(p, size, gfp);
	return p;
}

/* Zeroes from p up to end, in stores of a register's width, 32 at a time. */
#define ZERO_BY(p, end, reg, width)					\
	asm volatile(							\
	    "vpxor %%xmm0, %%xmm0, %%xmm0\n"				\
	    "1:\n"							\
	    ".Lzero_at = 0\n"						\
	    ".rept 32\n"						\
	    "vmovntdq %%" reg ", .Lzero_at(%0)\n"			\
	    ".Lzero_at = .Lzero_at + " width "\n"			\
	    ".endr\n"							\
	    "add $32 * " width ", %0\n"					\
	    "cmp %1, %0\n"						\
	    "jne 1b\n"							\
	    "sfence\n"							\
	    "vzeroupper"						\
	    : "+r" (p) : "r" (end) : "memory", "cc")

/*
 * Zeroes a chunk past the caches, which it would only empty. clear_page() works
 * on 4 KiB, in 8-byte stores where the CPU has no fast strings.
 */
static void chunk_zero(char *p)
{
	char *end = p + CHUNK_SIZE;

	/* With init_on_alloc the allocator has done it. */
	if (want_init_on_alloc(0))
		return;
	if (!boot_cpu_has(X86_FEATURE_AVX)) {
		for (; p != end; p += PAGE_SIZE)
			clear_page(p);
		return;
	}
	while (p != end) {
		/* Preemption is off within a piece. */
		char *piece = p + ZERO_PIECE;

		kernel_fpu_begin();
		if (boot_cpu_has(X86_FEATURE_AVX512F))
			ZERO_BY(p, piece, "zmm0", "64");
		else
			ZERO_BY(p, piece, "ymm0", "32");
		kernel_fpu_end();
		cond_resched();
	}
}

void *vmm_host_alloc_pages(unsigned int order, uint64_t *pa)
{
	gfp_t gfp = context_flags() | __GFP_NOWARN;
	void *va;

	/* Guest memory, parts of which userland maps; it can do with less. */
	if (order == CHUNK_ORDER)
		gfp |= __GFP_COMP | __GFP_NORETRY;
	va = (void *)__get_free_pages(gfp, order);
	if (va == NULL)
		return NULL;
	if (order == CHUNK_ORDER)
		chunk_zero(va);
	else
		zero(va, PAGE_SIZE << order, gfp);
	*pa = __pa(va);
	return va;
}

int vmm_host_map_page(void *fault, uint64_t pa)
{
	struct vm_fault *vmf = fault;
	int error;

	error = vm_insert_page(vmf->vma, vmf->address,
	    pfn_to_page(PHYS_PFN(pa)));
	/* Another thread was faster. */
	return error == -EBUSY ? 0 : -error;
}

int vmm_host_copyin(uint64_t user, void *kernel, size_t len)
{
	return copy_from_user(kernel, (const void __user *)user, len) != 0 ?
	    EFAULT : 0;
}

int vmm_host_copyout(const void *kernel, uint64_t user, size_t len)
{
	return copy_to_user((void __user *)user, kernel, len) != 0 ? EFAULT : 0;
}
