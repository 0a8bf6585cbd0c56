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
#include <sys/rwlock.h>

#include <vm/vm.h>
#include <vm/vm_param.h>
#include <vm/pmap.h>
#include <vm/vm_map.h>
#include <vm/vm_object.h>
#include <vm/vm_page.h>
#include <vm/vm_pageout.h>
#include <vm/vm_pager.h>
#include <vm/vm_radix.h>

#include <machine/vmparam.h>

#include "shim.h"

/* Guest memory is allocated by the superpage where that can be had. */
#define	CHUNK_PAGES	(NBPDR / PAGE_SIZE)
#define	CHUNK_ORDER	(PDRSHIFT - PAGE_SHIFT)
/* Waits for the page daemon before memory counts as exhausted. */
#define	PATIENCE	3

/*
 * A segment is a "phys" object: its pages are never paged out, userland maps
 * it as such, and a page fault there fills and maps whole superpages. Pages
 * that the guest has been given are wired as well, as those of the kernel are.
 */
struct vmm_memseg {
	vm_object_t	object;
	uint64_t	len;
	u_long		wired[];	/* a bit for each page; object lock */
};

MALLOC_DEFINE(M_VMM, "vmm", "virtual machines");

/*
 * Zeroes contiguous pages in one go. By words: with fast strings that is as
 * good as by bytes, and without them (or in an emulator) eight times better.
 */
static void
zero_run(vm_page_t m, u_long npages)
{
	void *p = (void *)PHYS_TO_DMAP(VM_PAGE_TO_PHYS(m));
	u_long words = npages * PAGE_SIZE / 8;

	__asm __volatile("rep; stosq" : "+D" (p), "+c" (words) : "a" (0) :
	    "memory");
}

/* Wired, zeroed, contiguous and naturally aligned; belongs to no object. */
static vm_page_t
alloc_run(u_long npages, int patience)
{
	vm_page_t m;

	for (;;) {
		m = VMM_ALLOC_RUN(npages);
		if (m != NULL)
			break;
		if (patience-- <= 0 || !vmm_can_sleep())
			return (NULL);
		if (npages == 1 || !vm_page_reclaim_contig(VM_ALLOC_NORMAL,
		    npages, 0, ~(vm_paddr_t)0, npages * PAGE_SIZE, 0))
			vm_wait(NULL);
	}
	zero_run(m, npages);
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

struct vmm_memseg *
vmm_host_memseg_create(uint64_t len)
{
	struct vmm_memseg *seg;
	uint64_t npages;

	npages = howmany(len, PAGE_SIZE);
	if (len == 0 || npages > INT_MAX)
		return (NULL);
	seg = malloc(sizeof(*seg) + howmany(npages, 64) * sizeof(u_long), M_VMM,
	    M_WAITOK | M_ZERO);
	seg->len = len;
	seg->object = vm_pager_allocate(OBJT_PHYS, NULL, len, VM_PROT_DEFAULT,
	    0, NULL);
	if (seg->object == NULL) {
		free(seg, M_VMM);
		return (NULL);
	}
	/* Pages come from reservations, which are superpages. */
	VM_OBJECT_WLOCK(seg->object);
	vm_object_color(seg->object, 0);
	VM_OBJECT_WUNLOCK(seg->object);
	return (seg);
}

/* The memory goes with the last mapping. */
void
vmm_host_memseg_destroy(struct vmm_memseg *seg)
{
	vm_object_t object = seg->object;
	uint64_t i;
	u_long word;
	u_int bit;

	VM_OBJECT_WLOCK(object);
	for (i = 0; i < howmany(howmany(seg->len, PAGE_SIZE), 64); i++) {
		for (word = seg->wired[i]; word != 0; word &= word - 1) {
			bit = ffsl(word) - 1;
			vm_page_unwire_noq(vm_page_lookup(object, i * 64 + bit));
		}
	}
	VM_OBJECT_WUNLOCK(object);
	vm_object_deallocate(object);
	free(seg, M_VMM);
}

/* A page of an object, just allocated and zeroed, may be used. */
static void
page_ready(vm_page_t m)
{

#if __FreeBSD_version >= 1300000
	vm_page_valid(m);
#else
	m->valid = VM_PAGE_BITS_ALL;
#endif
	vm_page_xunbusy(m);
}

/*
 * The page at index, zeroed and wired. Userland may have brought it in before.
 * NULL: no memory.
 */
static vm_page_t
page_take(struct vmm_memseg *seg, vm_pindex_t index)
{
	vm_page_t m;
	u_long bit = 1UL << (index % 64);

	m = vm_page_lookup(seg->object, index);
	if (m == NULL) {
		m = vm_page_alloc(seg->object, index, VM_ALLOC_NORMAL |
		    VM_ALLOC_WIRED | VM_ALLOC_ZERO);
		if (m == NULL)
			return (NULL);
		if ((m->flags & PG_ZERO) == 0)
			zero_run(m, 1);
		page_ready(m);
	} else if ((seg->wired[index / 64] & bit) == 0) {
#if __FreeBSD_version < 1300000
		vm_page_lock(m);
		vm_page_wire(m);
		vm_page_unlock(m);
#else
		vm_page_wire(m);
#endif
	} else {
		return (m);
	}
	seg->wired[index / 64] |= bit;
	return (m);
}

/* The first page of an object from index on; the object is locked. */
static vm_page_t
page_from(vm_object_t object, vm_pindex_t index)
{

#if __FreeBSD_version >= 1500000
	struct pctrie_iter pages;

	vm_page_iter_init(&pages, object);
	return (vm_radix_iter_lookup_ge(&pages, index));
#else
	return (vm_page_find_least(object, index));
#endif
}

/* The chunk that starts at index, if none of it is there: all in one piece. */
static bool
chunk_take(struct vmm_memseg *seg, vm_pindex_t first)
{
	vm_page_t m;
	u_int i;

	m = page_from(seg->object, first);
	if (m != NULL && m->pindex < first + CHUNK_PAGES)
		return (false);
	m = vm_page_alloc_contig(seg->object, first, VM_ALLOC_NORMAL |
	    VM_ALLOC_WIRED, CHUNK_PAGES, 0, ~(vm_paddr_t)0,
	    NBPDR, 0, VM_MEMATTR_DEFAULT);
	if (m == NULL)
		return (false);
	zero_run(m, CHUNK_PAGES);
	for (i = 0; i < CHUNK_PAGES; i++)
		page_ready(&m[i]);
	/* A chunk is whole words of the bitmap. */
	memset(&seg->wired[first / 64], 0xff, CHUNK_PAGES / 8);
	return (true);
}

int
vmm_host_memseg_page(struct vmm_memseg *seg, uint64_t off, uint64_t *pa,
    unsigned int *order)
{
	vm_object_t object = seg->object;
	vm_pindex_t index, first;
	vm_page_t m;
	int i, patience = PATIENCE;
	bool whole;

	if (off >= seg->len)
		return (EFAULT);
	index = OFF_TO_IDX(off);
	first = rounddown2(index, CHUNK_PAGES);
	whole = seg->len - IDX_TO_OFF(first) >= NBPDR;
	VM_OBJECT_WLOCK(object);
	if (whole && !chunk_take(seg, first))
		/* Completes what is there, as far as memory goes. */
		for (i = 0; i < CHUNK_PAGES; i++)
			if (page_take(seg, first + i) == NULL)
				break;
	while ((m = page_take(seg, index)) == NULL && patience-- > 0) {
		VM_OBJECT_WUNLOCK(object);
		vm_wait(NULL);
		VM_OBJECT_WLOCK(object);
	}
	if (m == NULL) {
		VM_OBJECT_WUNLOCK(object);
		return (ENOMEM);
	}
	*pa = VM_PAGE_TO_PHYS(m);
	/* A reservation with all of its pages in use says so in the first. */
	m = whole ? vm_page_lookup(object, first) : NULL;
	*order = m != NULL && m->psind > 0 ? CHUNK_ORDER : 0;
	VM_OBJECT_WUNLOCK(object);
	return (0);
}

/*
 * Pages of a "phys" object are unmanaged: nobody knows where they are mapped. So
 * the calling process's mappings are looked for, and there must be no others; a
 * page fault counts as one while it lasts. A page that is busy stays.
 */
int
vmm_host_memseg_detach(struct vmm_memseg *seg, uint64_t off, uint64_t len,
    struct vmm_pages **pages, uint64_t *bytes)
{
	vm_map_t map = &curproc->p_vmspace->vm_map;
	vm_object_t object = seg->object;
	vm_map_entry_t e;
	vm_offset_t last;
	vm_pindex_t i;
	vm_page_t m;
	u_int users = 1;	/* The segment itself. */
	int error;

	vm_map_lock(map);
	VM_OBJECT_WLOCK(object);
	VM_MAP_ENTRY_FOREACH(e, map) {
		if (e->object.vm_object != object)
			continue;
		if (e->wired_count == 0)
			users++;
		last = e->offset + (e->end - e->start);
		if (off < last && e->offset < off + len)
			pmap_remove(map->pmap,
			    e->start + MAX(e->offset, off) - e->offset,
			    e->start + MIN(last, off + len) - e->offset);
	}
	error = object->ref_count == users ? 0 : EBUSY;
	for (i = OFF_TO_IDX(off); error == 0 && i < OFF_TO_IDX(off + len); i++) {
		m = vm_page_lookup(object, i);
		if (m == NULL)
			continue;
		if (!VMM_PAGE_MAY_GO(m)) {
			/* The first one says that all are in one piece. */
			error = *bytes == 0 ? EBUSY : 0;
			continue;
		}
		/* Wired, as whoever does I/O to it may let go of it last. */
		(void)page_take(seg, i);
		seg->wired[i / 64] &= ~(1UL << (i % 64));
		(void)vm_page_remove(m);
		m->plinks.s.ss.sle_next = (vm_page_t)*pages;
		*pages = (struct vmm_pages *)m;
		*bytes += PAGE_SIZE;
	}
	VM_OBJECT_WUNLOCK(object);
	vm_map_unlock(map);
	return (error);
}

void
vmm_host_pages_free(struct vmm_pages *pages)
{
	vm_page_t m;

	while ((m = (vm_page_t)pages) != NULL) {
		pages = (struct vmm_pages *)m->plinks.s.ss.sle_next;
		VMM_PAGE_UNWIRE(m);
	}
}

uint64_t
vmm_host_memseg_resident(struct vmm_memseg *seg)
{

	return (ptoa((uint64_t)seg->object->resident_page_count));
}

vm_object_t
vmm_memseg_object(struct vmm_memseg *seg)
{

	vm_object_reference(seg->object);
	return (seg->object);
}
