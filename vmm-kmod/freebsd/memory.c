/*
 * Kernel memory, guest memory segments, copies from and to userland.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/kernel.h>
#include <sys/limits.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/mutex.h>
#include <sys/proc.h>
#include <sys/sx.h>

#include <vm/vm.h>
#include <vm/vm_param.h>
#include <vm/pmap.h>
#include <vm/vm_page.h>
#include <vm/vm_pageout.h>

#include <machine/vmparam.h>

#include "shim.h"

/* Guest memory comes in chunks of the size of a superpage. */
#define	CHUNK_PAGES	(NBPDR / PAGE_SIZE)
#define	CHUNK_ORDER	(PDRSHIFT - PAGE_SHIFT)
/* Waits for the page daemon before memory counts as exhausted. */
#define	PATIENCE	3

struct chunk {
	vm_page_t	huge;	/* the first of contiguous pages, or */
	vm_page_t	*small;	/* CHUNK_PAGES pages, each once needed */
};

struct vmm_memseg {
	struct sx	lock;
	uint64_t	len;
	uint64_t	resident;
	uint64_t	nchunks;
	struct chunk	chunks[];
};

MALLOC_DEFINE(M_VMM, "vmm", "virtual machines");

/* Wired, zeroed, contiguous and naturally aligned; belongs to no object. */
static vm_page_t
alloc_run(u_long npages, int patience)
{
	vm_page_t m;
	u_long i;

	for (;;) {
		m = vm_page_alloc_contig(NULL, 0, VM_ALLOC_NORMAL |
		    VM_ALLOC_NOOBJ | VM_ALLOC_WIRED | VM_ALLOC_ZERO, npages, 0,
		    ~(vm_paddr_t)0, npages * PAGE_SIZE, 0, VM_MEMATTR_DEFAULT);
		if (m != NULL)
			break;
		if (patience-- <= 0 || !vmm_can_sleep())
			return (NULL);
		if (npages == 1 || !vm_page_reclaim_contig(VM_ALLOC_NORMAL,
		    npages, 0, ~(vm_paddr_t)0, npages * PAGE_SIZE, 0))
			vm_wait(NULL);
	}
	for (i = 0; i < npages; i++)
		if ((m[i].flags & PG_ZERO) == 0)
			pmap_zero_page(&m[i]);
	return (m);
}

static void
free_run(vm_page_t m, u_long npages)
{

	for (; npages != 0; npages--, m++) {
		vm_page_unwire_noq(m);
		vm_page_free(m);
	}
}

void *
vmm_host_alloc_pages(unsigned int order, uint64_t *pa)
{
	vm_page_t m;

	m = alloc_run(1UL << order, PATIENCE);
	if (m == NULL)
		return (NULL);
	*pa = VM_PAGE_TO_PHYS(m);
	return ((void *)PHYS_TO_DMAP(*pa));
}

void
vmm_host_free_pages(void *va, unsigned int order)
{

	free_run(PHYS_TO_VM_PAGE(DMAP_TO_PHYS((vm_offset_t)va)), 1UL << order);
}

/* Whole pages are taken from the direct map, where the CPU is told of them. */
static bool
is_page(size_t size, size_t align)
{

	return (align == PAGE_SIZE && size <= PAGE_SIZE);
}

void *
vmm_host_alloc(size_t size, size_t align)
{
	uint64_t pa;

	if (is_page(size, align))
		return (vmm_host_alloc_pages(0, &pa));
	if (align > PAGE_SIZE)
		return (NULL);
	/* malloc(9) aligns a power of two to its size. */
	if (align > 16 && size < PAGE_SIZE) {
		size = MAX(size, align);
		if (!powerof2(size))
			size = 1UL << flsl(size);
	}
	return (malloc(size, M_VMM,
	    (vmm_can_sleep() ? M_WAITOK : M_NOWAIT) | M_ZERO));
}

void
vmm_host_free(void *p, size_t size, size_t align)
{

	if (is_page(size, align))
		vmm_host_free_pages(p, 0);
	else
		free(p, M_VMM);
}

struct vmm_memseg *
vmm_host_memseg_create(uint64_t len)
{
	struct vmm_memseg *seg;
	uint64_t nchunks;

	nchunks = howmany(len, NBPDR);
	if (len == 0 || nchunks > INT_MAX / sizeof(struct chunk))
		return (NULL);
	seg = malloc(sizeof(*seg) + nchunks * sizeof(struct chunk), M_VMM,
	    M_WAITOK | M_ZERO);
	sx_init_flags(&seg->lock, "vmm segment", SX_DUPOK);
	seg->len = len;
	seg->nchunks = nchunks;
	return (seg);
}

void
vmm_host_memseg_destroy(struct vmm_memseg *seg)
{
	struct chunk *c;
	uint64_t i;
	u_int j;

	for (i = 0; i < seg->nchunks; i++) {
		c = &seg->chunks[i];
		if (c->huge != NULL)
			free_run(c->huge, CHUNK_PAGES);
		if (c->small == NULL)
			continue;
		for (j = 0; j < CHUNK_PAGES; j++)
			if (c->small[j] != NULL)
				free_run(c->small[j], 1);
		free(c->small, M_VMM);
	}
	sx_destroy(&seg->lock);
	free(seg, M_VMM);
}

static int
chunk_fill(struct vmm_memseg *seg, struct chunk *c, u_int index, bool whole)
{

	if (c->huge != NULL || (c->small != NULL && c->small[index] != NULL))
		return (0);
	if (c->small == NULL && whole) {
		c->huge = alloc_run(CHUNK_PAGES, 0);
		if (c->huge != NULL) {
			seg->resident += NBPDR;
			return (0);
		}
	}
	if (c->small == NULL)
		c->small = malloc(CHUNK_PAGES * sizeof(*c->small), M_VMM,
		    M_WAITOK | M_ZERO);
	c->small[index] = alloc_run(1, PATIENCE);
	if (c->small[index] == NULL)
		return (ENOMEM);
	seg->resident += PAGE_SIZE;
	return (0);
}

int
vmm_host_memseg_page(struct vmm_memseg *seg, uint64_t off, uint64_t *pa,
    unsigned int *order)
{
	struct chunk *c;
	u_int index;
	int error;

	if (off >= seg->len)
		return (EFAULT);
	c = &seg->chunks[off / NBPDR];
	index = (off / PAGE_SIZE) % CHUNK_PAGES;
	sx_xlock(&seg->lock);
	error = chunk_fill(seg, c, index,
	    seg->len - rounddown2(off, NBPDR) >= NBPDR);
	if (error == 0) {
		if (c->huge != NULL) {
			*pa = VM_PAGE_TO_PHYS(c->huge) + ptoa(index);
			*order = CHUNK_ORDER;
		} else {
			*pa = VM_PAGE_TO_PHYS(c->small[index]);
			*order = 0;
		}
	}
	sx_xunlock(&seg->lock);
	return (error);
}

uint64_t
vmm_host_memseg_resident(struct vmm_memseg *seg)
{

	return (seg->resident);
}

int
vmm_host_copyin(uint64_t user, void *kernel, size_t len)
{

	return (copyin((const void *)user, kernel, len));
}

int
vmm_host_copyout(const void *kernel, uint64_t user, size_t len)
{

	return (copyout(kernel, (void *)user, len));
}
