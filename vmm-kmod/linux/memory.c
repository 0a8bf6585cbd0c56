/* Kernel memory, guest memory segments, copies from and to userland. */
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/mutex.h>
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
#define CHUNK_PAGES (1u << CHUNK_ORDER)
/* Zeroed at a time. */
#define ZERO_PIECE (256u << 10)

struct chunk {
	struct page *huge;    /* one compound page, or */
	struct page **small;  /* CHUNK_PAGES single pages, each once needed */
};

struct vmm_memseg {
	struct mutex lock;
	uint64_t len;
	uint64_t resident;
	unsigned long nchunks;
	struct chunk chunks[];
};

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

void *vmm_host_alloc_pages(unsigned int order, uint64_t *pa)
{
	gfp_t gfp = context_flags() | __GFP_NOWARN;
	void *va = (void *)__get_free_pages(gfp, order);

	if (va == NULL)
		return NULL;
	zero(va, PAGE_SIZE << order, gfp);
	*pa = __pa(va);
	return va;
}

struct vmm_memseg *vmm_host_memseg_create(uint64_t len)
{
	uint64_t nchunks = DIV_ROUND_UP_ULL(len, CHUNK_SIZE);
	struct vmm_memseg *seg;

	if (len == 0 || nchunks > INT_MAX / 2 / sizeof(struct chunk))
		return NULL;
	seg = kvzalloc(struct_size(seg, chunks, nchunks), GFP_KERNEL_ACCOUNT);
	if (seg == NULL)
		return NULL;
	mutex_init(&seg->lock);
	seg->len = len;
	seg->nchunks = nchunks;
	return seg;
}

void vmm_host_memseg_destroy(struct vmm_memseg *seg)
{
	unsigned long i;
	unsigned int j;

	for (i = 0; i < seg->nchunks; i++) {
		struct chunk *c = &seg->chunks[i];

		if (c->huge != NULL)
			__free_pages(c->huge, CHUNK_ORDER);
		if (c->small != NULL) {
			for (j = 0; j < CHUNK_PAGES; j++)
				if (c->small[j] != NULL)
					put_page(c->small[j]);
			kvfree(c->small);
		}
		cond_resched();
	}
	kvfree(seg);
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

static int chunk_fill(struct vmm_memseg *seg, struct chunk *c,
    unsigned int index, bool whole)
{
	const gfp_t gfp = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;

	if (c->huge != NULL || (c->small != NULL && c->small[index] != NULL))
		return 0;
	if (c->small == NULL && whole) {
		c->huge = alloc_pages(gfp | __GFP_COMP | __GFP_NORETRY,
		    CHUNK_ORDER);
		if (c->huge != NULL) {
			chunk_zero(page_address(c->huge));
			seg->resident += CHUNK_SIZE;
			return 0;
		}
	}
	if (c->small == NULL) {
		c->small = kvcalloc(CHUNK_PAGES, sizeof(*c->small),
		    GFP_KERNEL_ACCOUNT);
		if (c->small == NULL)
			return ENOMEM;
	}
	c->small[index] = alloc_page(gfp);
	if (c->small[index] == NULL)
		return ENOMEM;
	zero(page_address(c->small[index]), PAGE_SIZE, gfp);
	seg->resident += PAGE_SIZE;
	return 0;
}

int vmm_host_memseg_page(struct vmm_memseg *seg, uint64_t off, uint64_t *pa,
    unsigned int *order)
{
	unsigned int index = (off / PAGE_SIZE) % CHUNK_PAGES;
	uint64_t start = round_down(off, CHUNK_SIZE);
	struct chunk *c;
	int error;

	if (off >= seg->len)
		return EFAULT;
	c = &seg->chunks[off / CHUNK_SIZE];
	mutex_lock(&seg->lock);
	error = chunk_fill(seg, c, index, seg->len - start >= CHUNK_SIZE);
	if (error == 0) {
		if (c->huge != NULL) {
			*pa = page_to_phys(c->huge) + index * PAGE_SIZE;
			*order = CHUNK_ORDER;
		} else {
			*pa = page_to_phys(c->small[index]);
			*order = 0;
		}
	}
	mutex_unlock(&seg->lock);
	return error;
}

void *vmm_host_memseg_detach(struct vmm_memseg *seg, uint64_t off,
    unsigned int *order)
{
	struct chunk *c = &seg->chunks[off / CHUNK_SIZE];
	struct page **slot = &c->huge, *page;

	mutex_lock(&seg->lock);
	if (c->small != NULL)
		slot = &c->small[(off / PAGE_SIZE) % CHUNK_PAGES];
	*order = c->small == NULL ? CHUNK_ORDER : 0;
	page = *slot;
	*slot = NULL;
	if (page != NULL)
		seg->resident -= PAGE_SIZE << *order;
	mutex_unlock(&seg->lock);
	return page != NULL ? page_address(page) : NULL;
}

void vmm_host_page_hold(uint64_t pa)
{
	get_page(pfn_to_page(PHYS_PFN(pa)));
}

uint64_t vmm_host_memseg_resident(struct vmm_memseg *seg)
{
	return READ_ONCE(seg->resident);
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
